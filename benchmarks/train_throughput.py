"""Tokens a second of training, stage by stage, with random weights at real shapes: the training loop itself, nothing less.

    python benchmarks/train_throughput.py
    python benchmarks/train_throughput.py --layout llama3.2-1b-4mla12gdn --teacher llama3.1-8b --lengths [65536] --batches [1]

Each row is a run of `steps` steps, with and without CUDA graphs; the rate is that of the last half. Prints a table and, last,
one JSON line; writes RESULTS.md.
"""

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from hf_peer import measure_peer
from jsonargparse import auto_cli
from report import architecture, device_name, free_memory, random_text, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.train import CheckpointSettings, LoggingSettings, OptimizerSettings, TrainConfig
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import session
from megatron_hylo.train.loop import train

COLUMNS = ("stage", "sequence", "batch", "CUDA graphs", "tokens/s", "x the peer", "MFU %", "peak GiB")


def main(
    layout: str = "smollm2-135m-8mla22gdn-teacher",
    teacher: str = "smollm2-135m",
    stages: list[str] = ["distil"],  # noqa: B006
    lengths: list[int] = [2048],  # noqa: B006
    batches: list[int] = [8, 16],  # noqa: B006
    cuda_graphs: list[bool] = [False, True],  # noqa: B006
    optimizer: Literal["adamw", "muon"] = "adamw",
    recompute: bool | str = False,
    teacher_precision: Literal["same", "fp8"] = "same",
    linear_precision: Literal["same", "fp8"] = "same",
    peer: bool = False,
    second_layout: str | None = None,
    steps: int = 24,
    results: Path = Path("benchmarks/results/train_throughput"),
    commit: str = "",
) -> None:
    """Measure every combination.

    Args:
        layout: the student; a base model is the dense one, LAYOUT:GGMM... has these mixers.
        teacher: base model.
        stages: of align, distil, pretrain.
        lengths: tokens of a sequence.
        batches: sequences of a step, all in one forward pass.
        cuda_graphs: without and with.
        optimizer: of all runs.
        recompute: activations of every layer, or of those with these symbols.
        teacher_precision, linear_precision: as in training.
        peer: also measure hf_peer.py, and show each row's ratio to it (stages distil and pretrain).
        second_layout: another student that `align` trains from the same teacher pass; also measured alone.
        steps: of a run.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    if peer and layout in BASES:
        raise ConfigError(f"peer needs a hybrid layout, {layout} is a base model; leave peer out")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with session():
            for name, shape in (("student", layout), ("second", second_layout)):
                if shape is not None:
                    save_model(build_model(architecture(shape), params_dtype=torch.bfloat16), folder / name)
            if set(stages) != {"pretrain"}:
                save_model(build_model(BASES[teacher], params_dtype=torch.bfloat16), folder / "teacher")
        whole = (1, 2 * steps * max(batches) * max(lengths))
        random_text(folder / "data", BASES[teacher].vocab_size, {"train": whole, "heldout": whole})
        runs = [(stage, stage, "student", None) for stage in stages]
        if second_layout is not None and "align" in stages:
            runs += [("align, second", "align", "second", None), ("align, both", "align", "student", str(folder / "second"))]
        for number, (run, length, batch, graphs) in enumerate(itertools.product(runs, lengths, batches, cuda_graphs)):
            name, stage, student, second = run
            config = TrainConfig(
                stage=stage, data=str(folder / "data"), output=str(folder / f"run{number}"), model=str(folder / student),
                second_model=second,
                teacher=None if stage == "pretrain" else str(folder / "teacher"), sequence_length=length,
                global_batch_size=batch, micro_batch_size=batch, train_tokens=steps * batch * length, eval_windows=1,
                checkpoint=CheckpointSettings(save_interval=10**9),
                optimizer=OptimizerSettings(name=optimizer, use_distributed_optimizer=optimizer != "muon"),
                logging=LoggingSettings(log_interval=1, tensorboard=False), cuda_graphs=graphs, recompute=recompute,
                teacher_precision=teacher_precision, linear_precision=linear_precision, loss_chunk_tokens=4096,
                precision="bf16" if torch.cuda.is_available() else "fp32",
            )  # fmt: skip
            train(config)
            lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
            found = [line for line in lines if "tokens_per_second" in line][steps // 2 :]
            middle = {key: statistics.median(line[key] for line in found) for key in ("tokens_per_second", "mfu")}
            rows.append(dict(stage=name, sequence=length, batch=batch, cuda_graphs=graphs, **middle,
                             peak_gib=found[-1]["peak_memory_gib"]))  # fmt: skip
            free_memory()
    kernels = in_use()  # the peer's would be named later
    for stage, length, batch in itertools.product(stages, lengths, batches) if peer else ():
        student_of = None if stage == "pretrain" else teacher
        rate, peak = measure_peer(layout, student_of, length, batch, max(steps // 3, 4), bool(recompute))
        for row in rows:
            if (row["stage"], row["sequence"], row["batch"]) == (stage, length, batch):
                row["peer_ratio"] = row["tokens_per_second"] / rate
        rows.append(dict(stage=f"{stage}, peer", sequence=length, batch=batch, cuda_graphs=False, tokens_per_second=rate,
                         peak_gib=peak))  # fmt: skip
        free_memory()
    _show(rows, layout, second_layout, teacher, results, f"{device_name()}, {optimizer}, commit {commit}, {kernels}")


def _show(rows: list[dict[str, Any]], layout: str, second_layout: str | None, teacher: str, results: Path, how: str) -> None:
    cells = [
        (r["stage"], f"{r['sequence']:,}", str(r["batch"]), "yes" if r["cuda_graphs"] else "no",
         f"{r['tokens_per_second']:,.0f}", f"{r['peer_ratio']:.2f}" if "peer_ratio" in r else "",
         f"{100 * r['mfu']:.1f}" if "mfu" in r else "", f"{r['peak_gib']:.1f}")
        for r in rows
    ]  # fmt: skip
    both = f" (second: {second_layout})" if second_layout else ""
    intro = (
        f"{layout}{both} with teacher {teacher}, random weights, the training loop as it is. Peer: transformers modules with "
        f"fla's and mamba_ssm's kernels, fla's fused losses, AdamW in bf16 (hf_peer.py)."
    )
    report(results, "Training throughput", [intro], COLUMNS, cells, how)
    print(json.dumps({"benchmark": "train_throughput", "device": device_name(), "layout": layout, "rows": rows}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
