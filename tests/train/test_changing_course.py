"""A run that begins with another one's weights, with or without its optimizer's state; oracle: that run's checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.train.checkpoint import CheckpointSaver, load_states
from megatron_hylo.train.loop import train
from megatron_hylo.train.setup import build_run
from tests.train.runs import metrics, weights

CONSTANT = OptimizerSettings(lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0, min_lr_ratio=1.0)
REFUSED = [
    ({"model": "MODEL"}, "needs a model that is RUN/checkpoints/step_N"),
    ({"trainable": "mixers"}, "with trained: all, this one has the mixers"),
    ({"optimizer": replace(CONSTANT, mixer_lr=None)}, "mixers' own: True, this one has False"),
    ({"optimizer": replace(CONSTANT, use_distributed_optimizer=False)}, "use_distributed_optimizer: True, this one has False"),
    ({"precision": "bf16"}, "with precision: fp32, this one has bf16"),
    ({"model": None, "scratch": "smollm2-135m"}, "is for one model that is a checkpoint"),
]


def test_a_run_begins_with_the_weights_and_the_optimizer_of_another(settings, material, tmp_path, one_rank):
    first = settings("pretrain", steps=3, output=tmp_path / "first", optimizer=CONSTANT)
    train(first)
    checkpoint = tmp_path / "first" / "checkpoints" / "step_00000003"
    kept = settings(
        "pretrain", steps=2, output=tmp_path / "kept", optimizer=CONSTANT, model=str(checkpoint), keep_optimizer_state=True
    )
    fresh = replace(kept, output=str(tmp_path / "fresh"), keep_optimizer_state=False)
    run = build_run(kept, one_rank)
    (schedule,) = load_states(run.states, checkpoint)
    assert schedule["num_steps"] == 3 and run.states[0].scheduler.num_steps == 0
    saver = CheckpointSaver(tmp_path / "again", [{}], None, 1)
    saver.start(run.states, 3, 12)
    saver.finish()
    mine, theirs = weights(tmp_path / "again" / "checkpoints" / "step_00000003"), weights(checkpoint)
    assert mine.keys() == theirs.keys() and any("exp_avg_sq" in name for name in mine)
    tensors = [name for name, value in theirs.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 100 and all(torch.equal(mine[name], theirs[name]) for name in tensors)
    for config in (kept, fresh):
        train(config)
    losses = [list(metrics(Path(config.output)).values()) for config in (kept, fresh)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    with pytest.raises(ConfigError, match="keep_optimizer_state = True, now False; .* its optimizer has gone on from there"):
        train(replace(kept, keep_optimizer_state=False))
    for changes, message in REFUSED:
        changes = {name: str(material.student) if value == "MODEL" else value for name, value in changes.items()}
        with pytest.raises(ConfigError, match=message):
            train(replace(kept, output=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()
