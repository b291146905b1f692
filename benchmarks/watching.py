"""Measure the cost a step of watching a run: stop signals, hang watch, alarms, straggler report, with real collectives.

    torchrun --standalone --nproc-per-node 8 benchmarks/watching.py --step_ms 250

Steps without work, so that all that is measured is the watching; prints a table and, last, one JSON line. Seconds are of the
main rank: of a clock, which other processes disturb, and of the CPU.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.train_settings import LoggingSettings
from megatron_hylo.platform.distributed import is_main, session
from megatron_hylo.train.alarms import Alarms
from megatron_hylo.train.callback import Progress
from megatron_hylo.train.hang_watch import HangWatch, hosts
from megatron_hylo.train.nan_guard import SkippedSteps
from megatron_hylo.train.pass_timer import PassTimer
from megatron_hylo.train.reporting import Reporter
from megatron_hylo.train.stopping import stop_request
from megatron_hylo.train.stragglers import Stragglers

WARM_UP = 50


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--log_interval", type=int, default=10)
    parser.add_argument("--step_ms", type=float, default=250.0, help="milliseconds of a step of which the share is told")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, session() as device:
        share = [scratch]
        if torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(share)
        run = Path(share[0])
        config = TrainConfig(
            stage="pretrain", data="-", output=str(run), scratch="smollm2-135m", sequence_length=2048, global_batch_size=8,
            train_tokens=(given.steps + WARM_UP) * 8 * 2048, logging=LoggingSettings(given.log_interval, tensorboard=False),
        )  # fmt: skip
        with stop_request(run) as stop:
            measure(given, config, run, device, stop)


def measure(given: argparse.Namespace, config: TrainConfig, run: Path, device: torch.device, stop) -> None:
    """Take steps without work under all watchers."""
    names = hosts()
    timer, reporter = PassTimer(device), Reporter(config, run, device, 1.0, 0)
    hang_watch = HangWatch(run, 900.0, names)
    stragglers = Stragglers(timer, reporter, names)
    alarms = Alarms(run, reporter, lambda first, last: [], 8, lambda step: None)
    progress = Progress(0, 0, SkippedSteps(3))
    stop.starting = False
    clock: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[[], object]) -> None:
        begun, used = time.perf_counter(), time.thread_time()
        function()
        if progress.step > WARM_UP:
            clock[name] += time.perf_counter() - begun
            cpu[name] += time.thread_time() - used

    def marks() -> None:
        with timer.timed():
            pass

    stderr_lines = reporter.say
    reporter.say = lambda message: None  # type: ignore[method-assign]  # what is slow here is no news
    for step in range(1, given.steps + WARM_UP + 1):
        progress.step, progress.consumed, progress.metrics = step, 8 * step, {"loss": 2.0, "gradient_norm": 1.0}
        timed("timer of passes", marks)
        timed("straggler report", lambda: stragglers.after_step(progress))
        timed("hang watch", lambda: hang_watch.after_step(progress))
        timed("alarms", lambda: alarms.after_step(progress))
        timed("agreement on stop and save", lambda: stop.agreed(device))
    reporter.say = stderr_lines  # type: ignore[method-assign]
    hang_watch.close()
    reporter.close()
    if not is_main():
        return
    world = len(names)
    print(f"{world} ranks on {device.type}, {given.steps} steps, straggler report every {given.log_interval}")
    print(f"{'watcher':30} {'ms a step':>10} {'CPU ms':>8} {f'of {given.step_ms:g} ms':>10}")
    for name in clock:
        ms, used = (1e3 * seconds[name] / given.steps for seconds in (clock, cpu))
        print(f"{name:30} {ms:10.4f} {used:8.4f} {100 * ms / given.step_ms:9.3f}%")
    total, used = (1e3 * sum(seconds.values()) / given.steps for seconds in (clock, cpu))
    print(f"{'all':30} {total:10.4f} {used:8.4f} {100 * total / given.step_ms:9.3f}%")
    print(json.dumps({"ranks": world, "device": device.type, "ms": total, "cpu_ms": used, "step_ms": given.step_ms}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        main()
