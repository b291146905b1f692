"""Ranks of a test: calibration and upcycling on several parallel groups.

Started by run_ranks with a JSON file of jobs: ["calibrate", groups, arguments], ["upcycle", {}, settings] or
["sums", {}, {"output": file}].
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_hylo.calibrate import solve
from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.config import ParallelConfig
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.platform.distributed import initialize, shutdown
from megatron_hylo.upcycle.run import upcycle_folder

WINDOWS = 2  # of a micro-batch, so that there are some


def upcycle(arguments: dict) -> None:
    """Upcycle in small micro-batches; OUTPUT.json lists the sha256 of every solution in float64, before it is rounded."""
    hashes, put = [], solve._set

    def noted(projection: torch.nn.Module, weight: torch.Tensor, *place: object) -> None:
        hashes.append(hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest())
        put(projection, weight, *place)

    with mock.patch.object(solve, "_set", noted), mock.patch.object(solve, "micro_batch", lambda _: WINDOWS):
        upcycle_folder(UpcycleConfig(**arguments))
    Path(f"{arguments['output']}.json").write_text(json.dumps(hashes))


def sums(arguments: dict) -> None:
    """Normal equations of numbers of very different size, whose float64 sums depend on their order, to the output."""
    made = uneven_micro_batches()
    share = solve.Share([is_held for is_held, _ in made])
    parts = [{i: made[i][1][place] for i in share.own} for place in range(4)]
    found = solve._normal_equations(share, *parts, torch.empty(3, 5), relative=False)
    if dist.get_rank() == 0:
        torch.save([equations.sums for equations in found], arguments["output"])


def uneven_micro_batches() -> list[tuple[bool, list[torch.Tensor]]]:
    """Whether each is held out; features [2, 1, 5], own, taught and studied [2, 1, 3]."""
    generator = torch.Generator().manual_seed(0)
    return [
        (i > 9, [(10.0**6 if i == 5 else 1.0) * torch.randn(2, 1, size, generator=generator) for size in (5, 3, 3, 3)])
        for i in range(13)
    ]


def main(file: str) -> None:
    """Run the jobs; process groups are made anew in between."""
    launcher = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, (verb, groups, arguments) in enumerate(json.loads(Path(file).read_text())):
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=dist.PrefixStore(f"jobs_{number}", launcher), rank=rank, world_size=ranks)
        parallel = ParallelConfig(**groups)
        initialize(parallel)
        if verb == "calibrate":
            calibrate(**arguments, parallel=parallel)
        else:
            {"upcycle": upcycle, "sums": sums}[verb](arguments)
        shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
