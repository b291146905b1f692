"""Tiny attention layers with inputs as uneven as a trained model's, measured as `hylo calibrate` does."""

import torch
from torch import Tensor

from megatron_hylo.calibrate.gather import LayerSums
from megatron_hylo.config import ModelConfig
from megatron_hylo.convert.to_hf import hf_tensors
from megatron_hylo.models.hylo_model import HyloModel, build_model
from tests.conftest import fill_model


def random_teacher(config: ModelConfig, seed: int = 0) -> HyloModel:
    """A model whose norms and biases are uneven, so that a missing one shows, and whose scores are of order 1."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                p.uniform_(-0.5, 0.5)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


def uneven_input(config: ModelConfig, tokens: int = 96, batch: int = 8, seed: int = 1) -> Tensor:
    """[tokens, batch, hidden]: a mean, channels of a falling spectrum mixed up, outliers, long and short tokens."""
    generator = torch.Generator().manual_seed(seed)
    d = config.hidden_size
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    x = torch.randn(tokens, batch, d, generator=generator) * torch.logspace(0.3, -0.9, d) @ rotation
    x[..., 3] *= 4
    x = x + 0.2 * torch.randn(d, generator=generator)
    return x * (0.5 + torch.rand(tokens, batch, 1, generator=generator))


def attention_layer(model: HyloModel, layer: int = 0) -> dict[str, Tensor]:
    """Input of initialisers: one attention layer's tensors without prefix."""
    prefix = f"model.layers.{layer}.self_attn."
    return {n.removeprefix(prefix): t.detach().clone() for n, t in hf_tensors(model) if n.startswith(prefix)}


@torch.no_grad()
def measure(model: HyloModel, x: Tensor, layer: int = 0) -> dict[str, Tensor]:
    """Statistics of one layer on inputs of its mixer, [sequence, batch, hidden]."""
    attention = model.mixer_layers()[layer][0].self_attention
    sums = LayerSums(attention)
    x = x.to(next(model.parameters()).device)
    query, key, value = attention.query_key_value(x)
    sums.add(x, query, key, value, attention.attend(query, key, value)[0])
    return sums.means(layer)


def with_mixer(teacher: HyloModel, config: ModelConfig, mixer: dict[str, Tensor]) -> HyloModel:
    """The one-layer student of `config` with that mixer, the rest the teacher's."""
    state = {name: t.detach().clone() for name, t in hf_tensors(teacher)}
    student = build_model(config)
    fill_model(student, (state | {f"model.layers.0.{n}": t for n, t in mixer.items()}).__getitem__)
    return student


def mixer_of(model: HyloModel) -> torch.nn.Module:
    """The first layer's."""
    return model.mixer_layers()[0][0].self_attention
