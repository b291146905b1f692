"""Ranks of a test, started by run_ranks with a run's settings and what rank 1 is slow in: "data" or "passes"."""

import json
import sys
import time
from pathlib import Path

from megatron_hylo.config import from_dict
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.io import main_first
from megatron_hylo.platform.distributed import is_main, rank, session
from megatron_hylo.train import data_loader
from megatron_hylo.train.loop import train
from megatron_hylo.train.objectives import Objective


def late(function):
    """The function, 50 ms later on rank 1."""

    def slow(*arguments, **named):
        time.sleep(0.05 * (rank() == 1))
        return function(*arguments, **named)

    return slow


def late_batches(function):
    """The generator, each of its batches 50 ms later on rank 1."""

    def slow(*arguments):
        for batch in function(*arguments):
            time.sleep(0.05 * (rank() == 1))
            yield batch

    return slow


if __name__ == "__main__":
    file, phase = Path(sys.argv[1]), sys.argv[2]
    config = from_dict(TrainConfig, json.loads(file.read_text()), "settings")
    if phase == "data":
        data_loader._rank_batches = late_batches(data_loader._rank_batches)
    else:
        Objective._forward_step = late(Objective._forward_step)
    with session(config.parallel, config.seed):
        shared = file.with_suffix(".cache")
        with main_first():
            found = shared.exists()
            if is_main():
                time.sleep(0.3)
                shared.write_text("")
        assert found == (not is_main()), "rank 0 was not first"
        train(config)
