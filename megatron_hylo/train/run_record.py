"""Record of a run: one line for each start in RUN/starts.jsonl."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import megatron_hylo
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.platform.distributed import is_main

STARTS = "starts.jsonl"
LIBRARIES = (
    "torch", "megatron-core", "transformer-engine", "triton", "flash-linear-attention", "mamba-ssm", "transformers", "numpy",
)  # fmt: skip


def record_start(config: TrainConfig, run: Path, device: torch.device, step: int) -> None:
    """Append a line on this start to RUN/starts.jsonl; the main rank does, all ranks call it.

    Args:
        config: settings of this start.
        run: run folder.
        device: device of this rank.
        step: steps done before.
    """
    devices: list[Any] = [None] * torch.distributed.get_world_size()
    mine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    torch.distributed.all_gather_object(devices, f"{socket.gethostname()}: {mine}")
    if is_main():
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": step, "command": sys.argv,
            "directory": os.getcwd(), "version": megatron_hylo.__version__, "commit": commit(), "devices": devices,
            "python": platform.python_version(), "libraries": _versions(), "config": asdict(config),
        }  # fmt: skip
        with open(run / STARTS, "a") as file:
            file.write(json.dumps(start) + "\n")


def commit() -> str | None:
    """Return the commit of this code, with "-dirty" where files were changed; None outside a git checkout."""
    root = Path(megatron_hylo.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
