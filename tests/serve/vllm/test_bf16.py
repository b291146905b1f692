"""In bf16 vLLM is as near to transformers in fp32 as transformers in bf16 is: on a CPU, and on a GPU with vLLM's own kernels.

Greedy tokens in bf16 differ where two are nearly as probable, so log-probabilities are compared, of the tokens that vLLM chose.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.serve.vllm.engine import compare_with_fp32, complete, engine, tokens
from tests.serve.vllm.models import log_probabilities, make_model, of_tokens
from tests.serve.vllm.prompts import random_prompts, text_prompts

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")
pytestmark = pytest.mark.vllm
EXPORTED = os.environ.get("HYLO_SERVE_MODEL", "")
NEW = 16


@pytest.mark.parametrize("name", ["exported", "mla_gdn", "mla_mamba2", "mla_kda", "aligned_bias_gdn"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_log_probabilities_are_as_near_to_fp32_as_those_of_transformers(device, name, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if name == "exported" and not EXPORTED:
        pytest.skip("HYLO_SERVE_MODEL=FOLDER of an exported model")
    longest = 2048 if name == "exported" else 512
    folder = Path(EXPORTED) if name == "exported" else make_model(name, tmp_path / name)
    named = text_prompts(folder, longest) if (folder / "tokenizer.json").exists() else random_prompts()
    prompts = list(named.values())
    with engine(folder, dtype="bfloat16", max_model_len=longest, max_num_batched_tokens=512) as llm:
        outputs = complete(llm, prompts, NEW, logprobs=0)
    served, right, behind = compare_with_fp32(folder, prompts, outputs, device)
    answers = tokens(outputs)
    rounded = of_tokens(log_probabilities(folder, torch.bfloat16, device, prompts, answers), answers)
    ours, theirs = (served - right).abs(), (rounded - right).abs()
    print(
        f"\n{name} on {device}: {int((behind == 0).sum())} of {len(behind)} tokens are fp32's most probable, the others at "
        f"most {behind.max():.4f} less so; errors of log-probabilities: vLLM mean {ours.mean():.4f}, largest {ours.max():.4f}; "
        f"transformers in bf16 {theirs.mean():.4f}, {theirs.max():.4f}"
    )
    assert ours.mean() < 1.5 * theirs.mean() + 1e-3
    assert ours.max() < 3 * theirs.max() + 1e-2
    assert behind.max() < 4 * theirs.max() + 1e-2, "a token that is chosen is nearly the most probable"
