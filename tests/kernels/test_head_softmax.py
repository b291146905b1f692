"""The Triton kernels of the head's KL and cross-entropy against the plain form in float64."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hylo.config.train import KLSettings
from megatron_hylo.distill.head_loss import linear_head_loss
from megatron_hylo.kernels.registry import in_use, override
from tests.distill.test_head_loss import make_inputs, reference
from tests.kernels.compare import relative_error

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_equal_the_plain_form_in_triton_s_interpreter() -> None:
    """On the CPU; whole and half vocabularies on two gloo ranks; temperatures, directions, missing labels, masked tokens."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("head_softmax_ranks.py"))], capture_output=True, text=True, timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    cases = [line.split("CASE ")[1].split("|") for line in result.stdout.splitlines() if "CASE " in line]
    assert len(cases) == 3 * 3 * 2 * 2 * 2 + 2 * 2, result.stdout
    for name, kl, cross_entropy, gradient in cases:
        assert max(float(kl), float(cross_entropy)) < 2e-6, (name, kl, cross_entropy)
        assert float(gradient) < (1e-2 if "bfloat16" in name else 2e-6), (name, gradient)  # bf16 is what it is written in


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_compile_for_hopper(reverse) -> None:
    """To machine code, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_hylo.kernels import triton_head_softmax as kernels

    common = dict(VOCABULARY=128_256, INVERSE_TEMPERATURE=0.5, TEACHER=True, REVERSE=reverse, LABELS=True, BLOCK=4096)
    logits = dict(student="*fp32", teacher="*fp32", labels="*i64")
    for kernel, arguments, constants in (
        (kernels.row_statistics, dict(out="*fp32"), common | dict(COLUMNS=7)),
        (kernels.logit_gradient, dict(normalisers="*fp32", out="*bf16", scales="*fp32"), common),
    ):
        signature = logits | arguments | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("direction", "temperature"), [("forward", 1.0), ("forward", 2.0), ("reverse", 1.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_head_loss_with_triton_equals_float64_torch(masked, direction, temperature, dtype) -> None:
    inputs = make_inputs(dtype, n=300, vocab=20_011)
    mask = torch.arange(300) % 3 > 0 if masked else None
    truth = reference(inputs, 0.7, 0.4, direction, temperature, mask=mask)
    on_gpu = {name: value.detach().cuda().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    with override("head_softmax", "triton"):
        result = linear_head_loss(
            **on_gpu,
            chunk_tokens=128,
            token_mask=mask.cuda() if masked else None,
            settings=KLSettings(kl_weight=0.7, ce_weight=0.4, kl_direction=direction, kl_temperature=temperature),
        )
    assert in_use()["head_softmax"] == "triton"
    assert relative_error(result.loss.cpu(), truth["loss"]) < (1e-5 if dtype == torch.float32 else 1e-4)
    names = ("hidden", "weight")
    for name, gradient in zip(names, torch.autograd.grad(result.loss, [on_gpu[name] for name in names])):
        assert relative_error(gradient.cpu(), truth[name]) < (1e-5 if dtype == torch.float32 else 1e-2), name
