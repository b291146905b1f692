"""Reading what a run left, and starting `hylo train` as a user does."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from megatron.core import dist_checkpointing

from megatron_hylo.config.train import TrainConfig
from tests.forked import Program
from tests.held import Hold, held_program

ROOT = Path(__file__).parents[2]


def metrics(run: Path, name: str = "loss") -> dict[int, float]:
    """One metric by step, out of metrics.jsonl; a step that is there twice is an error."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[name]) for line in lines if name in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder or checkpoint, optimizer state included."""
    return dist_checkpointing.load_plain_tensors(str(folder / "weights"))


def relative_difference(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest |a - b| / |b| of any tensor, and its name."""
    assert mine.keys() == theirs.keys()
    return max((float((mine[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)), n) for n in mine)


def start_train(config: TrainConfig, held: Hold) -> Program:
    """`hylo train --config RECIPE` with the recipe beside the output folder, as leader of a process group.

    Args:
        config: settings.
        held: where it waits for a signal (tests/held.py), so that it has not ended when the test sends one.
    """
    recipe = Path(f"{config.output}.yaml")
    recipe.write_text(yaml.safe_dump(asdict(config)))
    return held_program(held, ["train", "--config", recipe], Path(f"{config.output}.log"))
