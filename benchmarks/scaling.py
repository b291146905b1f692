"""Stage 3 on 1 to 8 GPUs: a hybrid learns long sequences from an 8B-shaped teacher, under every way to divide the work.

    torchrun --nproc-per-node 8 benchmarks/scaling.py                   # then with 4, 2 and 1, same --work: one table of all
    torchrun --nproc-per-node 8 benchmarks/scaling.py --lengths [262144] --modes [CP]

Whole steps of the training loop, optimizer included, with random weights at real shapes, bf16, activations of all layers
but attention and MLA recomputed. Model FLOPs for MFU: the student's forward and backward and the teacher's forward;
recomputation is not counted. Exposed communication: the part of a step in which a GPU has an NCCL kernel and nothing else to
run, from the profiler. Each measurement is a file in WORK; what is there is not measured again. Prints a table and, last, one
JSON line; writes RESULTS.md and RESULTS.png.
"""

import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from report import architecture, device_name, draw_panels, free_memory, line, random_text, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.io import write_json
from megatron_hylo.kernels.registry import in_use
from megatron_hylo.models.frozen import freeze
from megatron_hylo.models.hylo_model import build_chunks
from megatron_hylo.plan.flops import forward_flops_per_token, peak_flops
from megatron_hylo.platform.distributed import device, initialize, is_main, shutdown
from megatron_hylo.teachers.signal import TeacherSignal
from megatron_hylo.train.loop import training_step
from megatron_hylo.train.nan_guard import SkippedSteps
from megatron_hylo.train.setup import build_run


@dataclass(frozen=True)
class Mode:
    """One way to divide a step over n GPUs."""

    groups: Callable[[int], dict[str, Any]]  # of ParallelConfig, for n GPUs
    sequences: Callable[[int], int]  # of a step
    least: int = 1  # GPUs
    settings: dict[str, Any] = field(default_factory=dict)  # of TrainConfig


