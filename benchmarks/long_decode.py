"""Prefill and decode of hybrids up to 2M tokens beside the dense model of the same base, on one GPU.

    HYLO_AUTOTUNE=never python benchmarks/long_decode.py                            # hybrids and dense, decode at all lengths
    HYLO_AUTOTUNE=never python benchmarks/long_decode.py --models [llama3.2-3b-6mla22gdn] --prefill 2097152 --lengths []
    HYLO_AUTOTUNE=never NCCL_MAX_P2P_NCHANNELS=2 torchrun --nproc-per-node 8 benchmarks/long_decode.py \\
        --models [llama3.2-3b-6mla22gdn] --prefill 2097152 --lengths [] --batch_lengths []      # the prompt split over GPUs

Random weights at real shapes, made on the device. A model's name may end in +fp8 or +int8: its latents are 8 bits wide; and in
+w8: its weights are FP8, but those of the embedding, the head and small maps.
Prefill reads random tokens in pieces with a carried cache, once up to --prefill, with a row at each power of two;
the dense model reads each length in one pass of transformers (SDPA), as its users do. Decode takes one token a sequence by a
captured CUDA graph, for the dense model by transformers' forward with its DynamicCache; the cache is as long as the row says
and holds zeros, but in rows "prefilled", which follow the prefill. Rows "mixed" decode together sequences whose lengths are
evenly spread on a logarithmic scale between --mixed_lengths: "packed" one after the other in a pool of rows, and "padded" to
the longest, in batches of --mixed_batches (0: the largest that fits). Bytes of a step: all weights but the embedding, the
cache, states twice. Every row is appended to WORK as it comes; rows that are there are not measured again, so that a run can be
cut and repeated, or its models and lengths be measured one after the other. Prints a table and, last, one JSON line; writes
RESULTS.md and RESULTS.png, also out of rows alone, on any machine: `--models [] --work ROWS`.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from long_decode_models import SPARE, Dense, Hybrid, Row, bandwidth, decode_result
from matplotlib.axes import Axes
from report import device_name, draw_panels, free_memory, line, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.layouts import BASES
from megatron_hylo.kernels.registry import in_words
from megatron_hylo.platform.distributed import is_main, session

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
    mixed_lengths: list[int] = [1024, 262_144],  # noqa: B006
    mixed_batches: list[int] = [64, 0],  # noqa: B006
    minutes: float = 60.0,
    work: Path = Path("long_decode.jsonl"),
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
        mixed_lengths: shortest and longest sequence of a batch of different lengths; hybrids' alone.
        mixed_batches: sequences of such batches, 0 for as many as fit.
        minutes: no measurement is begun that would end after it, as far as can be told.
        work: file of rows, one JSON object a line.
        results: path without suffix of the .md and .png to write.
        commit: of the code, for the rows measured now.
    """
    deadline = time.monotonic() + 60 * minutes
    found = [json.loads(text) for text in work.read_text().splitlines()] if work.is_file() else []
    seen = {_key(row) for row in found}
    with torch.no_grad(), session() if "RANK" in os.environ else contextlib.nullcontext():
        for name in models:
            measured = measure(
                name, lengths, prefill, batch_lengths, piece, steps, largest_batch, mixed_lengths, mixed_batches, deadline, seen
            )
            for row in measured:
                if not is_main():
                    continue
                print(row, flush=True)
                row |= dict(device=device_name(), bandwidth=bandwidth(), commit=commit, kernels=in_words())
                found.append(row)
                with work.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            free_memory()
    if is_main():
        show(found, results)


def _key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["what"], row["tokens"]


