"""Initialisers with statistics on a GPU and the teacher's weights on the CPU, as `hylo upcycle` calls them.

Fake tensors carry a device but no values, so that mixing devices is found without a GPU. They let a tensor be indexed by one of
another device, where torch may refuse; on a GPU the same cases run with values.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import hybrid_config
from megatron_hylo.config.mixers import COPIED_SYMBOLS, MIXERS, get_mixer
from megatron_hylo.initialise import registry
from megatron_hylo.initialise.calibrated_mla import choose_rotary_pairs
from megatron_hylo.initialise.registry import get_initialiser
from tests.calibrate.tiny import attention_layer, measure, random_teacher, uneven_input
from tests.conftest import tiny_config

FAMILIES = {
    "llama": {},
    "qwen2": dict(model_family="qwen2", add_qkv_bias=True),
    "qwen3": dict(model_family="qwen3", qk_layernorm=True),
}
Case = tuple[str, str, str]  # an initialiser, the mixer that it makes, shapes
Layer = tuple[ModelConfig, dict[str, Tensor], dict[str, Tensor]]  # a teacher, its attention layer's weights, their statistics


@pytest.fixture(scope="module", params=FAMILIES)
def layer(request, one_rank) -> Layer:
    base = tiny_config("*-", **FAMILIES[request.param])
    teacher = random_teacher(base)
    weights, statistics = attention_layer(teacher), measure(teacher, uneven_input(base))
    return base, *({name: x.cpu() for name, x in tensors.items()} for tensors in (weights, statistics))


def cases() -> list[Case]:
    """Every initialiser with every mixer that it makes and the shapes that it takes."""
    found = []
    for name, symbol in registry._INITIALISERS:
        assert symbol in MIXERS and symbol not in COPIED_SYMBOLS
        shapes = {"paper": ["paper"], "taylor": ["teacher"]}.get(name, ["paper", "teacher"])
        found += [(name, symbol, shape) for shape in shapes]
    return found


def make(layer: Layer, case: Case, weights: dict[str, Tensor], statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the mixer of the case; names, shapes, dtype and device of its tensors are checked."""
    (base, _, _), (name, symbol, shapes) = layer, case
    # the calibrated MLA keeps biases, in any shapes; the paper's drops them
    config = hybrid_config(base, symbol, shapes=shapes, mla_bias=base.add_qkv_bias and name != "paper")
    made = get_initialiser(name, symbol)(weights, config, base, torch.Generator().manual_seed(0), statistics)
    assert {n: tuple(x.shape) for n, x in made.items()} == get_mixer(symbol).tensors(config)
    assert {(x.device.type, x.dtype) for x in made.values()} == {("cpu", torch.float32)}
    return made


def fake(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Tensors of the same shapes without values, on a device that need not be there."""
    return {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in tensors.items()}


def on_fake_gpu(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fake statistics; the layer's number is a constant, since its value is read."""
    return fake(statistics, "cuda") | {"layer": torch.tensor(0)}


@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_weights_meet_statistics_on_their_device(case, layer) -> None:
    _, weights, statistics = layer
    with FakeTensorMode():
        make(layer, case, fake(weights, "cpu"), on_fake_gpu(statistics))


@pytest.mark.parametrize("shapes", ["paper", "teacher"])
def test_rotary_pairs_are_chosen_on_the_statistics_device(shapes, layer) -> None:
    base, weights, statistics = layer
    config = hybrid_config(base, "+", shapes=shapes)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):  # all but their numbers
        choose_rotary_pairs(fake(weights, "cpu"), config, base, on_fake_gpu(statistics), "energy")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_statistics_on_gpu_give_the_mixer_that_they_give_on_the_cpu(case, layer) -> None:
    _, weights, statistics = layer
    there = {name: x.cuda() for name, x in statistics.items()}
    found, wanted = (make(layer, case, weights, x) for x in (there, statistics))
    for name, tensor in found.items():
        # eigenvectors have no sign of their own, which products of a down and an up projection do not see
        close = torch.isclose(tensor.abs(), wanted[name].abs(), rtol=1e-3, atol=1e-5)
        assert close.float().mean() > 0.999, name
