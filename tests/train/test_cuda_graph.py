"""A recorded step is the step: same losses and weights, for every stage, and across a stop and a resume."""

from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.train.loop import train
from tests.train.runs import metrics, relative_difference, weights


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_refused_without_a_gpu(settings):
    with pytest.raises(ConfigError, match="cuda_graphs needs a GPU"):
        train(settings(cuda_graphs=True))


@pytest.mark.parametrize("changes", [dict(recompute=True), dict(packed_documents=True)])
def test_what_cannot_be_recorded_is_refused(settings, changes):
    with pytest.raises(ConfigError, match="cuda_graphs cannot record"):
        settings(cuda_graphs=True, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("stage", "align_loss"),
    [("pretrain", "mse"), ("distil", "mse"), ("align", "mse"), ("align", "ild"), ("align", "sequential")],
)
def test_recorded_steps_equal_others(settings, tmp_path, monkeypatch, stage, align_loss):
    """In fp32 and plain torch, where steps are all but reproducible."""
    monkeypatch.setenv("HYLO_KERNELS", "attention=math,causal_conv1d=torch,gated_delta_rule=torch,ssd=torch")
    runs = []
    for name, graphs in (("eager", False), ("recorded", True)):
        config = settings(stage, steps=9, output=tmp_path / name, align_loss=align_loss, cuda_graphs=graphs, save_interval=6)
        train(config)
        runs.append((metrics(Path(config.output)), weights(Path(config.output) / "model")))
    (eager, eager_weights), (recorded, recorded_weights) = runs
    assert recorded == pytest.approx(eager, rel=1e-5)
    assert len(set(recorded.values())) == 9
    difference, name = relative_difference(recorded_weights, eager_weights)
    assert difference < 1e-4, name
