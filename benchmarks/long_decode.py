"""Prefill and decode of hybrids up to 2M tokens beside the dense model of the same base, on one GPU.

    HYLO_AUTOTUNE=never python benchmarks/long_decode.py                            # hybrids and dense, decode at all lengths
    HYLO_AUTOTUNE=never python benchmarks/long_decode.py --models [llama3.2-3b-6mla22gdn] --prefill 2097152 --lengths []

Random weights at real shapes, made on the device. A model's name may end in +fp8 or +int8: its latents are 8 bits wide.
Prefill reads random tokens in pieces with a carried cache, once up to --prefill, with a row at each power of two;
the dense model reads each length in one pass of transformers (SDPA), as its users do. Decode takes one token a sequence by a
captured CUDA graph, for the dense model by transformers' forward with its DynamicCache; the cache is as long as the row says
and holds zeros, but in rows "prefilled", which follow the prefill. Bytes of a step: all weights but the embedding, the cache,
states twice. Every row is appended to WORK as it comes; rows that are there are not measured again, so that a run can be cut
and repeated, or its models and lengths be measured one after the other. Prints a table and, last, one JSON line; writes
RESULTS.md and RESULTS.png.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from report import architecture, device_name, draw_panels, free_memory, line, report
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.layouts import BASES
from megatron_hylo.convert.hf_config import hf_config_from_model
from megatron_hylo.hf import HyloConfig, HyloForCausalLM
from megatron_hylo.hf.cache_hylo import HyloCache
from megatron_hylo.hf.decode_hylo import DecodeGraph
from megatron_hylo.hf.layers_hylo import cache_nbytes
from megatron_hylo.kernels.elementwise import compile_on_request
from megatron_hylo.kernels.registry import in_use

Row = dict[str, Any]
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second, by NVIDIA's data sheets
SPARE = 160  # rows of a cache after its length
MARGIN = 6 * 2**30  # bytes of the GPU that the largest batch leaves free
COLUMNS = (
    "model",
    "what",
    "tokens",
    "batch",
    "seconds",
    "tokens/s",
    "GB a step",
    "% of bandwidth",
    "peak GiB",
    "KV bytes a token",
)


def main(
    models: list[str] = ["llama3.2-3b-6mla22gdn", "llama3.2-3b-6mla22m2", "llama3.2-3b"],  # noqa: B006
    lengths: list[int] = [8192, 65_536, 262_144, 1_048_576, 2_097_152],  # noqa: B006
    prefill: int = 262_144,
    batch_lengths: list[int] = [262_144],  # noqa: B006
    piece: int = 16_384,
    steps: int = 48,
    largest_batch: int = 512,
    minutes: float = 60.0,
    work: Path = Path("/tmp/long_decode.jsonl"),
    results: Path = Path("benchmarks/results/long_decode"),
    commit: str = "",
) -> None:
    """Measure models one after the other.

    Args:
        models: layouts, perhaps with +fp8 or +int8, and dense base models.
        lengths: decode at batch 1 after so many tokens.
        prefill: longest prompt that is read; 0 for none.
        batch_lengths: decode at the largest batch that fits after so many tokens.
        piece: tokens of a prompt that are read at a time.
        steps: timed steps of decode.
        largest_batch: sequences at most.
        minutes: no measurement is begun that would end after it, as far as can be told.
        work: file of rows.
        results: path without suffix of the .md and .png to write.
        commit: of the code, for the results file.
    """
    deadline = time.monotonic() + 60 * minutes
    found = [json.loads(text) for text in work.read_text().splitlines()] if work.is_file() else []
    seen = {_key(row) for row in found}
    with torch.no_grad():
        for name in models:
            measured = measure(name, lengths, prefill, batch_lengths, piece, steps, largest_batch, deadline, seen)
            for row in measured:
                found.append(row)
                with work.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
            free_memory()
    show(found, results, commit)


def _key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["what"], row["tokens"]


def measure(
    name: str, lengths: list[int], prefill: int, batch_lengths: list[int], piece: int, steps: int, largest_batch: int,
    deadline: float, seen: set[tuple[Any, ...]],
) -> Iterator[Row]:  # fmt: skip
    """Rows of one model; a length that does not fit in memory is a row with `out_of_memory`."""
    wanted = [(name, "decode", n) for n in lengths] + [(name, "batch", n) for n in batch_lengths]
    wanted += [(name, "prefill", prefill)] if prefill else []
    if all(key in seen for key in wanted):
        return
    free_memory()
    model = Hybrid(name) if name.partition("+")[0] not in BASES else Dense(name)
    for tokens in lengths:
        if (name, "decode", tokens) not in seen:
            yield from decode_row(model, "decode", tokens, 1, steps, deadline)
    for tokens in batch_lengths:
        if (name, "batch", tokens) in seen:
            continue
        free_memory()
        batch = min(largest_batch, model.fitting(tokens))
        rows: list[Row] = []
        while batch and not rows:
            rows = [r for r in decode_row(model, "batch", tokens, batch, steps // 2, deadline) if "seconds" in r or batch == 1]
            batch = batch * 3 // 4
        yield from rows or [dict(model=name, what="batch", tokens=tokens, out_of_memory=True)]
    if prefill and (name, "prefill", prefill) not in seen:
        yield from model.prefill(prefill, piece, steps, deadline)


class Hybrid:
    """A hybrid of ours with random weights."""

    def __init__(self, name: str) -> None:
        self.name, (layout, _, latents) = name, name.partition("+")
        self.latents = latents or None
        self.model = build(lambda c: HyloForCausalLM(HyloConfig(**hf_config_from_model(c, "bfloat16"))), layout)
        kept = self.model._keep_in_fp32_modules_strict or ()
        for key, parameter in self.model.named_parameters():
            if key.rsplit(".", 1)[-1] in kept:
                parameter.data = parameter.data.float()

    def fitting(self, tokens: int) -> int:
        """Sequences that fit in the memory that is free."""
        free = torch.cuda.mem_get_info()[0] - MARGIN if torch.cuda.is_available() else 2**27
        return max(int(free // cache_nbytes(self.model.config, tokens + SPARE, self.model.dtype.itemsize, self.latents)), 0)

    def cache(self, tokens: int, batch: int) -> HyloCache:
        """A cache that holds so many tokens of zeros, but for its first ones."""
        cache = self.model.new_cache(batch, tokens + SPARE, self.latents)
        ids = torch.randint(self.model.config.vocab_size, (batch, 16), device=self.model.device)
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        for held in (t for tensors in cache.rows.values() for t in tensors):
            held[:, 16:].zero_()
        cache.length, cache.last_position = tokens, cache.last_position.new_full((1, 1), tokens - 1)
        return cache

    def decode(self, cache: HyloCache, batch: int, steps: int) -> tuple[float, Row]:
        """Seconds of a step, and what it reads."""
        graph = DecodeGraph(self.model, cache, compiles=True)
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.model.device)
        for _ in range(4):
            ids = graph(ids).argmax(-1)
        seconds = timed(lambda: graph(ids).argmax(-1), steps)
        states = sum(t.nbytes for tensors in cache.states.values() for t in tensors)
        held = sum(t.untyped_storage().nbytes() for tensors in cache.rows.values() for t in tensors)
        return seconds, dict(
            cache_bytes=cache.token_nbytes(), state_bytes=2 * states, captured=graph.graph is not None,
            kv_bytes_per_token=held / batch / next(iter(cache.rows.values()))[0].shape[1],
        )  # fmt: skip

    def prefill(self, tokens: int, piece: int, steps: int, deadline: float) -> Iterator[Row]:
        """Read a prompt in pieces; a row at each power of two from 8 pieces' quarter on, then decode after it."""
        with compile_on_request():  # kernels are compiled and tuned
            cache = self.model.new_cache(1, 2 * piece, self.latents)
            for _ in range(2):
                self.model(self.ids(piece), past_key_values=cache, logits_to_keep=1)
        del cache
        free_memory()
        cache = self.model.new_cache(1, tokens + SPARE, self.latents)
        synchronise()
        start = begun = time.perf_counter()
        for first in range(0, tokens, piece):
            ids = self.ids(min(piece, tokens - first))
            with compile_on_request():
                logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
            done = cache.length
            if done & (done - 1) == 0 or done == tokens:
                logits.argmax(-1)
                synchronise()
                spent = time.perf_counter() - start
                yield dict(model=self.name, what="prefill", tokens=done, batch=1, seconds=spent, tokens_per_second=done / spent,
                           peak_gib=peak_gib(), kv_bytes_per_token=cache.token_nbytes() / done, piece=piece)  # fmt: skip
            if time.perf_counter() - begun > 20:
                synchronise()
                begun = time.perf_counter()
                share = (done / tokens) ** 2
                left = (begun - start) * (1 / share - 1)
                print(f"{done:,} of {tokens:,} tokens, {begun - start:.0f} s, at most {left:.0f} s left", flush=True)
            if time.monotonic() > deadline:
                print(f"--minutes are over after {done:,} tokens", flush=True)
                return
        seconds, about = self.decode(cache, 1, min(steps, SPARE - 8))
        yield decode_result(self, "decode, prefilled", tokens, 1, seconds, about)

    def ids(self, count: int) -> torch.Tensor:
        """Random tokens [1, count]."""
        return torch.randint(self.model.config.vocab_size, (1, count), device=self.model.device)


