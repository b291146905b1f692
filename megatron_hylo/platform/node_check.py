"""Node check: half a minute before a long run, in which every rank shows that it is there, right and as fast as the others.

A rank is compared with the median of all: its matrix products, the all-reduce of its node's ranks, its clock. Then all ranks
reduce one tensor, whose sum is known.
"""

import os
import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hylo.config import RunFailure
from megatron_hylo.platform.distributed import device as own_device
from megatron_hylo.platform.distributed import is_timeout

SLOW = 1.3  # times the median: a GPU that is throttled, shared or badly connected
CPU_SLOW = 4.0  # cores are shared and no measure of a node
CLOCK_SECONDS = 5.0  # tokens of services, and the order of records, suffer beyond it
PRODUCT = {"cuda": 8192, "cpu": 512}
MEBIBYTES = {"cuda": 256, "cpu": 1}


@dataclass
class RankCheck:
    """Measurements of one rank: seconds of one product and of one all-reduce."""

    rank: int
    host: str
    device: str
    devices: int  # that the host shows
    local_ranks: int
    clock: float  # seconds since 1970, after a barrier
    product: float
    product_error: float
    node_reduce: float
    reduce: float = 0.0


def check_nodes() -> tuple[list[RankCheck], list[str]]:
    """Measure all ranks; all of them call it, in an initialised process group.

    Returns:
        (what each rank found, problems, each naming rank and host), the same on every rank.

    Raises:
        RunFailure: the ranks do not reach each other; says which host waited.
    """
    device = own_device()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        torch.distributed.barrier()
        clock = time.time()
        product, error = _product(device)
        group = _node_group(local)
        found = RankCheck(
            torch.distributed.get_rank(), socket.gethostname(), _name(device), torch.cuda.device_count(), local, clock, product,
            error, _reduce(device, group)[0],
        )  # fmt: skip
        found.reduce, total = _reduce(device, None)
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, (found, total))
    except RuntimeError as error_:
        if not is_timeout(error_):
            raise
        raise RunFailure(
            f"rank {torch.distributed.get_rank()} on {socket.gethostname()} waited in vain for another rank: "
            f"{' '.join(str(error_).split())[:200]}"
        ) from error_
    return [rank for rank, _ in ranks], judge([rank for rank, _ in ranks], [total for _, total in ranks])


def judge(ranks: list[RankCheck], sums: list[float]) -> list[str]:
    """Problems of the ranks, each in a sentence that names rank and host.

    Args:
        ranks: what each found.
        sums: what each got as the sum of all rank numbers, counted from 1.
    """
    problems = []
    right = len(ranks) * (len(ranks) + 1) / 2
    medians = {name: statistics.median(getattr(rank, name) for rank in ranks) for name in ("product", "node_reduce", "clock")}
    devices = statistics.mode(rank.devices for rank in ranks)
    for rank, total in zip(ranks, sums):
        who, limit = f"rank {rank.rank} on {rank.host}", SLOW if rank.devices else CPU_SLOW
        if total != right:
            problems.append(f"{who} got {total:g} as the sum over all ranks, which is {right:g}")
        if rank.product_error > 0.02:
            problems.append(f"{who} multiplies matrices wrongly: an error of {rank.product_error:.1e}")
        for name, what in (("product", "matrix product"), ("node_reduce", "all-reduce inside its node")):
            seconds, median = getattr(rank, name), medians[name]
            if seconds > limit * median:
                problems.append(f"{who} is slow: {what} {1e3 * seconds:.1f} ms, the median is {1e3 * median:.1f}")
        if abs(rank.clock - medians["clock"]) > CLOCK_SECONDS:
            problems.append(f"{who}: its clock differs by {rank.clock - medians['clock']:.0f} s; synchronise it")
        if rank.devices != devices:
            problems.append(f"{who} sees {rank.devices} GPUs, most hosts {devices}")
        elif rank.devices and rank.local_ranks > rank.devices:
            problems.append(f"{who}: {rank.local_ranks} ranks share {rank.devices} GPUs")
    return problems


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product(device: torch.device) -> tuple[float, float]:
    """(median seconds of a product of square matrices, its error against the sums of rows)."""
    size, dtype = PRODUCT[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(1)
    a = torch.randint(-2, 3, (size, size), generator=generator, device=device).to(dtype)
    b = torch.randint(-2, 3, (size, size), generator=generator, device=device).to(dtype)
    times = []
    for _ in range(30):
        _synchronize(device)
        begun = time.perf_counter()
        product = a @ b
        _synchronize(device)
        times.append(time.perf_counter() - begun)
    wanted = a.float() @ b.float().sum(1)
    error = (product.float().sum(1) - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
    return statistics.median(times[5:]), float(error)


def _node_group(local: int) -> Any:
    """Process group of this node's ranks; all ranks make all groups."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    groups = [torch.distributed.new_group(range(first, min(first + local, world))) for first in range(0, world, local)]
    return groups[rank // local]


def _reduce(device: torch.device, group: Any) -> tuple[float, float]:
    """(median seconds of an all-reduce, the sum of all rank numbers from 1)."""
    numbers = MEBIBYTES[device.type] * 2**20 // 4
    times, tensor = [], torch.empty(0)
    for _ in range(10):
        tensor = torch.full((numbers,), torch.distributed.get_rank() + 1.0, device=device)
        _synchronize(device)
        begun = time.perf_counter()
        torch.distributed.all_reduce(tensor, group=group)
        _synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:]), float(tensor[-1].item())
