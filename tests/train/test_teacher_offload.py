"""Weights that rest on the CPU: the same outputs, two layers' weights there at a time."""

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.models.offload import OffloadedLayers, offloaded_units
from megatron_hylo.plan.memory import predict_memory
from megatron_hylo.train.loop import train
from tests.conftest import tiny_config
from tests.train.runs import metrics

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIZES = dict(hidden_size=256, ffn_hidden_size=2048)


def _model(device: str, dtype: torch.dtype):
    return build_model(tiny_config("G-+-M-*-", **SIZES), params_dtype=dtype).to(device).requires_grad_(False).eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_outputs_are_the_same(one_rank, device):
    """Twice, since the second pass finds the buffers full; a copy that was late or early would show."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _model(device, dtype)
    ids = [torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(seed)).to(device) for seed in (1, 2)]
    with torch.no_grad():
        plain = [model(x) for x in ids]
        before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        OffloadedLayers(model)
        for x, expected in zip(ids * 2, plain * 2):
            assert torch.equal(model(x), expected)
    assert all(torch.equal(p.cpu(), before[name]) for name, p in model.named_parameters())
    if device == "cuda":
        assert {p.device.type for unit in offloaded_units(model) for p in unit.parameters()} == {"cpu"}


def test_weights_are_in_a_buffer_while_their_layer_computes_alone(one_rank):
    model, seen = _model("cpu", torch.float32), []
    layers = OffloadedLayers(model)
    buffers = [buffer.untyped_storage().data_ptr() for buffer in layers.buffers]

    def where(unit) -> set[int]:
        return {buffers.index(p) if (p := q.untyped_storage().data_ptr()) in buffers else -1 for q in unit.parameters()}

    for number, unit in enumerate(layers.units):
        unit.register_forward_pre_hook(
            lambda *_, number=number: seen.append((number, [where(other) for other in layers.units], list(layers.holds)))
        )
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert [number for number, *_ in seen] == list(range(len(layers.units)))
    for number, places, holds in seen:
        assert places == [{number % 2} if other == number else {-1} for other in range(len(layers.units))]
        last = number + 1 == len(layers.units)
        assert holds[number % 2] == number and (last or holds[1 - number % 2] == number + 1)
    assert all(where(unit) == {-1} for unit in layers.units)
    assert max(len(b) for b in layers.buffers) == max(len(home) for home in layers.homes)


def test_gradients_are_refused(one_rank):
    model = _model("cpu", torch.float32)
    OffloadedLayers(model)
    with pytest.raises(RuntimeError, match="offloaded weights are gone"):
        model(torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("stage", ["distil", "align"])
def test_a_teacher_teaches_the_same(settings, tmp_path, stage):
    for name, offload in (("plain", False), ("offloaded", True)):
        train(settings(stage, steps=3, output=tmp_path / name, teacher_offload=offload))
    for metric in ("loss", "gradient_norm", "heldout_kl"):
        found = metrics(tmp_path / "offloaded", metric)
        assert found and found == metrics(tmp_path / "plain", metric)


def test_the_prediction_knows(settings, one_rank):
    """The predicted bytes are those of the weights that stay and of two buffers."""
    config, teacher = settings("distil", teacher_offload=True), _model("cpu", torch.float32)
    student = build_model(tiny_config("G-+-M-*-"))
    layers = OffloadedLayers(teacher)
    resting = [p for unit in layers.units for p in unit.parameters()]
    staying = sum(p.numel() * p.element_size() for p in teacher.parameters() if all(p is not q for q in resting))
    found = predict_memory(config, [[student]], [teacher], None, 1)
    assert found.teacher == pytest.approx(staying + sum(len(buffer) for buffer in layers.buffers), rel=0.01)


def test_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match="teacher_offload needs a teacher folder"):
        TrainConfig("distil", data="d", output="o", model="m", teacher_store="s", teacher_offload=True)
