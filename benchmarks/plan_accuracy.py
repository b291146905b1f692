"""Predictions of `hylo plan` beside what was measured: time of a step and peak memory of the rows of benchmarks/results.

    python benchmarks/plan_accuracy.py                 # no GPU: reads the results files of this folder

Three constants of megatron_hylo/plan/rates.yaml were fitted to steps (`elementwise`, `elementwise_frozen`, `link`) and one
pair to short ones (`launch`): to the rows of `FITTED`, newest code on H200s, two of them on four GPUs. Constants of memory
were chosen beside the rows that plan/memory.py lists. Every configuration that is none of these is held out, whatever the
commit; older code was slower. Prints a table and, last, one JSON line; writes RESULTS.md and RESULTS.png.
"""

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.axes import Axes
from report import architecture, draw_panels, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ParallelConfig
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.eval.theme import LIGHT
from megatron_hylo.plan.hardware import get_hardware
from megatron_hylo.plan.inference import serving
from megatron_hylo.plan.memory import GIB, estimate_memory
from megatron_hylo.plan.step import step_time

HERE = Path(__file__).parent / "results"
HYBRID, SMALL = "llama3.2-1b-4mla12gdn", "smollm2-135m-8mla22gdn-teacher"
TABLES = {  # of scaling.md, in order: (recompute, GPU)
    "scaling.md": [
        (True, "h200-141gb"),
        (True, "h200-141gb"),
        ("GM-", "h200-141gb"),
        ("GM-", "h200-141gb"),
        ("GM-", "h200-141gb"),
        ("GM-", "h200-141gb"),
        None,  # goals
        None,  # losses
        (True, "h100-80gb"),
    ],
}
FITTED = {  # (name of `Row`), of step times
    f"{HYBRID} 65,536 1 CP, aaebad2", f"{HYBRID} 32,768 1 CP, aaebad2", "llama3.2-1b-4mla12m2 65,536 1 CP, aaebad2",
    f"{HYBRID} 131,072 4 CP, aaebad2", f"{HYBRID} 131,072 4 TP2 x CP, aaebad2", "hybrid 4,096, lengths", "dense 4,096, lengths",
    f"{HYBRID} 65,536 pretrain G-",
}  # fmt: skip
MEMORY_KNOWN = {  # peaks beside which plan/memory.py's constants were chosen, of the rows below
    (HYBRID, 65_536, 1, 59.8), (HYBRID, 65_536, 1, 59.9), (HYBRID, 65_536, 1, 53.3), (HYBRID, 131_072, 2, 50.1),
    (HYBRID, 131_072, 4, 40.6), (HYBRID, 131_072, 8, 36.0), (HYBRID, 65_536, 1, 43.2), (HYBRID, 262_144, 4, 49.5),
    (HYBRID, 131_072, 1, 70.0), ("llama3.2-3b-6mla22gdn", 131_072, 4, 70.8), (HYBRID, 65_536, 1, 64.6),
    (HYBRID, 65_536, 1, 59.5), (HYBRID, 65_536, 1, 55.0),  # what FP8 copies take
    (HYBRID, 131_072, 4, 27.4), (HYBRID, 131_072, 4, 28.9),  # after which sequence parallelism was counted
    (HYBRID, 131_072, 4, 43.4), (HYBRID, 131_072, 8, 37.4), ("llama3.2-1b-4mla12m2", 65_536, 1, 62.0),
    ("llama3.2-1b-4mla12m2", 131_072, 4, 42.4), (SMALL, 2048, 1, 17.0), (SMALL, 2048, 1, 52.1), (HYBRID, 65_536, 1, 49.6),
    (HYBRID, 65_536, 1, 81.9), (HYBRID, 65_536, 1, 57.7), ("llama3.2-3b-6mla22gdn", 131_072, 4, 75.6),
    (f"{HYBRID}:{'G' * 16}", 262_144, 1, 51.2), (f"llama3.2-1b-4mla12m2:{'M' * 16}", 262_144, 1, 48.0),
}  # fmt: skip
COLUMNS = ("configuration", "s / step", "predicted", "off %", "peak GiB", "predicted", "off %", "fitted")


