"""Decode of a hybrid on the CPU beside its dense teacher, and the hybrid as the draft of its teacher (assisted generation).

    python benchmarks/cpu_decode.py runs/quickstart/export TEACHER --text TEXT.txt        # TEACHER: Hugging Face folder or GGUF

The models take turns, token by token, after the same prompt; seconds are those of this process on the CPU (one thread by
default), so that other work on the machine weighs less. "made anew" makes all keys and values of MLA layers in every step. A
draft's acceptance is the part of its proposed tokens that the teacher keeps; greedy, so that the text is the teacher's own.
Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from report import device_name, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.hf import HyloCache
from megatron_hylo.hf.attention_hylo import HyloLatentAttention


def main(
    hybrid: Path,
    teacher: Path,
    text: Path,
    context: int = 4096,
    tokens: int = 24,
    prompts: int = 4,
    prompt_tokens: int = 256,
    drafted: int = 4,
    threads: int = 1,
    results: Path = Path("benchmarks/results/cpu_decode"),
    commit: str = "",
) -> None:
    """Measure decode and acceptance.

    Args:
        hybrid, teacher: models of one tokenizer.
        text: real text; the decode's prompt is its beginning, the draft's prompts are spread over it.
        context: tokens in the cache before the first measured step.
        tokens: measured steps of each model, and new tokens of each prompt with a draft.
        prompts, prompt_tokens: of the draft.
        drafted: tokens that the draft proposes at a time.
        threads: of torch.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    torch.set_num_threads(threads)
    (student, tokenizer), (dense, _) = open_model(hybrid), open_model(teacher)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids
    if ids.shape[1] < context:
        raise SystemExit(f"{text} has {ids.shape[1]:,} tokens, fewer than --context {context:,}; give a longer text")
    decode = decode_rates({"hybrid": student, "dense": dense}, ids[:, :context], tokens)
    spread = [
        ids[:, start : start + prompt_tokens] for start in torch.linspace(0, ids.shape[1] - prompt_tokens, prompts).long()
    ]
    draft = acceptance(student, dense, spread, tokens, drafted)
    rows = [(name, f"{row['ms']:.1f}", f"{1e3 / row['ms']:.1f}", f"{row['cache_bytes'] / 2**20:.1f}")
            for name, row in decode.items()]  # fmt: skip
    report(
        results, "Decode on the CPU", [
            f"One sequence, {context:,} tokens in the cache, {decode['hybrid']['dtype']}, medians of {tokens} steps.",
            f"The hybrid as the teacher's draft, {drafted} tokens at a time, {prompts} prompts of {prompt_tokens} tokens of "
            f"{text.name}, {tokens} new tokens each: {draft['accepted']} of {draft['proposed']} proposed tokens kept "
            f"({draft['rate']:.0%}), {draft['tokens_a_pass']:.2f} tokens a pass of the teacher, "
            f"{draft['speed']:.2f} x the teacher's speed without a draft.",
        ], ("model", "ms a token", "tokens/s", "cache MiB"), rows, f"{device_name()}, commit {commit or 'not given'}",
    )  # fmt: skip
    print(json.dumps({"benchmark": "cpu_decode", "context": context, "decode": decode, "draft": draft}))


@torch.no_grad()
def decode_rates(models: dict[str, Any], ids: torch.Tensor, steps: int) -> dict[str, dict[str, Any]]:
    """Median CPU milliseconds of one-token steps after the same prompt, the models in turn."""
    caches = {name: model(ids, use_cache=True, logits_to_keep=1).past_key_values for name, model in models.items()}
    times: dict[str, list[float]] = {}
    absorbs = HyloLatentAttention.absorbs
    for step in range(steps + 2):
        for name in ("hybrid", "hybrid, made anew", "dense"):
            key = name.partition(",")[0]
            HyloLatentAttention.absorbs = (lambda *_: False) if "anew" in name else absorbs  # type: ignore[method-assign]
            start = time.process_time()
            models[key](ids[:, -1:], past_key_values=caches[key], use_cache=True)
            if step > 1:
                times.setdefault(name, []).append(time.process_time() - start)
    HyloLatentAttention.absorbs = absorbs  # type: ignore[method-assign]
    found = {}
    for name, values in times.items():
        key = name.partition(",")[0]
        found[name] = {"ms": 1e3 * statistics.median(values), "cache_bytes": cache_bytes(caches[key]),
                       "dtype": str(models[key].dtype).removeprefix("torch.")}  # fmt: skip
    return found


def cache_bytes(cache: Any) -> int:
    """All bytes of a cache."""
    if isinstance(cache, HyloCache):
        return cache.nbytes()
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def acceptance(draft: Any, teacher: Any, prompts: list[torch.Tensor], tokens: int, drafted: int) -> dict[str, Any]:
    """Share of the draft's tokens that the teacher keeps, and the speed against the teacher alone, in CPU time."""
    draft.generation_config.update(
        num_assistant_tokens=drafted, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    settings = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    proposed = accepted = passes = made = 0
    alone = assisted = 0.0
    widths: list[int] = []  # tokens of the teacher's passes
    hook = teacher.get_input_embeddings().register_forward_hook(lambda module, inputs, out: widths.append(out.shape[1]))
    for prompt in prompts:
        start = time.process_time()
        expected = teacher.generate(prompt, **settings)
        middle = time.process_time()
        widths.clear()
        found = teacher.generate(prompt, assistant_model=draft, **settings)
        end = time.process_time()
        if not torch.equal(found, expected):
            raise SystemExit("assisted generation gave another text than the teacher alone")
        alone, assisted = alone + middle - start, assisted + end - middle
        new = found.shape[1] - prompt.shape[1]
        proposed += sum(widths) - prompt.shape[1] + 1 - len(widths)
        accepted, passes, made = accepted + new - len(widths), passes + len(widths), made + new
    hook.remove()
    return {"proposed": proposed, "accepted": accepted, "rate": accepted / proposed, "tokens_a_pass": made / passes,
            "speed": alone / assisted}  # fmt: skip


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
