"""Ranks of a test: `calibrate` on several parallel groups. Started by run_ranks with a JSON file of [groups, arguments]."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.config import ParallelConfig
from megatron_hylo.platform.distributed import initialize, shutdown


def main(file: str) -> None:
    """Run the calibrations; process groups are made anew in between."""
    launcher = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, (groups, arguments) in enumerate(json.loads(Path(file).read_text())):
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=dist.PrefixStore(f"jobs_{number}", launcher), rank=rank, world_size=ranks)
        parallel = ParallelConfig(**groups)
        initialize(parallel)
        calibrate(**arguments, parallel=parallel)
        shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