@dataclass(frozen=True)
class Row:
    """One measured configuration.

    Args:
        name: what it is called in the table.
        layout, teacher: as `report.architecture` takes them.
        config: of the run.
        gpus: number of them.
        hardware: their kind.
        seconds: of a step.
        peak: GiB of the fullest rank.
    """

    name: str
    layout: str
    teacher: str | None
    config: TrainConfig
    gpus: int
    hardware: str
    seconds: float
    peak: float

    @property
    def key(self) -> str:
        """Configuration, whatever the commit and the kind of GPU."""
        return f"{self.layout} {self.teacher} {self.gpus} {self.config}"


def main(results: Path = HERE / "plan_accuracy") -> None:
    """Compare all rows.

    Args:
        results: path without suffix of the .md and .png to write.
    """
    measured = measured_rows()
    timed = {row.key for row in measured if row.name in FITTED}
    weighed = {row.key for row in measured if (row.layout, row.config.sequence_length, row.gpus, row.peak) in MEMORY_KNOWN}
    rows = [compare(row, row.key in timed, row.key in weighed) for row in measured]
    cells = [
        (r["name"], f"{r['seconds']:.3g}", f"{r['predicted']:.3g}", f"{r['time_off']:+.1f}", f"{r['peak']:.1f}",
         f"{r['predicted_peak']:.1f}", f"{r['memory_off']:+.1f}",
         " and ".join(name for name in ("time", "memory") if r[f"{name}_fitted"]) or "none")
        for r in rows
    ]  # fmt: skip
    found = {name: summary(rows, name) for name in ("time", "memory")}
    lines = [describe(name, found[name]) for name in found]
    inference = inference_rows()
    intro = [
        "`hylo plan`'s predictions beside the measured steps of scaling.md, lengths.md and train_throughput.md. The last "
        "column says which figure of a configuration had a part in the constants, at whatever commit; what it does not name is "
        "held out. Rows of older code (ec05ff4, e528ec7, H100) are predicted as newer ones.",
        "What is held out had no part in a number, but was in view when the form was chosen: a constant of its own for a "
        "teacher's layers came after the rows without a teacher and of 135M were seen to fit without it. `latents and states` "
        "of ec05ff4 and e528ec7 left ranks waiting for the last one (scaling.md), which newer code does not.",
        *lines,
        "Inference of the 3B hybrid on one H200 (long_decode.md; `dense` is transformers' model). No number was fitted to it; "
        "that a prefill is more than products and attention was seen here first.",
        "\n".join(
            [
                "| what | tokens | measured | predicted | off % |",
                "|---|---|---|---|---|",
                *(
                    f"| {r['what']} | {r['tokens']:,} | {r['measured']:,.4g} | {r['predicted']:,.4g} | {r['off']:+.1f} |"
                    for r in inference
                ),
            ]
        ),
        "![predicted against measured](plan_accuracy.png)",
    ]
    report(results, "Predicted and measured", intro, COLUMNS, cells, "no GPU")
    draw(rows, results.with_suffix(".png"))
    for row in rows:
        del row["configuration"]
    print(json.dumps({"benchmark": "plan_accuracy", **found, "rows": rows, "inference": inference}))


