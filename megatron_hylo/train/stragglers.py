"""Straggler report: which rank takes longest, by phase of a step, and by how much.

Ranks of a synchronous step all end it together, so each times what it does before it waits for the others: reading its
batches, and its forward and backward passes until gradients are reduced. Ranks that share a copy of the model wait for each
other inside the passes as well; a matrix product of each rank's own, at logged steps, tells a slow GPU from its neighbours.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from megatron_hylo.platform.distributed import is_main
from megatron_hylo.platform.node_check import CPU_SLOW, SLOW
from megatron_hylo.train.callback import Callback, Progress
from megatron_hylo.train.pass_timer import PassTimer
from megatron_hylo.train.reporting import Reporter

DATA, PASSES, PRODUCT = "data", "passes", "product"
PHASES = {DATA: "reading batches", PASSES: "forward and backward passes", PRODUCT: "a matrix product alone"}
SHARE = 0.02  # of a step; what costs less is not told
RECORDS = 3  # in a row with the same slowest rank before it is told
PRODUCT_SIZE = {"cuda": 2048, "cpu": 128}
SLACK = {PRODUCT: {"cuda": SLOW, "cpu": CPU_SLOW}}  # times the median; a CPU's cores are shared


class Stragglers(Callback):
    """Adds the slowest rank of each phase to a logged step's metrics; names one that stays slow.

    Args:
        timer: of this rank's passes.
        reporter: tells of a slow rank, and has the batches; acts after this callback.
        hosts: name of each rank's host; more than one.
    """

    def __init__(self, timer: PassTimer, reporter: Reporter, hosts: Sequence[str]) -> None:
        self.timer, self.reporter, self.device, self.hosts = timer, reporter, reporter.device, hosts
        self.waited = 0.0  # for batches, until the last record
        self.last = (time.perf_counter(), -1)
        self.in_a_row: dict[str, tuple[int, int]] = {}  # phase: (rank, records)

    def after_step(self, progress: Progress) -> None:
        """Compare the ranks at logged steps."""
        if not self.reporter.config.is_logged(progress.step):
            return
        now, (then, step) = time.perf_counter(), self.last
        passes, before = self.timer.take(), self.waited
        if self.reporter.batches is not None:
            self.waited = self.reporter.batches.waited
        self.last = (now, progress.step)
        if step < 0:  # kernels are compiled in a start's first steps
            return
        steps = progress.step - step
        mine = [(self.waited - before) / steps, passes / steps, product_seconds(self.device)]
        gathered = [torch.empty(len(mine), device=self.device) for _ in self.hosts]
        torch.distributed.all_gather(gathered, torch.tensor(mine, device=self.device))
        if not is_main():
            return
        table = torch.stack(gathered).T.tolist()
        for phase, seconds in zip(PHASES, table, strict=True):
            slowest = max(range(len(seconds)), key=seconds.__getitem__)
            progress.metrics |= {f"slowest/{phase}_rank": float(slowest), f"slowest/{phase}_seconds": seconds[slowest],
                                 f"slowest/{phase}_median": statistics.median_low(seconds)}  # fmt: skip
            self._tell(progress.step, phase, seconds, (now - then) / steps)

    def _tell(self, step: int, phase: str, seconds: Sequence[float], step_seconds: float) -> None:
        """Say once that a rank is slow, when it has been the slowest, and slow, in the last records."""
        rank = slow_rank(phase, seconds, step_seconds, self.device.type)
        before, records = self.in_a_row.get(phase, (-1, 0))
        if rank is None:
            self.in_a_row.pop(phase, None)
            return
        records = records + 1 if rank == before else 1
        self.in_a_row[phase] = (rank, records)
        if records == RECORDS:
            median = statistics.median_low(seconds)
            self.reporter.say(
                f"step {step}: rank {rank} on {self.hosts[rank]} is slow in {PHASES[phase]}: {1e3 * seconds[rank]:.3g} ms, "
                f"the median of all ranks is {1e3 * median:.3g}, and a step takes {1e3 * step_seconds:.3g}"
            )


def slow_rank(phase: str, seconds: Sequence[float], step_seconds: float, device: str) -> int | None:
    """The slowest rank of a phase, if it holds up the others; else None.

    Args:
        phase: one of `PHASES`.
        seconds: of each rank, a step; of the product, one product.
        step_seconds: of a whole step.
        device: "cuda" or "cpu".
    """
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    median = statistics.median_low(seconds)  # of two ranks the faster
    if seconds[rank] <= SLACK.get(phase, {}).get(device, SLOW) * median:
        return None
    return rank if phase == PRODUCT or seconds[rank] - median > SHARE * step_seconds else None


def product_seconds(device: torch.device) -> float:
    """Seconds of a product of square matrices on this rank alone, in its fast precision."""
    size, dtype = PRODUCT_SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(3):  # the first may pay for a library's start
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)