def measure(
    name: str, lengths: list[int], prefill: int, batch_lengths: list[int], piece: int, steps: int, largest_batch: int,
    mixed_lengths: list[int], mixed_batches: list[int], deadline: float, seen: set[tuple[Any, ...]],
) -> Iterator[Row]:  # fmt: skip
    """Rows of one model; a length that does not fit in memory is a row with `out_of_memory`."""
    wanted = [(name, "decode", n) for n in lengths] + [(name, "batch", n) for n in batch_lengths]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    reads = "prefill" if ranks == 1 else f"prefill, {ranks} GPUs"
    wanted += [(name, reads, prefill)] if prefill else []
    mixed = [] if name.partition("+")[0] in BASES else [
        (packed, batch, f"mixed, {'packed' if packed else 'padded'}" + ("" if batch else ", largest"))
        for batch in mixed_batches for packed in (True, False)
    ]  # fmt: skip
    wanted += [(name, what, max(mixed_lengths)) for _, _, what in mixed]
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
            if time.monotonic() > deadline:
                return
            rows = [r for r in decode_row(model, "batch", tokens, batch, steps // 2, deadline) if "seconds" in r or batch == 1]
            batch = batch * 3 // 4
        yield from rows or [dict(model=name, what="batch", tokens=tokens, out_of_memory=True)]
    for packed, batch, what in mixed:
        if (name, what, max(mixed_lengths)) not in seen:
            yield from mixed_row(model, what, mixed_lengths, batch, largest_batch, packed, steps // 2, deadline)
    if prefill and (name, reads, prefill) not in seen:
        yield from model.prefill(prefill, piece, steps, deadline)


def spread(shortest: int, longest: int, count: int) -> list[int]:
    """So many lengths, evenly spread on a logarithmic scale."""
    return [round(shortest * (longest / shortest) ** (number / max(count - 1, 1))) for number in range(count)]


def mixed_row(
    model: Hybrid, what: str, ends: list[int], batch: int, most: int, packed: bool, steps: int, deadline: float
) -> Iterator[Row]:
    """Decode a batch of different lengths; 0 sequences: as many as fit."""
    free_memory()
    lengths = functools.partial(spread, min(ends), max(ends))
    batch = batch or model.fitting_mixed(lengths, packed, most)
    total = sum(lengths(batch))

    def cache(tokens: int, batch: int) -> Any:
        return model.mixed_cache(lengths(batch), packed)

    for row in decode_row(model, what, max(ends), batch, steps, deadline, cache):
        if "seconds" in row:  # bytes of a token that is there, padding's included
            row["kv_bytes_per_token"] = row["held_bytes"] / total
        yield row


def decode_row(
    model: Any, what: str, tokens: int, batch: int, steps: int, deadline: float, make: Callable[[int, int], Any] | None = None
) -> Iterator[Row]:
    """Decode after so many tokens, with a cache of `make`; nothing where the minutes are over."""
    if time.monotonic() > deadline:
        print(f"--minutes are over before {what} of {model.name} at {tokens:,}", flush=True)
        return
    free_memory()
    cache: Any = None
    try:
        cache = (make or model.cache)(tokens, batch)
        seconds, about = model.decode(cache, batch, min(steps, SPARE - 8))
    except (torch.OutOfMemoryError, ValueError) as error:
        if isinstance(error, ValueError) and "GiB" not in str(error):
            raise
        yield dict(model=model.name, what=what, tokens=tokens, batch=batch, out_of_memory=True)
        return
    yield decode_result(model, what, tokens, batch, seconds, about)


def show(rows: list[Row], results: Path) -> None:
    """Print and write the table, the picture and the JSON line."""
    if not rows:
        return
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
        f"Bandwidth: {rows[0]['bandwidth'] / 1e12:g} TB/s; a step's floor is its bytes over that.",
        *ratios(rows),
        f"![tokens/s and memory by length]({results.name}.png)",
    ]
    made = dict.fromkeys(f"{r['device']}, commit {r['commit']}" for r in rows)
    report(results, "Prefill and decode by length", intro, COLUMNS, cells, f"{'; '.join(made)}; {rows[0]['kernels']}")
    plot([r for r in rows if "seconds" in r], results.with_suffix(".png"))
    short = [{key: value for key, value in r.items() if key not in ("device", "commit", "kernels")} for r in rows]
    print(json.dumps({"benchmark": "long_decode", "device": rows[0]["device"], "rows": short}))


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
                best = other["batch"] * other["bandwidth"] / (other["gb_a_step"] * 1e9)
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
        axes.set_xticks(lengths, [f"{n / 1024:g}K" if n < 2**20 else f"{n / 2**20:g}M" for n in lengths], rotation=45)
        axes.minorticks_off()
        if axes.lines:
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
