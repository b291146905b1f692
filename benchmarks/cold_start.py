"""Seconds until the slowest rank has compiled, tuned and checked its kernels: all ranks at once, or rank 0 before the others.

    for way in at_once rank_0_first; do
        export TRITON_CACHE_DIR=$(mktemp -d) MEGATRON_HYLO_CACHE=$(mktemp -d)        # empty, and shared by the ranks
        torchrun --standalone --nproc-per-node 8 benchmarks/cold_start.py --way $way --layout llama3.2-1b-4mla12gdn
    done

Prints a row and, last, one JSON line. On a CPU there is nothing to compile.
"""

import argparse
import contextlib
import json
import time

import torch

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.layouts import LAYOUTS
from megatron_hylo.io import gather, main_first
from megatron_hylo.platform.distributed import is_main, session
from megatron_hylo.train.startup_check import check_run_kernels


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", default="smollm2-135m-8mla22gdn-teacher", choices=sorted(LAYOUTS))
    parser.add_argument("--way", choices=("at_once", "rank_0_first"), default="rank_0_first")
    given = parser.parse_args()
    with session() as device:
        begun, used = time.perf_counter(), time.process_time()
        with main_first() if given.way == "rank_0_first" else contextlib.nullcontext():
            check_run_kernels([LAYOUTS[given.layout].config], torch.bfloat16, device)
        wall, cpu = gather(time.perf_counter() - begun), gather(time.process_time() - used)
        if is_main():
            print(f"{given.layout}, {len(wall)} ranks on {device.type}, {given.way}: {max(wall):.1f} s, {sum(cpu):.0f} CPU s")
            print(json.dumps({"layout": given.layout, "ranks": len(wall), "way": given.way, "s": max(wall), "cpu_s": sum(cpu)}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        main()
