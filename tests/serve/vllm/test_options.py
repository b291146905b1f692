"""Options of vLLM that users give: each works with HyLo models, or is refused before weights are loaded, with a sentence."""

import json
import os
import shutil

import pytest
import torch

from megatron_hylo.io import DamagedError
from tests.serve.vllm.engine import complete, engine, tokens
from tests.serve.vllm.models import greedy_tokens, log_probabilities, make_model
from tests.serve.vllm.test_engine import random_tokens

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")
pytestmark = pytest.mark.vllm
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("mla_gdn", tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("settings, message", [
    ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8.* is not supported for HyLo models; docs/serving.md"),
    ({"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype bfloat16 is not supported"),
    ({"quantization": "fp8"}, "--quantization, or `hylo export --quantize` \\(fp8\\), is not supported"),
    ({"enable_lora": True}, "--enable-lora is not supported"),
    ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
     "--speculative-config is not supported"),
    ({"runner": "pooling"}, "--runner pooling is not supported"),
    ({"pipeline_parallel_size": 2}, "[Pp]ipeline parallelism is not supported"),
    ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "--decode-context-parallel-size is not supported"),
    ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "--kv-transfer-config or .* is not"),
    ({"kv_offloading_size": 1.0}, "--kv-offloading-size is not supported"),
    ({"cpu_offload_gb": 1}, "--cpu-offload-gb is not supported"),
    ({"offload_group_size": 2}, "--offload-group-size is not supported"),
    ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager is not supported"),
    ({"hf_overrides": {"rope_theta": 500_000.0}}, "--hf-overrides of the rotation, which is `hylo`'s in config.json, is not"),
    ({"additional_config": {"hylo_kernels": "slow"}}, "hylo_kernels is 'reference', got 'slow'"),
])  # fmt: skip
def test_what_does_not_work_is_refused_with_a_sentence(folder, settings, message):
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"max_model_len": 256, "dtype": "float32", "skip_tokenizer_init": True}
    with pytest.raises(Exception, match=message):
        EngineArgs(model=str(folder), **(arguments | settings)).create_engine_config()


def test_a_file_of_weights_that_is_cut_is_named_before_it_is_loaded(folder, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {weights.name: {"bytes": size, "sha256": "0" * 64}}}))
    with pytest.raises(DamagedError, match=f"{weights.name} has {size // 2} bytes, its manifest says {size}"):
        EngineArgs(model=str(tmp_path), max_model_len=256, skip_tokenizer_init=True).create_engine_config()


def test_a_token_outside_the_vocabulary_ends_no_engine(folder):
    """The tokenizer's size in place of its last id is what vLLM compares with; without a tokenizer, nothing."""
    with engine(folder) as llm:
        found = tokens(complete(llm, [[5, 256, 7], [5, 255, 7], [300], [5, -1, 7], [5, 0, 7]], NEW))
    assert found[0] == found[1] and len(found[2]) == NEW and found[3] == found[4]


def test_every_tensor_of_the_model_is_a_parameter_or_a_buffer(folder):
    """After `sleep?level=2`, which GPUs have alone, vLLM brings nothing else back."""
    with engine(folder, enforce_eager=True) as llm:
        (others,) = llm.apply_model(lambda model: [name for module in model.modules() for name in other_tensors(module)])
    assert not others


def other_tensors(module: torch.nn.Module) -> list[str]:
    """Attributes of a module of this project that are tensors, or dictionaries and sequences of them, besides its pages."""
    known = {"_parameters", "_buffers", "_modules", "kv_cache"}
    ours = type(module).__module__.startswith("megatron_hylo")
    return [name for name, value in vars(module).items() if ours and name not in known and holds_tensor(value)]


def holds_tensor(value: object) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, torch.Tensor) or any(holds_tensor(part) for part in parts)


def test_what_works_gives_right_answers(folder):
    """Log-probabilities of prompts and answers, several answers a prompt; with `enforce_eager`, one request at a time."""
    from vllm import SamplingParams

    prompts = random_tokens(5, 40)
    expected, _ = greedy_tokens(folder, prompts, NEW)
    several = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=NEW, ignore_eos=True, detokenize=False)
    with engine(folder, enforce_eager=True, max_num_seqs=1, enable_prefix_caching=False) as llm:
        outputs = complete(llm, prompts, NEW, logprobs=3, prompt_logprobs=0)
        found = [llm.generate([{"prompt_token_ids": prompts[1]}], several, use_tqdm=False)[0] for _ in range(2)]
    assert tokens(outputs) == expected
    after = [prompt[1:] + answer for prompt, answer in zip(prompts, expected)]
    right = log_probabilities(folder, torch.float32, "cpu", [prompt[:1] for prompt in prompts], after)
    for output, text, exact in zip(outputs, after, right):
        served = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for at, token, every in zip(served, text, exact, strict=True):
            assert at[token].logprob == pytest.approx(float(every[token]), abs=1e-4)
        assert set(exact[-1].topk(3).indices.tolist()) <= set(served[-1])
    sampled = [[tuple(answer.token_ids) for answer in output.outputs] for output in found]
    assert sampled[0] == sampled[1] and len(set(sampled[0])) == 3
