"""Bytes and error of stored teachers, coarse hidden states against the k most likely tokens, on text not fitted on.

    python benchmarks/teacher_store.py                       # about twenty minutes on one CPU core
    python benchmarks/teacher_store.py --windows 64          # on a GPU

KL is of the teacher's full distribution to the one made again from what is stored, nats a token. For the k most likely tokens
(4 bytes an index, 2 a probability) the remaining mass is spread as the mean distribution of the fitted text has it. The teacher
is SmolLM2-135M-Instruct dequantised from 4 bits, the text Debian documentation: fitted on training text from all over it, as
`hylo cache-teacher` does, and measured on held-out text. Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import time
from pathlib import Path

import torch
import zstandard
from jsonargparse import auto_cli
from report import device_name, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.data.artefacts import fetch_documents, fetch_teacher
from megatron_hylo.data.heldout import heldout_windows
from megatron_hylo.data.packed import DocumentStore
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.io import has_manifest
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.frozen import as_frozen
from megatron_hylo.platform.distributed import session
from megatron_hylo.teachers.entropy_coding import compress_block, decompress_block
from megatron_hylo.teachers.hidden_codec import HiddenCodec, fit_axes, fit_step, token_kl
from megatron_hylo.teachers.store import BLOCK
from megatron_hylo.teachers.store_writer import SegmentReader, fit_sample

COLUMNS = ("stored", "bytes a token", "mean KL", "99 % below", "largest", "read, tokens/s")


@torch.no_grad()
def main(
    work: Path = Path("runs/teacher_store"),
    windows: int = 6,
    kls: list[float] = [9e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 2e-1],  # noqa: B006
    top_k: list[int] = [19, 50, 256, 1024],  # noqa: B006
    results: Path = Path("benchmarks/results/teacher_store"),
    commit: str = "",
) -> None:
    """Measure.

    Args:
        work: folder for teacher and data.
        windows: of 2,048 tokens, that are stored.
        kls: wanted mean KL of the codec.
        top_k: kept tokens to compare with.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    with session() as device:
        if not has_manifest(work / "teacher"):
            convert_hf_to_megatron(fetch_teacher(), work / "teacher")
        if not has_manifest(work / "data"):
            preprocess(str(fetch_documents()), str(work / "data"), str(work / "teacher"))
        model = load_model(work / "teacher")
        fitted = fit_sample(SegmentReader(model, DocumentStore(work / "data" / "train"), 2048, 1024, 1)).float()
        ids = heldout_windows(work / "data" / "heldout", 2048, 2 * windows)[-windows:, :-1]
        new = torch.cat([as_frozen(model).hidden_states(window[None].to(device))[:, 0].float() for window in ids])
        head = model.head_weight().detach().float()
    held = torch.arange(len(fitted)) % 16 == 15
    codec = fit_axes(fitted[~held], head)
    rows = [_codec_row(codec, fitted[held], new, head, kl) for kl in kls]
    rows += _top_k_rows(fitted, new, head, top_k)
    cells = [
        (r["stored"], f"{r['bytes']:.0f}", f"{r['kl']:.1e}", f"{r['kl_p99']:.1e}", f"{r['kl_max']:.1e}",
         f"{r['tokens_per_second']:,.0f}" if "tokens_per_second" in r else "")
        for r in rows
    ]  # fmt: skip
    intro = (
        f"SmolLM2-135M-Instruct dequantised from 4 bits (576 wide, 49,152 tokens), fp32, {len(new):,} held-out tokens;\n"
        f"fitted on {len(fitted):,} others. Reading: one thread, from memory, decompressed and put into order."
    )
    how = f"{device_name()}, zstandard {zstandard.__version__}, commit {commit}"
    report(results, "A stored teacher: bytes and error", [intro], COLUMNS, cells, how)
    print(json.dumps({"benchmark": "teacher_store", "device": device_name(), "tokens": len(new), "rows": rows}))


def _codec_row(codec: HiddenCodec, measured: torch.Tensor, new: torch.Tensor, head: torch.Tensor, kl: float) -> dict:
    fit_step(codec, measured, head, kl)
    codes, levels = codec.encode(new, head), codec.levels.cpu().numpy()
    found = token_kl(new, codec.decode(codes), head)
    blocks = [compress_block(part.numpy(), levels) for part in codes.cpu().split(BLOCK)]
    start = time.perf_counter()
    for block in blocks:
        decompress_block(block, levels)
    rate = len(new) / (time.perf_counter() - start)
    return dict(stored=f"hidden states for KL {kl:g}", bytes=sum(map(len, blocks)) / len(new), tokens_per_second=rate) | _kl(
        found
    )


def _top_k_rows(fitted: torch.Tensor, new: torch.Tensor, head: torch.Tensor, counts: list[int]) -> list[dict]:
    parts = fitted[:: max(1, len(fitted) // 1024)].split(128)
    mean = torch.stack([torch.softmax(part @ head.T, -1).mean(0) for part in parts]).mean(0).clamp(min=1e-12)
    found: dict[int, list[torch.Tensor]] = {k: [] for k in counts}
    for part in new[:: max(1, len(new) // 2048)].split(64):
        log_p = torch.log_softmax((part @ head.T).double(), -1)
        for k in counts:
            kept, index = log_p.exp().topk(k, -1)
            rest = mean.double().expand_as(log_p).scatter(1, index, 0.0)
            rest *= (1 - kept.sum(-1, keepdim=True)).clamp(min=1e-12) / rest.sum(-1, keepdim=True)
            again = rest.scatter(1, index, kept)
            found[k].append((log_p.exp() * (log_p - again.log())).sum(-1).float())
    return [dict(stored=f"{k} most likely tokens", bytes=6 * k) | _kl(torch.cat(parts)) for k, parts in found.items()]


def _kl(found: torch.Tensor) -> dict:
    return dict(kl=found.mean().item(), kl_p99=found.quantile(0.99).item(), kl_max=found.max().item())


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
