"""Hugging Face folders that a run writes of its checkpoints."""

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.open_model import model_from_megatron
from megatron_hylo.hf import HyloForCausalLM
from megatron_hylo.train.loop import train
from tests.train.runs import metrics

IDS = torch.arange(3, 19)[None]


def megatron_logits(folder):
    return model_from_megatron(folder).eval()(IDS).logits


def test_exports_are_the_checkpoints_of_their_steps(settings, tmp_path):
    """Logits equal those of the checkpoint and of RUN/model, bit for bit; training goes on as without exports."""
    saving = dict(save_interval=1, keep=4)
    train(settings(steps=4, output=tmp_path / "plain", checkpoint=saving))
    train(settings(steps=4, checkpoint=saving | dict(export_every=2)))
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["step_00000002", "step_00000004"]
    assert metrics(run) == metrics(tmp_path / "plain")
    logits = {}
    for step in (2, 4):
        exported = HyloForCausalLM.from_pretrained(run / "exports" / f"step_{step:08d}").eval()
        logits[step] = exported(IDS).logits
        assert torch.equal(logits[step], megatron_logits(run / "checkpoints" / f"step_{step:08d}"))
    assert torch.equal(logits[4], megatron_logits(run / "model"))
    assert not torch.equal(logits[2], logits[4])


def test_exports_between_checkpoints_are_refused(settings):
    with pytest.raises(ConfigError, match="export_every must be 0 or a multiple of checkpoint.save_interval 2, got 3"):
        settings(checkpoint=dict(save_interval=2, export_every=3))
