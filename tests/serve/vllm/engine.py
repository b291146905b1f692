"""vLLM in this process, one engine after another, and the comparison of its tokens with transformers'."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})


@contextlib.contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[Any]:
    """Start an engine on a folder in fp32, and free it; on a GPU with a small cache, so that others may use the GPU too."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32", "max_num_seqs": 8}
    if torch.cuda.is_available():
        defaults |= {"kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.05}
    llm = LLM(model=str(folder), **(defaults | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def complete(llm: Any, prompts: list[list[int]], new: int, **more: Any) -> list[Any]:
    """Complete prompts of token ids greedily, all at once; vLLM's outputs."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **more)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    """Completions as lists of token ids."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare_with_fp32(folder: Path, prompts: list[list[int]], outputs: list[Any], device: str = "cpu") -> tuple[Any, Any, Any]:
    """Compare outputs of requests with `logprobs` with transformers in fp32, which is given the same tokens.

    Returns:
        Of all answers' tokens, fp32 [tokens]: vLLM's log-probabilities, transformers', and by how much those of the most
        probable tokens are higher.
    """
    import torch

    from tests.serve.vllm.models import log_probabilities, of_tokens

    answers = tokens(outputs)
    served = [at[token].logprob for out, answer in zip(outputs, answers) for at, token in zip(out.outputs[0].logprobs, answer)]
    exact = log_probabilities(folder, torch.float32, device, prompts, answers)
    right = of_tokens(exact, answers)
    return torch.tensor(served), right, torch.cat(exact).max(1).values - right


def preemptions(llm: Any) -> int:
    """Number of requests that were put back to wait; the engine was started with disable_log_stats=False."""
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
