"""Optimizer state that rests on the CPU: the same run to the last bit, also resumed; on a GPU no state stays there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.plan.memory import predict_memory
from megatron_hylo.train.loop import train
from megatron_hylo.train.optimizer import build_training_state
from tests.conftest import tiny_config
from tests.train.runs import metrics, weights

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_the_same(settings, tmp_path, precision):
    """Also where it goes on from its last checkpoint with the other setting."""
    runs = {}
    for offload in (False, True):
        config = settings(
            output=tmp_path / str(offload), precision=precision, deterministic=True, checkpoint=dict(save_interval=2)
        )
        runs[offload] = config, replace(config, optimizer=replace(config.optimizer, offload=True))
    train(runs[False][0])
    train(runs[True][1])
    for run in (tmp_path / "False", tmp_path / "True"):
        assert metrics(run) == metrics(tmp_path / "False") and len(metrics(run)) == 5
    for config in (runs[True][0], runs[False][1]):
        (Path(config.output) / "model").rename(Path(config.output) / "first")
        train(config)
        first, again = (weights(Path(config.output) / name) for name in ("first", "model"))
        assert all(torch.equal(x, again[name]) for name, x in first.items())
    first = weights(tmp_path / "False" / "first")
    assert all(torch.equal(x, first[name]) for name, x in weights(tmp_path / "True" / "model").items())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_where_it_is(settings, one_rank, device):
    """Between steps at home, in a step on the device; the model's own memory never moves."""
    config = settings("distil", precision="bf16")
    model = build_model(tiny_config("G-+-M-*-"), params_dtype=torch.bfloat16).to(device).train()
    state = build_training_state([model], replace(config, optimizer=replace(config.optimizer, offload=True)))
    offloaded = state.offloaded
    assert offloaded.copies  # fp32 copies of bf16 weights; A_log and its like are their own
    assert len(offloaded.copies) < sum(len(group["params"]) for group in offloaded.optimizers[0].param_groups)
    where = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        for p in model.parameters():
            p.main_grad.fill_(1e-3)
        with state.resident():
            state.optimizer.step()
            values = [x for values in offloaded.optimizers[0].state.values() for x in values.values() if x.numel() > 1]
            assert values and {x.device.type for x in (*values, *offloaded.copies)} == {device}
        homes = {home.data_ptr() for home in offloaded.cpu_buffers.values()}
        values = [x for values in offloaded.optimizers[0].state.values() for x in values.values() if x.numel() > 1]
        assert {x.data_ptr() for x in (*values, *(p.data for p in offloaded.copies))} == homes
    assert where == [p.data_ptr() for p in model.parameters()]


def test_the_prediction_knows(settings, one_rank):
    """The predicted peak is that of the fuller of two moments of a step."""
    student = build_model(tiny_config("G-+-M-*-"))
    short, long = (settings("distil", sequence_length=tokens) for tokens in (8, 65_536))
    for config, passes in ((short, False), (long, True)):
        plain = predict_memory(config, [[student]], None, None, 1)
        found = predict_memory(replace(config, optimizer=replace(config.optimizer, offload=True)), [[student]], None, None, 1)
        assert found.total < plain.total and (found.optimizer == 0) == passes == (found.kept > 0)
