"""Muon beside AdamW: which parameters it has, its update, resuming."""

import shutil

import pytest
import torch

from megatron_hylo.train.loop import train
from tests.train.runs import metrics, weights

MUON = dict(name="muon", use_distributed_optimizer=False, lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_undisturbed_one(settings, tmp_path, precision):
    for name in ("whole", "resumed"):
        train(
            settings(
                "pretrain", steps=4, output=tmp_path / name, precision=precision, optimizer=MUON,
                checkpoint=dict(save_interval=2),
            )
        )  # fmt: skip
        if name == "whole":
            checkpoint = tmp_path / name / "checkpoints" / "step_00000002"
            shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoints" / checkpoint.name)
    mine, theirs = (weights(tmp_path / name / "checkpoints" / "step_00000004") for name in ("resumed", "whole"))
    assert mine.keys() == theirs.keys()
    tensors = [name for name, value in theirs.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(mine[name], theirs[name]) for name in tensors)
    assert metrics(tmp_path / "resumed") == {step: loss for step, loss in metrics(tmp_path / "whole").items() if step > 2}
