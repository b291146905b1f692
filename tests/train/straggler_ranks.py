"""Ranks of a test, started by run_ranks with a run's settings and what rank 1 is slow in: "data" or "passes"."""

import json
import sys
import time
from pathlib import Path

from megatron_hylo.config import from_dict
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.io import main_first
from megatron_hylo.platform.distributed import is_main, rank, session
from megatron_hylo.train import data_loader, pass_timer
from megatron_hylo.train.loop import train


class Fast:
    """A clock that runs ten thousand times as fast, so that other processes of this machine cannot outweigh it."""

    @staticmethod
    def perf_counter() -> float:
        """Seconds."""
        return 10_000 * time.perf_counter()


def late_batches(function):
    """The generator, each of its batches 10 ms later."""

    def slow(*arguments):
        for batch in function(*arguments):
            time.sleep(0.01)
            yield batch

    return slow


if __name__ == "__main__":
    file, phase = Path(sys.argv[1]), sys.argv[2]
    config = from_dict(TrainConfig, json.loads(file.read_text()), "settings")
    data_loader._rank_batches = late_batches(data_loader._rank_batches)
    with session(config.parallel, config.seed):
        if rank() == 1:
            (data_loader if phase == "data" else pass_timer).time = Fast
        shared = file.with_suffix(".cache")
        with main_first():
            found = shared.exists()
            if is_main():
                time.sleep(0.3)
                shared.write_text("")
        assert found == (not is_main()), "rank 0 was not first"
        train(config)
