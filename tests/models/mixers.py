"""Shared parts of the mixer tests: a random mixer, and its errors against an oracle with the same weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_hylo.config import ModelConfig
from megatron_hylo.models.hylo_model import build_model
from tests.kernels.compare import relative_error

TOLERANCE = 1e-5  # relative, by the norm of each tensor, fp32
TOKENS = 75  # more than a chunk of 64

Weights = dict[str, Tensor]
Oracle = Callable[[Weights, Tensor], Tensor]  # (weights in our layout, [b, t, hidden]) -> [b, t, hidden]


def random_mixer(config: ModelConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The mixer of a one-layer model, every weight uneven and large enough to show a fault."""
    mixer = build_model(config, params_dtype=dtype).mixer_layers()[0][0].self_attention
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            if "norm" in name or name == "D":
                p.uniform_(0.5, 1.5)
            elif name == "A_log":
                p.uniform_(0.1, 4).log_()
            elif name == "dt_bias":
                p.uniform_(-2, 1)
            elif "conv" in name:
                p.normal_(std=0.5)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)
    return mixer


def errors(mixer: nn.Module, oracle: Oracle, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Relative error of the output and of every gradient, for one random cotangent."""
    x = torch.randn(2, tokens, mixer.config.hidden_size)
    cotangent = torch.randn_like(x)

    ours_x = x.clone().requires_grad_()
    out = mixer(ours_x.transpose(0, 1))[0].transpose(0, 1)
    ours = [out, *torch.autograd.grad((out * cotangent).sum(), [ours_x, *mixer.parameters()])]

    weights = {name: p.detach().to(dtype).requires_grad_() for name, p in mixer.named_parameters()}
    theirs_x = x.to(dtype).requires_grad_()
    out = oracle(weights, theirs_x)
    theirs = [out, *torch.autograd.grad((out * cotangent).sum(), [theirs_x, *weights.values()])]
    found = {name: relative_error(a, b) for name, a, b in zip(["output", "input", *weights], ours, theirs, strict=True)}
    print({name: f"{value:.1e}" for name, value in found.items()})
    return found