def inference_rows() -> list[dict[str, Any]]:
    """Prefill and decoding of long_decode.md, seconds, and its largest batch, beside their predictions."""
    (_, measured), gpu = next(tables(HERE / "long_decode.md")), get_hardware("h200-141gb")
    rows = []
    for row in measured:
        dense, length = row["model"] in BASES, int(_number(row["tokens"]))
        if (
            row["what"] not in ("decode", "prefill", "batch")
            or "+" in row["model"]  # in 8 bits
            or "memory" in row["seconds"]
            or (dense and row["what"] == "decode")
        ):
            continue
        (found,) = serving(architecture(row["model"]), gpu, [length])
        predicted = {"decode": 1 / max(found.one, 1e-9), "prefill": found.prefill_seconds, "batch": found.batch}[row["what"]]
        value = _number(row["batch" if row["what"] == "batch" else "seconds"])
        what = {"decode": "a token, s", "prefill": "prefill, s", "batch": "largest batch"}[row["what"]]
        rows.append(dict(what=f"{'dense' if dense else 'hybrid'}, {what}", tokens=length, measured=value, predicted=predicted,
                         off=100 * (predicted / value - 1)))  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Errors of the rows that were not fitted to: number, median, largest, within the bound that is wanted, and the misses."""
    bound = {"time": 15.0, "memory": 8.0}[what]
    held = [row for row in rows if not row[f"{what}_fitted"]]
    errors = [abs(row[f"{what}_off"]) for row in held]
    misses = [row["name"] for row, error in zip(held, errors) if error > bound]
    others = [row["name"] for row in rows if row[f"{what}_fitted"] and abs(row[f"{what}_off"]) > bound]
    return dict(
        rows=len(held), configurations=len({row["configuration"] for row in held}), median=round(statistics.median(errors), 1),
        largest=round(max(errors), 1), bound=bound, within=len(held) - len(misses), misses=misses, fitted_misses=others,
    )  # fmt: skip


def describe(what: str, found: dict[str, Any]) -> str:
    """Say a summary in a sentence."""
    name = {"time": "Time of a step", "memory": "Peak memory"}[what]
    missed = f" Misses: {'; '.join(found['misses'])}." if found["misses"] else ""
    missed += f" Fitted and still missed: {'; '.join(found['fitted_misses'])}." if found["fitted_misses"] else ""
    return (
        f"{name}: {found['within']} of {found['rows']} held-out rows ({found['configurations']} configurations) "
        f"within {found['bound']:g} %, median {found['median']} %, "
        f"largest {found['largest']} %.{missed}"
    )


def compare(row: Row, time_fitted: bool, memory_fitted: bool) -> dict[str, Any]:
    """Predict one row; the flags say whether constants were fitted to its configuration."""
    ours, theirs = architecture(row.layout), BASES[row.teacher] if row.teacher else None
    time = step_time(row.config, row.gpus, ours, theirs, get_hardware(row.hardware))
    memory = estimate_memory(row.config, row.gpus, [ours], [theirs] if theirs else []).allocated / GIB
    return dict(
        name=row.name, seconds=row.seconds, predicted=time.seconds, time_off=100 * (time.seconds / row.seconds - 1),
        peak=row.peak, predicted_peak=memory, memory_off=100 * (memory / row.peak - 1),
        time_fitted=time_fitted, memory_fitted=memory_fitted, terms=time.terms, configuration=row.key,
    )  # fmt: skip


def measured_rows() -> list[Row]:
    """Rows of all results files."""
    return [*_scaling(), *_lengths(), *_throughput()]


def tables(file: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Tables of a results file: the text before each, and its rows by column."""
    before: list[str] = []
    lines = iter(file.read_text().splitlines())
    for line in lines:
        if not line.startswith("|"):
            before.append(line)
            continue
        columns, rows = _cells(line), []
        next(lines)
        for row in lines:
            if not row.startswith("|"):
                break
            rows.append(dict(zip(columns, _cells(row))))
        yield "\n".join(before), rows
        before = []


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]


def _number(cell: str) -> float:
    return float(cell.replace(",", ""))


def settings(stage: str, length: int, batch: int = 1, micro: int = 1, **others: Any) -> TrainConfig:
    """Settings of a measured run."""
    return TrainConfig(
        stage, data="-", output="-", model="-", teacher=None if stage == "pretrain" else "-", sequence_length=length,
        global_batch_size=batch, micro_batch_size=micro, loss_chunk_tokens=4096, **others,
    )  # fmt: skip


def _scaling() -> Iterator[Row]:
    for about, (before, rows) in zip(TABLES["scaling.md"], tables(HERE / "scaling.md")):
        if about is None:
            continue
        recompute, gpu = about
        commits = re.findall(r"^Commit (\w{7})", before, re.MULTILINE) or re.findall(r"commit (\w{7})", before)
        for row in rows:
            mode, n, length = row["mode"], int(row["GPUs"]), int(_number(row["tokens"]))
            batch = {"DP": n, "PP2 x CP": 4}.get(mode, 1)
            parallel = ParallelConfig(
                tensor_model_parallel_size=2 if mode.startswith("TP2") else 1, sequence_parallel=mode.startswith("TP2"),
                pipeline_model_parallel_size=2 if mode.startswith("PP2") else 1,
                context_parallel_size=1 if mode == "DP" else n // 2 if mode[:3] in ("TP2", "PP2") else n,
                cp_comm_type="all_gather" if "latents" in mode else "a2a" if "all-to-all" in mode else "auto",
            )  # fmt: skip
            more: dict[str, Any] = dict(teacher_precision="fp8") if "FP8" in mode else {}
            more |= dict(linear_precision="fp8") if "student" in mode else {}
            more |= dict(teacher_offload=True) if "offloaded teacher" in mode else {}
            more |= dict(optimizer=OptimizerSettings(offload=True)) if "offloaded optimizer" in mode else {}
            config = settings("distil", length, batch, recompute=recompute, parallel=parallel, **more)
            name = f"{row['layout']} {row['tokens']} {n} {mode}, {'H100' if 'h100' in gpu else commits[0]}"
            yield Row(name, row["layout"], "llama3.1-8b", config, n, gpu, _number(row["s / step"]), _number(row["peak GiB"]))


