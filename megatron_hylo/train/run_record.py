"""Record of a run: one line for each start in RUN/starts.jsonl, and what its code differs in from the commit that it names."""

import hashlib
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import megatron_hylo
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.io.environment import code_diff, commit, device_name, library_versions
from megatron_hylo.platform.distributed import is_main

STARTS = "starts.jsonl"


def record_start(config: TrainConfig, run: Path, device: torch.device, step: int) -> None:
    """Append a line on this start to RUN/starts.jsonl; the main rank does, all ranks call it.

    Args:
        config: settings of this start.
        run: run folder.
        device: device of this rank.
        step: steps done before.
    """
    devices: list[Any] = [None] * torch.distributed.get_world_size()
    mine = device_name(torch.cuda.get_device_name(device) if device.type == "cuda" else None)
    torch.distributed.all_gather_object(devices, mine)
    if is_main():
        start: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": step, "command": sys.argv,
            "directory": os.getcwd(), "version": megatron_hylo.__version__, "commit": commit(), "devices": devices,
            "python": platform.python_version(), "libraries": library_versions(), "config": asdict(config),
        }  # fmt: skip
        if (diff := code_diff()) is not None:
            name = f"code_{hashlib.sha256(diff.encode()).hexdigest()[:8]}.diff"
            (run / name).write_text(diff)
            start["code_diff"] = name
        with open(run / STARTS, "a") as file:
            file.write(json.dumps(start) + "\n")
