"""Decode of a hybrid beside its dense teacher, on the CPU or a GPU, and assisted generation with drafts of different kinds.

    python benchmarks/cpu_decode.py runs/quickstart/export TEACHER runs/quickstart/data   # TEACHER: Hugging Face folder or GGUF

The models take turns, token by token, after the same prompt. On the CPU seconds are those of this process (one thread by
default), so that other work on the machine weighs less; on a GPU they are by the clock on the wall. "made anew" makes all keys
and values of MLA layers in every step. Drafts propose tokens, which the model that is to be sped up checks in one pass; greedy,
so that the text is that model's own. They are the hybrid for its teacher, the teacher for the hybrid, the hybrid's first layers
for itself (assistant_early_exit), and what followed the last tokens where they stood before (prompt_lookup_num_tokens). Each
prompt is continued without and with the draft in turn. Prints tables and, last, one JSON line; writes RESULTS.md.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from megatron.core.datasets.indexed_dataset import IndexedDataset
from report import device_name, markdown, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.hf import HyloCache
from megatron_hylo.hf.attention_hylo import HyloLatentAttention

COLUMNS = ("model", "draft", "tokens proposed", "kept", "tokens a pass", "ms a token without", "with", "speed", "texts equal")


def main(
    hybrid: Path,
    teacher: Path,
    data: Path,
    context: int = 4096,
    tokens: int = 24,
    dtypes: list[Literal["float32", "bfloat16"]] = ["float32"],  # noqa: B006
    prompts: int = 16,
    prompt_tokens: tuple[int, int] = (200, 1000),
    new_tokens: int = 64,
    drafted: int = 4,
    exits: list[int] = [8, 16],  # noqa: B006
    threads: int = 1,
    device: str = "cpu",
    results: Path = Path("benchmarks/results/cpu_decode"),
    commit: str = "",
) -> None:
    """Measure decode and drafts.

    Args:
        hybrid, teacher: models of one tokenizer.
        data: dataset folder; its held-out text is the decode's prompt, beginnings of its held-out documents are the drafts'.
        context: tokens in the cache before the first measured step.
        tokens: measured steps of each model.
        dtypes: of both models' weights, for the steps; drafts are measured with the first.
        prompts, prompt_tokens: how many continue with drafts, and the least and the most tokens of one.
        new_tokens: of each prompt, without and with a draft.
        drafted: tokens that a draft proposes at a time.
        exits: layers of the hybrid that draft for it.
        threads: of torch.
        device: of both models, as torch names it.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    torch.set_num_threads(threads)
    documents = [torch.as_tensor(document).long() for document in IndexedDataset(str(data / "heldout"))]
    ids = torch.cat(documents)[None]
    if ids.shape[1] < context:
        raise SystemExit(f"{data} holds {ids.shape[1]:,} held-out tokens, fewer than --context {context:,}")
    starts = [prompt.to(device) for prompt in beginnings(documents, prompts, *prompt_tokens)]
    decode, drafts = [], []
    for dtype in dtypes:
        paths = {"hybrid": hybrid, "dense": teacher}
        models = {name: open_model(path, getattr(torch, dtype))[0].to(device) for name, path in paths.items()}
        decode += decode_rates(models, ids[:, :context].to(device), tokens)
        if dtype == dtypes[0]:
            student, dense = models["hybrid"], models["dense"]
            kinds: list[tuple[str, Any, str, dict[str, Any]]] = [
                ("dense", dense, "the hybrid", {"assistant_model": student}),
                ("hybrid", student, "the dense model", {"assistant_model": dense}),
                *(("hybrid", student, f"its first {n} layers", {"assistant_early_exit": n}) for n in exits),
                ("hybrid", student, "n-grams of the text", {"prompt_lookup_num_tokens": drafted}),
                ("dense", dense, "n-grams of the text", {"prompt_lookup_num_tokens": drafted}),
            ]
            for name, model, draft, how in kinds:
                row = {"model": name, "draft": draft} | acceptance(model, how, starts, new_tokens, drafted)
                print(row, flush=True)
                drafts.append(row)
    cells = [(d["model"], d["draft"], f"{d['proposed']:,}", f"{d['rate']:.0%}", f"{d['tokens_a_pass']:.2f}",
              f"{d['ms_alone']:.0f}", f"{d['ms']:.0f}", f"{d['speed']:.2f} x", f"{d['equal']} of {prompts}")
             for d in drafts]  # fmt: skip
    table = markdown(COLUMNS, cells)
    rows = [(d["model"], d["dtype"], f"{d['ms']:.1f}", f"{1e3 / d['ms']:.1f}", f"{d['cache_bytes'] / 2**20:.1f}")
            for d in decode]  # fmt: skip
    report(
        results, f"Decode on the {'CPU' if device == 'cpu' else 'GPU'}", [
            f"Assisted generation: {prompts} beginnings of held-out documents, {prompt_tokens[0]:,} to {prompt_tokens[1]:,} "
            f"tokens, {new_tokens} new tokens each, {drafted} proposed at a time, greedy, {dtypes[0]}; milliseconds are of "
            f"tokens after the first pass, which reads the prompt.",
            table,
            f"Steps of one token: one sequence, {context:,} tokens in the cache, medians of {tokens} steps.",
        ], ("model", "weights", "ms a token", "tokens/s", "cache MiB"), rows,
        f"{device_name()}, commit {commit or 'not given'}",
    )  # fmt: skip
    print(table)
    print(json.dumps({"benchmark": "cpu_decode", "device": device, "context": context, "decode": decode, "drafts": drafts}))