CP = Mode(lambda n: dict(context_parallel_size=n), lambda n: 1)
MODES = {
    "CP": CP,
    "CP, FP8 teacher": replace(CP, settings=dict(teacher_precision="fp8")),
    "CP, FP8 teacher and student": replace(CP, settings=dict(teacher_precision="fp8", linear_precision="fp8")),
    "CP, offloaded teacher": replace(CP, settings=dict(teacher_offload=True)),
    "CP, offloaded optimizer": replace(CP, settings=dict(optimizer=OptimizerSettings(offload=True))),
    "CP, latents and states": Mode(lambda n: dict(context_parallel_size=n, cp_comm_type="all_gather"), lambda n: 1, 2),
    "CP, all-to-all": Mode(lambda n: dict(context_parallel_size=n, cp_comm_type="a2a"), lambda n: 1, 2),
    "DP": Mode(lambda n: {}, lambda n: n, 2),
    "TP2 x CP": Mode(
        lambda n: dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=n // 2), lambda n: 1, 2
    ),
    "PP2 x CP": Mode(lambda n: dict(pipeline_model_parallel_size=2, context_parallel_size=n // 2), lambda n: 4, 2),
}
COLUMNS = (
    "layout", "tokens", "GPUs", "mode", "s / step", "tokens/s a GPU", "MFU %", "only comm. %", "received, MB", "peak GiB",
)  # fmt: skip


def main(
    layouts: list[str] = ["llama3.2-1b-4mla12gdn", "llama3.2-1b-4mla12m2", "llama3.2-3b-6mla22gdn"],  # noqa: B006
    teacher: str = "llama3.1-8b",
    lengths: list[int] = [65_536, 131_072],  # noqa: B006
    modes: list[str] = list(MODES),  # noqa: B006
    repeats: int = 2,
    work: Path = Path("runs/scaling"),
    results: Path = Path("benchmarks/results/scaling"),
    commit: str = "",
) -> None:
    """Measure on the ranks there are what is missing in WORK, then show all of it.

    Args:
        layouts: the students; llama3.2-1b is the dense one.
        teacher: base model.
        lengths: tokens of a sequence.
        modes: how to divide: CP (what `auto` chooses), DP and so on.
        repeats: timed steps, after one that is not.
        work: folder of measurements.
        results: path without suffix of the .md and .png to write.
        commit: of the code, for the results file.
    """
    ranks, work = int(os.environ.get("WORLD_SIZE", 1)), work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    unknown = sorted(set(modes) - set(MODES))
    if unknown:
        raise ConfigError(f"mode {unknown[0]!r} is none of {', '.join(MODES)}")
    for layout, length, mode in itertools.product(layouts, lengths, modes):
        data = work / f"data-{ranks}-{length}"  # enough for every step to have other text
        file = work / f"{layout}-{length}-{ranks}-{mode.replace(' ', '_')}.json"
        if ranks < MODES[mode].least or file.is_file():
            continue
        parallel = ParallelConfig(**MODES[mode].groups(ranks))
        config = TrainConfig(
            stage="distil", data=str(data), output="-", model="-", teacher="-", sequence_length=length, parallel=parallel,
            global_batch_size=MODES[mode].sequences(ranks), recompute="GM-", loss_chunk_tokens=4096,
            precision="bf16" if torch.cuda.is_available() else "fp32", **MODES[mode].settings,
        )  # fmt: skip
        with _ranks(parallel, work / f"store-{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{file.stem}"):
            if is_main() and not data.is_dir():
                random_text(data, BASES[teacher].vocab_size, {"train": (1, 8 * length * config.global_batch_size)})
            dist.barrier()
            try:
                row = measure(config, layout, teacher, repeats)
            except ConfigError as error:  # heads that the ranks do not divide
                row = {"refused": str(error)}
            if is_main():
                write_json(file, dict(layout=layout, teacher=teacher, tokens=length, gpus=ranks, mode=mode) | row)
                print(file.name, row, flush=True)
    if int(os.environ.get("RANK", 0)) == 0:
        show([json.loads(file.read_text()) for file in sorted(work.glob("*.json"))], teacher, results, commit)


@contextlib.contextmanager
def _ranks(parallel: ParallelConfig, store: Path) -> Iterator[None]:
    """Process groups of one configuration; another may follow in the same process."""
    if "WORLD_SIZE" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        world = dist.FileStore(str(store), int(os.environ["WORLD_SIZE"]))
        rank, backend = int(os.environ["RANK"]), "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=world, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    initialize(parallel)
    yield
    shutdown()
    free_memory()


def measure(
    config: TrainConfig, layout: str, teacher: str, repeats: int, teacher_signal: TeacherSignal | None = None
) -> dict[str, Any]:
    """Time `repeats` steps, then profile one more.

    Args:
        config: how to train, and its data; models are made with random weights.
        layout: named layout of the student, or a base model.
        teacher: base model of the teacher.
        repeats: timed steps.
        teacher_signal: a teacher that is not on these ranks.

    Returns:
        seconds: median of a step, of the slowest rank; tokens_per_second: of one GPU; mfu; exposed: seconds of rank 0's
        step in which it only communicates; received_mb: by this rank's mixers of the student in a step's forward passes;
        peak_gib: of the fullest rank.
    """
    here, ranks, ours, theirs = device(), dist.get_world_size(), architecture(layout), BASES[teacher]
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    chunks, frozen = build_chunks(ours, config.parallel, dtype, recompute=config.recompute, fp8=config.student_fp8), None
    if teacher_signal is None:
        frozen = freeze(build_chunks(theirs, config.parallel, dtype, fp8=config.teacher_fp8), config.teacher_offload)
    run = build_run(config, here, models=([[chunk.train() for chunk in chunks]], frozen), teacher_signal=teacher_signal)
    batches = run.batches()
    mixers = [mixer.self_attention for chunk in chunks for mixer, _ in chunk.mixer_layers()]

    def step(number: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        training_step(run.states, run.objective, batches, run.micro_batches, number, SkippedSteps(0))
        if here.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step(0)
    before = sum(mixer.context.received_bytes for mixer in mixers)
    seconds = statistics.median(step(1 + i) for i in range(repeats))
    received = (sum(mixer.context.received_bytes for mixer in mixers) - before) / repeats
    exposed = _exposed(lambda: step(1 + repeats)) if here.type == "cuda" else None
    peak = torch.cuda.max_memory_allocated() / 2**30 if here.type == "cuda" else 0.0
    slowest = torch.tensor([seconds, peak], device=here)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    seconds, peak = slowest.tolist()
    tokens = config.global_batch_size * config.sequence_length
    flops = 3 * forward_flops_per_token(ours, config.sequence_length)
    flops += forward_flops_per_token(theirs, config.sequence_length)  # wherever the teacher is
    return dict(
        seconds=seconds, tokens_per_second=tokens / seconds / ranks, mfu=flops * tokens / seconds / ranks / peak_flops(here)[0],
        exposed=exposed, received_mb=received / 1e6, peak_gib=peak, device=device_name(), parallel=asdict(config.parallel),
        sequences=config.global_batch_size,
    )  # fmt: skip


def _exposed(step: Callable[[], Any]) -> float:
    """Seconds of a step in which this GPU runs NCCL's kernels and no other."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
    kernels = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    communication, work = [], []
    for kernel in kernels:
        (communication if kernel.name.startswith("nccl") else work).append((kernel.time_range.start, kernel.time_range.end))
    return (_covered(communication + work) - _covered(work)) / 1e6  # of microseconds


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def show(rows: list[dict[str, Any]], teacher: str, results: Path, commit: str) -> None:
    """Table, plot, results file, JSON line."""
    rows.sort(key=lambda r: (r["layout"], r["tokens"], r["gpus"], list(MODES).index(r["mode"])))
    cells = []
    for r in rows:
        where = (r["layout"], f"{r['tokens']:,}", str(r["gpus"]), r["mode"])
        if "refused" in r:
            cells.append((*where, "refused: heads do not divide", *[""] * 5))
            continue
        exposed = "" if r["exposed"] is None else f"{100 * r['exposed'] / r['seconds']:.1f}"
        cells.append((*where, f"{r['seconds']:.2f}", f"{r['tokens_per_second']:,.0f}", f"{100 * r['mfu']:.1f}", exposed,
                      f"{r['received_mb']:,.0f}", f"{r['peak_gib']:.1f}"))  # fmt: skip
    how = f"{device_name()}, bf16, commit {commit}, {in_use()}"
    intro = [
        f"Teacher {teacher}, random weights, whole training steps with recomputed activations; PP2 has 4 sequences a step, "
        f"DP one a GPU, all else one. Received: by the student's mixers from context-parallel ranks, in forward passes, a GPU.",
        "![tokens/s and MFU by GPUs](scaling.png)",
    ]
    report(results, "Stage 3 over several GPUs", intro, COLUMNS, cells, how)
    measured = [r for r in rows if "refused" not in r]
    plot(measured, results.with_suffix(".png"))
    print(json.dumps({"benchmark": "scaling", "device": device_name(), "rows": rows}))


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw tokens/s a GPU at each length (strong scaling), and MFU where every GPU has as many tokens (weak scaling)."""
    groups = sorted({(r["layout"], r["mode"]) for r in rows})
    by_group = [(group, [r for r in rows if (r["layout"], r["mode"]) == group]) for group in groups]

    def strong(axes: Axes) -> None:
        for (layout, mode), mine in by_group:
            for tokens in sorted({r["tokens"] for r in mine}):
                points = [(r["gpus"], r["tokens_per_second"]) for r in mine if r["tokens"] == tokens]
                axes.plot(*zip(*points), label=f"{layout} {tokens // 1024}K {mode}", **line(len(axes.lines)))
        axes.set(xlabel="GPUs", ylabel="tokens/s a GPU", yscale="log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")

    def weak(axes: Axes) -> None:
        for (layout, mode), mine in by_group:
            for share in sorted({r["tokens"] // r["gpus"] for r in mine if mode.startswith("CP")}):
                points = [(r["gpus"], 100 * r["mfu"]) for r in mine if r["tokens"] // r["gpus"] == share]
                if len(points) > 1:
                    axes.plot(*zip(*points), label=f"{layout} {share // 1024}K a GPU, {mode}", **line(len(axes.lines)))
        axes.set(xlabel="GPUs", ylabel="MFU, %", ylim=(0, None))

    def finished(panel: Callable[[Axes], None], axes: Axes) -> None:
        panel(axes)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if axes.lines:
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))

    draw_panels(file, partial(finished, strong), partial(finished, weak), size=(10, 7))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
