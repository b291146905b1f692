"""Recomputed activations: the same loss and gradients, from layers that really run twice."""

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.models.hylo_model import HyloModel, build_model
from tests.conftest import tiny_config

PATTERN = "G-+-M-*-"


def _run(model: HyloModel, frozen_embedding: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int]]:
    """Loss, gradients, and how often each layer computed."""
    model.embedding.requires_grad_(not frozen_embedding)
    runs = [0] * len(model.decoder.layers)
    for place, layer in enumerate(model.decoder.layers):
        inner = layer.mlp if place % 2 else layer.self_attention
        inner.register_forward_pre_hook(lambda *_, place=place: runs.__setitem__(place, runs[place] + 1))
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    loss = model(ids).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, runs


@pytest.mark.parametrize("frozen_embedding", [False, True])
@pytest.mark.parametrize("recompute", [True, "-", "G", "M*", "+-"])
def test_gradients_are_the_same(one_rank, recompute, frozen_embedding):
    plain, other = (build_model(tiny_config(PATTERN), recompute=setting).train() for setting in (False, recompute))
    other.load_state_dict(plain.state_dict())
    loss, gradients, once = _run(plain, frozen_embedding)
    again, recomputed, runs = _run(other, frozen_embedding)
    assert once == [1] * len(PATTERN)
    again_runs = [2 if recompute is True or symbol in recompute else 1 for symbol in PATTERN]
    assert runs == ([1, *again_runs[1:]] if frozen_embedding else again_runs)
    assert again == loss and set(recomputed) == set(gradients)
    assert any(name.startswith("decoder.layers.0.self_attention") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)


def test_an_evaluation_runs_once(one_rank):
    model, count = build_model(tiny_config(PATTERN), recompute=True).eval(), []
    model.decoder.layers[0].self_attention.register_forward_pre_hook(lambda *_: count.append(1))
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert len(count) == 1


def test_a_symbol_of_no_layer_is_refused():
    with pytest.raises(ConfigError, match=r"recompute 'mlp': 'l' is no layer; use true, false or symbols of \* \+ M G K W - E"):
        TrainConfig("pretrain", data="d", output="o", scratch="s", recompute="mlp")
