"""Measure quantised exports of a hybrid beside the model itself: size, perplexity, KL, recall, decode on the CPU; on real text.

    python benchmarks/quantised.py runs/quickstart/export runs/quickstart/data

Each format is exported, rounded to the nearest value or by GPTQ on the dataset's training text, into --work, and loaded by
transformers; exports and rows that are there are not made again. Teacher-forced perplexity and KL to the model on held-out
windows. Recall: a passkey of five digits is told at a depth in held-out text and asked for at the end; share of its tokens that
are the most likely ones, and their mean log-probability. Decode: the model and the quantised one in turn, medians of CPU time.
Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import gc
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from latents import passkey_prompt
from megatron.core.datasets.indexed_dataset import IndexedDataset
from report import device_name, report
from torch import Tensor

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.cli.console import track
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.convert.quantise import export_quantised

COLUMNS = (
    "weights", "rounding", "MB on disk", "of them quantised", "perplexity", "KL to the model", "passkey tokens right",
    "their log-probability", "decode, tokens/s on the CPU",
)  # fmt: skip


@torch.no_grad()
def main(
    model: Path,
    data: Path,
    work: Path = Path("quantised"),
    formats: list[str] = ["fp8", "fp8+gptq", "int8", "int8+gptq", "int4", "int4+gptq"],  # noqa: B006
    calibration_tokens: int = 16384,
    windows: int = 8,
    length: int = 1024,
    trials: int = 8,
    recall_length: int = 2048,
    steps: int = 24,
    threads: int = 1,
    results: Path = Path("benchmarks/results/quantised"),
    commit: str = "",
) -> None:
    """Export and measure each format.

    Args:
        model: hybrid: model folder, checkpoint or exported folder.
        data: dataset folder, whose training text calibrates and whose held-out text is read.
        work: folder of the exports.
        formats: of them; rounded to the nearest value, or with +gptq on text.
        calibration_tokens: for GPTQ.
        windows, length: of held-out text, and tokens of each.
        trials, recall_length: passkeys, at depths spread over so many tokens of text.
        steps: measured decode steps, after `length` tokens.
        threads: of torch.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    hybrid, tokenizer = open_model(model)
    text = IndexedDataset(str(data / "heldout"))
    stream = torch.cat([torch.as_tensor(document).long() for document in text])
    texts = stream[: windows * length].view(windows, length)
    prompts = [
        passkey_prompt(tokenizer, stream[windows * length + i * recall_length :][: recall_length - 64], (i + 0.5) / trials, i)
        for i in range(trials)
    ]
    file = work / "rows.jsonl"
    seen = {row["format"]: row for row in map(json.loads, file.read_text().splitlines() if file.is_file() else [])}
    own = [hybrid(ids[None]).logits[0, :-1].float().log_softmax(-1) for ids in texts]
    if "" not in seen:
        seen[""] = row = dict(format="", weights=str(hybrid.dtype).removeprefix("torch."), rounding="", size=size(model),
                              **quality(hybrid, own, texts, prompts))  # fmt: skip
        keep(file, row)
    for given in (g for g in formats if g not in seen):
        name, _, method = given.partition("+")
        folder = work / given
        if not folder.exists():
            start = time.perf_counter()
            export_quantised(model, folder, name, data if method else None, calibration_tokens, track=track)  # type: ignore[arg-type]
            print(f"{folder}: {time.perf_counter() - start:.0f} s", flush=True)
        quantised, _ = open_model(folder)
        seen[given] = row = dict(
            format=given, weights=name, rounding="GPTQ" if method else "nearest", size=size(folder), quantised=packed(folder),
            **quality(quantised, own, texts, prompts), **decode(quantised, hybrid, texts[:1], steps),
        )  # fmt: skip
        keep(file, row)
        del quantised
        gc.collect()
    rows = [seen[given] for given in ("", *formats)]
    rows[0]["rate"] = statistics.median(row["own_rate"] for row in rows[1:])
    cells = [
        (r["weights"], r["rounding"], f"{r['size'] / 1e6:.0f}", f"{r['quantised'] / 1e6:.0f}" if "quantised" in r else "",
         f"{r['perplexity']:.3f}", f"{r['kl']:.2e}", f"{r['passkey']:.2f}", f"{r['passkey_log_probability']:.3f}",
         f"{r['rate']:.1f}")
        for r in rows
    ]  # fmt: skip
    intro = [
        f"{windows} held-out windows of {length:,} tokens; {trials} passkeys in {recall_length:,} tokens; GPTQ on "
        f"{calibration_tokens:,} tokens of training text; decode after {length:,} tokens, medians of {steps} steps."
    ]
    report(results, "Quantised exports", intro, COLUMNS, cells, f"{device_name()}, commit {commit or 'not given'}")
    print(json.dumps({"benchmark": "quantised", "rows": rows}))


def keep(file: Path, row: dict[str, Any]) -> None:
    """Append a row to the file of rows."""
    with file.open("a") as opened:
        print(json.dumps(row), file=opened)
    print(row, flush=True)


def size(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".distcp", ".bin"))


def packed(folder: Path) -> int:
    """Bytes of quantised weights with their scales."""
    from safetensors import safe_open

    found = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            stems = {name.removesuffix("_scale") for name in names if name.endswith(".weight_scale")}
            found += sum(
                tensors.get_tensor(n).nbytes for n in names if any(n in (s, f"{s}_scale", f"{s}_packed") for s in stems)
            )
    return found


def quality(model: Any, own: list[Tensor], texts: Tensor, prompts: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Perplexity, KL to log-probabilities `own`, and recall."""
    loss = kl = right = log_probability = 0.0
    for ids, expected in zip(texts, own):
        log_p = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        loss -= float(log_p.gather(1, ids[1:, None]).mean()) / len(texts)
        kl += float((expected.exp() * (expected - log_p)).sum(-1).mean()) / len(texts)
    for ids, answer in prompts:
        log_p = model(torch.cat([ids, answer])[None], logits_to_keep=len(answer) + 1).logits[0, :-1].float().log_softmax(-1)
        right += float((log_p.argmax(-1) == answer).float().mean()) / len(prompts)
        log_probability += float(log_p.gather(1, answer[:, None]).mean()) / len(prompts)
    return dict(perplexity=math.exp(loss), kl=kl, passkey=right, passkey_log_probability=log_probability)


def decode(model: Any, reference: Any, ids: Tensor, steps: int) -> dict[str, float]:
    """Tokens/s of one-token steps after a prompt [1, tokens], of the model and of the reference in turn."""
    models = {"rate": model, "own_rate": reference}
    caches = {key: m(ids, use_cache=True, logits_to_keep=1).past_key_values for key, m in models.items()}
    times: dict[str, list[float]] = {key: [] for key in models}
    for _ in range(steps + 2):
        for key, m in models.items():
            start = time.process_time()
            m(ids[:, -1:], past_key_values=caches[key], use_cache=True)
            times[key].append(time.process_time() - start)
    return {key: 1 / statistics.median(values[2:]) for key, values in times.items()}


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