def _lengths() -> Iterator[Row]:
    ((_, rows),) = tables(HERE / "lengths.md")
    for row in rows:
        if "peer" not in row["model"]:
            layout = HYBRID if row["model"] == "hybrid" else "llama3.2-1b"
            config = settings("distil", int(_number(row["tokens"])), recompute=True)
            seconds = _number(row["tokens"]) / _number(row["tokens/s"])
            name = f"{row['model']} {row['tokens']}, lengths"
            yield Row(name, layout, "llama3.1-8b", config, 1, "h200-141gb", seconds, _number(row["peak GiB"]))


def _throughput() -> Iterator[Row]:
    (_, batches), _, (_, long), (_, first), *_ = tables(HERE / "train_throughput.md")
    for row in batches:
        if "peer" not in row["stage"]:
            length, batch = int(_number(row["sequence"])), int(row["batch"])
            config = settings("distil", length, batch, batch, cuda_graphs=True)
            seconds = length * batch / _number(row["tokens/s"])
            yield Row(
                f"135M, {batch} x 2,048", SMALL, "smollm2-135m", config, 1, "h200-141gb", seconds, _number(row["peak GiB"])
            )
    for row in long:
        if "pretrain" in row[""]:
            recompute = re.findall(r"--recompute (\S+?)`? ", row[""] + " ")[0].strip("`")
            fp8: dict[str, Any] = dict(linear_precision="fp8") if "fp8" in row[""] else {}
            config = settings("pretrain", 65_536, recompute=recompute, **fp8)
            seconds = 65_536 / _number(row["tokens/s"])
            name = f"{HYBRID} 65,536 pretrain {recompute}{' FP8' if fp8 else ''}"
            yield Row(name, HYBRID, None, config, 1, "h200-141gb", seconds, _number(row["peak GiB"]))
    for row in first:
        if row[""] != "both":
            layout = f"{HYBRID}:{'G' * 16}" if "Gated" in row[""] else f"llama3.2-1b-4mla12m2:{'M' * 16}"
            seconds = 262_144 / _number(row["tokens/s"])
            config = settings("align", 262_144)
            yield Row(
                f"align {row['']} 262,144", layout, "llama3.2-1b", config, 1, "h200-141gb", seconds, _number(row["peak GiB"])
            )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Scatter plots of predicted against measured: time and memory."""

    def panel(axes: Axes, what: str, measured: str, predicted: str, bound: float, unit: str) -> None:
        for fitted, label, marker in ((False, "held out", "o"), (True, "fitted", "x")):
            mine = [row for row in rows if row[f"{what}_fitted"] == fitted]
            axes.plot([r[measured] for r in mine], [r[predicted] for r in mine], marker, label=label,
                      color=LIGHT.series[fitted], markersize=5)  # fmt: skip
        ends = [0.8 * min(row[measured] for row in rows), 1.25 * max(row[measured] for row in rows)]
        axes.plot(ends, ends, color=LIGHT.muted, linewidth=1)
        axes.fill_between(ends, [e * (1 - bound / 100) for e in ends], [e * (1 + bound / 100) for e in ends],
                          color=LIGHT.grid, alpha=0.6, label=f"within {bound:g} %")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}")
        axes.legend()

    draw_panels(
        file,
        lambda axes: panel(axes, "time", "seconds", "predicted", 15, "s a step"),
        lambda axes: panel(axes, "memory", "peak", "predicted_peak", 8, "GiB"),
        size=(10, 4.6),
    )


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