class Dense:
    """The dense model of transformers (SDPA) with random weights."""

    latents = None

    def __init__(self, name: str) -> None:
        self.name = name

        def make(config: Any) -> Any:
            values = hf_config_from_model(config, "bfloat16")
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(values.pop("model_type"), **values), attn_implementation="sdpa"
            )

        self.model = build(make, name)
        c = self.model.config
        self.kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.model.dtype.itemsize

    def fitting(self, tokens: int) -> int:
        """Sequences that fit; each step copies a layer's keys and values."""
        free = torch.cuda.mem_get_info()[0] - MARGIN if torch.cuda.is_available() else 2**27
        return max(int(free // (self.kv * tokens * (1 + 1 / self.model.config.num_hidden_layers))), 0)

    def cache(self, tokens: int, batch: int) -> DynamicCache:
        """A cache of zeros."""
        c, cache = self.model.config, DynamicCache(config=self.model.config)
        for layer in range(c.num_hidden_layers):
            shape = (batch, c.num_key_value_heads, tokens, c.head_dim)
            key, value = (torch.zeros(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2))
            cache.update(key, value, layer)
        return cache

    def decode(self, cache: DynamicCache, batch: int, steps: int) -> tuple[float, Row]:
        """Seconds of a step, and what it reads."""
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.model.device)

        def step() -> None:
            self.model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1)

        step()
        seconds = timed(step, max(steps // 4, 2))
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        return seconds, dict(cache_bytes=held, state_bytes=0, kv_bytes_per_token=held / batch / cache.get_seq_length())

    def prefill(self, tokens: int, piece: int, steps: int, deadline: float) -> Iterator[Row]:
        """Read prompts of each power of two in one pass, until one does not fit."""
        length, spent = min(8192, tokens), 0.0
        self.model(self.ids(length), use_cache=True, logits_to_keep=1)
        while length <= tokens:
            if time.monotonic() + 4 * spent > deadline:
                print(f"--minutes are over before {length:,} tokens of {self.name}", flush=True)
                return
            free_memory()
            try:
                synchronise()
                start = time.perf_counter()
                out = self.model(self.ids(length), use_cache=True, logits_to_keep=1)
                out.logits.argmax(-1)
                synchronise()
            except torch.OutOfMemoryError:
                yield dict(model=self.name, what="prefill", tokens=length, out_of_memory=True)
                return
            spent = time.perf_counter() - start
            held = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
            yield dict(model=self.name, what="prefill", tokens=length, batch=1, seconds=spent, tokens_per_second=length / spent,
                       peak_gib=peak_gib(), kv_bytes_per_token=held / length)  # fmt: skip
            del out
            length *= 2

    def ids(self, count: int) -> torch.Tensor:
        """Random tokens [1, count]."""
        return torch.randint(self.model.config.vocab_size, (1, count), device=self.model.device)


def build(make: Any, name: str) -> Any:
    """A model of a named shape with random weights on the device, bf16 (fp32 on a CPU)."""
    cuda = torch.cuda.is_available()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            return make(architecture(name)).eval()
    finally:
        torch.set_default_dtype(before)


def decode_row(model: Any, what: str, tokens: int, batch: int, steps: int, deadline: float) -> Iterator[Row]:
    """Decode after so many tokens; nothing where the minutes are over."""
    if time.monotonic() > deadline:
        print(f"--minutes are over before {what} of {model.name} at {tokens:,}", flush=True)
        return
    free_memory()
    cache: Any = None
    try:
        cache = model.cache(tokens, batch)
        seconds, about = model.decode(cache, batch, min(steps, SPARE - 8))
    except (torch.OutOfMemoryError, ValueError) as error:
        if isinstance(error, ValueError) and "GiB" not in str(error):
            raise
        yield dict(model=model.name, what=what, tokens=tokens, batch=batch, out_of_memory=True)
        return
    yield decode_result(model, what, tokens, batch, seconds, about)


def decode_result(model: Any, what: str, tokens: int, batch: int, seconds: float, about: Row) -> Row:
    """The row of a measured step."""
    weights = sum(p.nbytes for name, p in model.model.named_parameters() if "embed_tokens" not in name)
    if model.model.config.tie_word_embeddings:
        weights += model.model.get_input_embeddings().weight.nbytes
    read = weights + about["cache_bytes"] + about["state_bytes"]
    return dict(model=model.name, what=what, tokens=tokens, batch=batch, seconds=seconds, tokens_per_second=batch / seconds,
                gb_a_step=read / 1e9, bandwidth_share=read / seconds / bandwidth(), peak_gib=peak_gib(), **about)  # fmt: skip


def bandwidth() -> float:
    """Bytes a second that the GPU's memory has; a nominal 20 GB/s for a CPU."""
    return next((rate for name, rate in BANDWIDTHS.items() if name in device_name()), 20e9)


def peak_gib() -> float:
    """Peak memory of tensors, GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Any, count: int) -> float:
    """Seconds of a step, the mean of so many."""
    synchronise()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronise()
    return (time.perf_counter() - start) / count


def show(rows: list[Row], results: Path, commit: str) -> None:
    """Print and write the table, the picture and the JSON line."""
    cells = []
    for r in sorted(rows, key=lambda r: (r["what"], r["model"], r["tokens"])):
        numbers: tuple[str, ...] = ("out of memory", "", "", "", "", "")
        if "seconds" in r:
            numbers = (
                f"{r['seconds']:.4g}", f"{r['tokens_per_second']:,.1f}", f"{r['gb_a_step']:.2f}" if "gb_a_step" in r else "",
                f"{r['bandwidth_share']:.0%}" if "gb_a_step" in r else "",
                f"{r['peak_gib']:.1f}", f"{r['kv_bytes_per_token']:,.0f}",
            )  # fmt: skip
        cells.append((r["model"], r["what"], f"{r['tokens']:,}", str(r.get("batch", "")), *numbers))
    intro = [
        "Random weights, bf16. Prefill: seconds until the first new token. Decode: seconds of a step. "
        f"Bandwidth: {bandwidth() / 1e12:g} TB/s; a step's floor is its bytes over that.",
        *ratios(rows),
        f"![tokens/s and memory by length]({results.name}.png)",
    ]
    report(results, "Prefill and decode by length", intro, COLUMNS, cells, f"{device_name()}, commit {commit}, {in_use()}")
    plot([r for r in rows if "seconds" in r], results.with_suffix(".png"))
    print(json.dumps({"benchmark": "long_decode", "device": device_name(), "rows": rows}))


def ratios(rows: list[Row]) -> list[str]:
    """Sentences: each hybrid against each dense model where both have a row of the same kind and length."""
    found = []
    dense = {(r["what"], r["tokens"]): r for r in rows if r["model"] in BASES and "seconds" in r}
    for r in rows:
        other = dense.get((r["what"], r["tokens"]))
        if r["model"] not in BASES and "seconds" in r and other is not None:
            text = f"{r['model']}, {r['what']} at {r['tokens']:,}: {r['tokens_per_second'] / other['tokens_per_second']:.2f} x"
            kv = f"KV {r['kv_bytes_per_token'] / other['kv_bytes_per_token']:.2%} of {other['model']}'s"
            if "gb_a_step" in other:
                best = other["batch"] * bandwidth() / (other["gb_a_step"] * 1e9)
                kv += f", {r['tokens_per_second'] / best:.2f} x what bandwidth would allow it"
            found.append(f"{text} {other['model']}'s tokens/s; {kv}.")
    return found


def plot(rows: list[Row], file: Path) -> None:
    """Draw decode at batch 1, prefill and memory by length."""

    def curves(axes: Axes, label: str, what: str, key: str) -> None:
        for number, name in enumerate(dict.fromkeys(r["model"] for r in rows)):
            mine = sorted((r["tokens"], r[key]) for r in rows if r["model"] == name and r["what"] == what)
            if mine:
                axes.plot(*zip(*mine), label=name, **line(number))
        axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log" if key != "peak_gib" else "linear")
        lengths = sorted({r["tokens"] for r in rows})
        axes.set_xticks(lengths, [f"{n / 1024:g}K" if n < 2**20 else f"{n / 2**20:g}M" for n in lengths])
        axes.minorticks_off()
        axes.legend(fontsize=8)

    draw_panels(
        file,
        lambda axes: curves(axes, "decode, tokens/s at batch 1", "decode", "tokens_per_second"),
        lambda axes: curves(axes, "seconds to the first token", "prefill", "seconds"),
        lambda axes: curves(axes, "peak GiB of decode", "decode", "peak_gib"),
        size=(12, 3.6),
    )


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