def seconds_now() -> float:
    """Seconds of a clock: of this process alone on the CPU, on the wall where a GPU works, after its work is done."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def beginnings(documents: list[torch.Tensor], count: int, least: int, most: int) -> list[torch.Tensor]:
    """Return `count` beginnings of documents, int64 [1, tokens], of lengths evenly spread from `least` to `most`."""
    long = [document for document in documents if len(document) > most]
    if len(long) < count:
        raise SystemExit(f"{len(long)} held-out documents are longer than {most:,} tokens; take fewer --prompts than {count}")
    lengths = torch.linspace(least, most, count).long().tolist()
    return [long[i * len(long) // count][None, :length] for i, length in enumerate(lengths)]


@torch.no_grad()
def decode_rates(models: dict[str, Any], ids: torch.Tensor, steps: int) -> list[dict[str, Any]]:
    """Median milliseconds of one-token steps after the same prompt, the models in turn."""
    caches = {name: model(ids, use_cache=True, logits_to_keep=1).past_key_values for name, model in models.items()}
    times: dict[str, list[float]] = {}
    absorbs = HyloLatentAttention.absorbs
    for step in range(steps + 2):
        for name in ("hybrid", "hybrid, made anew", "dense"):
            key = name.partition(",")[0]
            HyloLatentAttention.absorbs = (lambda *_: False) if "anew" in name else absorbs  # type: ignore[method-assign]
            start = seconds_now()
            models[key](ids[:, -1:], past_key_values=caches[key], use_cache=True)
            if step > 1:
                times.setdefault(name, []).append(seconds_now() - start)
    HyloLatentAttention.absorbs = absorbs  # type: ignore[method-assign]
    return [
        {"model": name, "ms": 1e3 * statistics.median(values), "cache_bytes": cache_bytes(caches[name.partition(",")[0]]),
         "dtype": str(models[name.partition(",")[0]].dtype).removeprefix("torch.")}
        for name, values in times.items()
    ]  # fmt: skip


def cache_bytes(cache: Any) -> int:
    """All bytes of a cache."""
    if isinstance(cache, HyloCache):
        return cache.nbytes()
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


class _Passes:
    """Streamer of transformers that notes each pass: the time at its end, and new tokens; the first one is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with the new tokens of each pass."""
        self.times.append(seconds_now())
        self.tokens.append(value.numel())

    def end(self) -> None:
        """Called at the end of the text."""

    def after_the_first(self) -> tuple[float, int]:
        """Seconds and new tokens of all passes but the first one, which reads the prompt."""
        return self.times[-1] - self.times[1], sum(self.tokens[2:])


@torch.no_grad()
def acceptance(model: Any, draft: dict[str, Any], prompts: list[torch.Tensor], tokens: int, drafted: int) -> dict[str, Any]:
    """Share of a draft's tokens that the model keeps, and its speed against the model alone.

    Args:
        model: to be sped up.
        draft: argument of `generate` that names the draft.
        prompts: int64 [1, tokens] each.
        tokens: new ones of each prompt.
        drafted: tokens proposed at a time.
    """
    draft.get("assistant_model", model).generation_config.update(
        num_assistant_tokens=drafted, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    settings = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    proposed = accepted = passes = equal = 0
    seconds, made, whole = {"alone": 0.0, "with": 0.0}, {"alone": 0, "with": 0}, {"alone": 0.0, "with": 0.0}
    widths: list[int] = []  # tokens of the model's passes; those that exit early do not come to the last layer
    hook = model.model.layers[-1].register_forward_hook(lambda module, inputs, out: widths.append(inputs[0].shape[1]))
    for prompt in prompts:
        texts = {}
        for name, how in (("alone", {}), ("with", draft)):
            widths.clear()
            noted, start = _Passes(), seconds_now()
            texts[name] = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=noted, **how, **settings)
            whole[name] += seconds_now() - start
            later, new = noted.after_the_first()
            seconds[name], made[name] = seconds[name] + later, made[name] + new
        equal += torch.equal(texts["alone"], texts["with"])
        proposed += sum(widths) - prompt.shape[1] + 1 - len(widths)
        accepted, passes = accepted + tokens - len(widths), passes + len(widths)
    hook.remove()
    ms = {name: 1e3 * seconds[name] / max(made[name], 1) for name in seconds}
    return {"proposed": proposed, "accepted": accepted, "rate": accepted / max(proposed, 1),
            "tokens_a_pass": (passes + accepted) / passes, "ms_alone": ms["alone"], "ms": ms["with"],
            "speed": ms["alone"] / ms["with"] if ms["with"] else 1.0, "speed_with_prompt": whole["alone"] / whole["with"],
            "equal": equal}  # fmt: skip


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
