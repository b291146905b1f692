"""The Triton decode kernel, by Triton's interpreter on a CPU, equals the torch one (held to whole keys elsewhere)."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm  # no vLLM is needed, but seconds; a GPU runs the kernel itself by the same code
CASES = """
import torch
from megatron_hylo.serve.vllm.latent_kernels import Cached, decode_torch, split_scales
from megatron_hylo.serve.vllm.latent_triton import decode_triton

device = {device!r}
if device == 'cpu':
    from megatron_hylo.serve.vllm import latent_triton
    from tests.kernels.interpreter import mend_interpreter
    mend_interpreter(latent_triton)
half = torch.float16 if device == 'cpu' else torch.bfloat16  # which the interpreter cannot multiply
CASES = ((4, 2, 24, 8, torch.float32), (9, 3, 112, 48, torch.float32), (24, 8, 128, 64, half))
for heads, groups, rank, rotary, dtype in CASES:
    for scaled in (False, True):
        torch.manual_seed(0)
        lengths = torch.tensor([1, 16, 70, 0], dtype=torch.int32)
        wide = torch.randn(9, 16, rank + rotary + 2 * groups + 5)  # pages with padding between rows
        wide[..., rank + rotary : -5] = split_scales(torch.rand(144, groups) + 0.5, dtype).float().unflatten(0, (9, 16))
        pages = wide.to(dtype)[..., :-5].to(device)
        table = torch.tensor([[3, 0, 0, 0, 0], [1, 0, 0, 0, 0], [7, 2, 5, 8, 4], [0] * 5], dtype=torch.int32)
        cached = Cached(pages, table.to(device), lengths.to(device), rank, groups)
        query = torch.randn(4, heads, rank + rotary).to(dtype).to(device)
        offset = torch.randn(4, heads).to(device) if scaled else None
        expected, found = (decode(query, offset, cached, 0.1) for decode in (decode_torch, decode_triton))
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        assert error < (2e-6 if dtype == torch.float32 else 1e-2), (heads, rank, scaled, error)
        assert not found[3].any()
print("equal")
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_decode_equals_torch(device):
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    code = CASES.format(device=device)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800, env=os.environ | settings)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]
