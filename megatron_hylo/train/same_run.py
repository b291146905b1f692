"""A run folder keeps the settings it was started with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.io import read_json, write_json
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.train.config import TrainConfig


def check_same_run(config: TrainConfig, run: Path) -> None:
    """Write the settings of a new run, compare those of one that goes on: others would change its meaning silently.

    Args:
        config: of this start.
        run: its folder.

    Raises:
        ConfigError: a setting differs that is part of what the run is; says which.
    """
    may_change = {
        "log_interval", "eval_interval", "save_interval", "keep_checkpoints", "tensorboard", "wandb", "wandb_project",
        "parallel", "micro_batch_size", "async_save", "recompute", "cuda_graphs", "backend", "deterministic",
        "eval_windows", "loss_chunk_tokens", "output", "teacher_address", "teacher_offload", "optimizer.offload",
    }  # fmt: skip
    file = run / "config.json"
    mine = json.loads(json.dumps(asdict(config)))
    if file.is_file():
        # a setting that the run's version did not have yet had its default's effect
        defaults = asdict(TrainConfig(stage="pretrain", data="-", output="-", scratch="-"))
        ours, theirs = _flat(mine), _flat(defaults) | _flat(read_json(file))
        for name in sorted(ours.keys() | theirs.keys()):
            if may_change.isdisjoint((name, name.split(".")[0])) and ours.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{run} was started with {name} = {theirs.get(name)}, now {ours.get(name)}; use another output to change it"
                )
    elif is_main():
        run.mkdir(parents=True, exist_ok=True)
        write_json(file, mine)
    torch.distributed.barrier()


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}, as on the command line."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
