"""Linear mixers as they are before any teacher: random defaults.

The distributions are those of mamba_ssm's `Mamba2` and of fla's `GatedDeltaNet` and `KimiDeltaAttention` layers (torch's own
defaults for Linear and Conv1d). Everything is drawn uniformly on the CPU in a fixed order, so that a seed gives the same
tensors everywhere.
"""

import math

import torch
from torch import Generator, Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mixers.mamba2 import Mamba2


def uniform_fan_in(shape: Shape, generator: Generator, fan_in: int | None = None) -> Tensor:
    """Draw torch's default for Linear and Conv1d weights: kaiming_uniform(a=sqrt 5), i.e. U(-1/sqrt fan_in, 1/sqrt fan_in).

    Args:
        shape: [out, in] of a linear weight, [channels, 1, kernel] of a depthwise convolution's, or [channels] of a bias.
        generator: CPU generator to draw from.
        fan_in: inputs of one output; by default all but the first dimension. A bias has none of its own and must give it.

    Returns:
        fp32 tensor of that shape.
    """
    bound = 1.0 / math.sqrt(fan_in or math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def log_decay_rate(
    heads: int, bounds: tuple[float, float], generator: Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Draw `A_log` of a fresh linear mixer, the logarithm of a uniform number.

    Args:
        heads: number of values.
        bounds: the mixer's `decay_range`; a lower bound of 0 is excluded.
        generator: to draw from; by default the device's current one.
        device: where the result is.

    Returns:
        fp32 [heads].
    """
    low, high = bounds
    if low > 0:
        return torch.empty(heads, device=device).uniform_(low, high, generator=generator).log()
    # uniform_ draws from [0, 1); 1 - u keeps the rate away from 0, whose logarithm is -inf
    return (high * (1.0 - torch.empty(heads, device=device).uniform_(generator=generator))).log()


def inverse_softplus_step(
    count: int,
    generator: Generator | None = None,
    device: torch.device | None = None,
    low: float = 1e-3,
    high: float = 1e-1,
    floor: float = 1e-4,
) -> Tensor:
    """Draw `dt_bias` of a fresh linear mixer: its softplus is log-uniform in [low, high] and at least `floor` (Mamba2).

    Args:
        count: number of values.
        generator: to draw from; by default the device's current one.
        device: where the result is.
        low, high, floor: bounds of the step size (dimensionless).

    Returns:
        fp32 [count].
    """
    uniform = torch.empty(count, device=device).uniform_(generator=generator)
    step = (uniform * (math.log(high) - math.log(low)) + math.log(low)).exp().clamp(min=floor)
    return step + torch.log(-torch.expm1(-step))


def mamba2_defaults(config: ModelConfig, generator: Generator) -> dict[str, Tensor]:
    """A Mamba2 mixer as mamba_ssm makes it: A uniform in [1, 16], D and norm 1, Linear and Conv1d of torch's defaults.

    Args:
        config: of the student.
        generator: CPU generator to draw from.

    Returns:
        All tensors of `get_mixer("M").tensors(config)`, fp32.
    """
    shapes, heads = get_mixer("M").tensors(config), config.mamba_num_heads
    return {
        "mamba.in_proj.weight": uniform_fan_in(shapes["mamba.in_proj.weight"], generator),
        "mamba.conv1d.weight": uniform_fan_in(shapes["mamba.conv1d.weight"], generator),
        "mamba.conv1d.bias": uniform_fan_in(shapes["mamba.conv1d.bias"], generator, fan_in=config.linear_conv_kernel_dim),
        "mamba.dt_bias": inverse_softplus_step(heads, generator),
        "mamba.A_log": log_decay_rate(heads, Mamba2.decay_range, generator),
        "mamba.D": torch.ones(heads),
        "mamba.norm.weight": torch.ones(shapes["mamba.norm.weight"]),
        "mamba.out_proj.weight": uniform_fan_in(shapes["mamba.out_proj.weight"], generator),
    }


def delta_rule_defaults(symbol: str, config: ModelConfig, generator: Generator) -> dict[str, Tensor]:
    """A Gated DeltaNet or KDA mixer as fla makes it: A uniform in the mixer's range, norm 1, torch's defaults elsewhere.

    Args:
        symbol: `G`, whose A is in (0, 16] and which has a step size for each head, or `K`: [1, 16], one for each key channel.
        config: of the student.
        generator: CPU generator to draw from.

    Returns:
        All tensors of `get_mixer(symbol).tensors(config)`, fp32.
    """
    mixer = get_mixer(symbol)
    shapes, bounds = mixer.tensors(config), mixer.decay_range
    assert bounds is not None, f"mixer {symbol} has no decay"
    linear = [name for name in shapes if name.endswith(("proj.weight", "conv1d.weight"))]
    drawn = {name: uniform_fan_in(shapes[name], generator) for name in linear} | {
        "linear_attn.A_log": log_decay_rate(config.linear_num_heads, bounds, generator),
        "linear_attn.dt_bias": inverse_softplus_step(shapes["linear_attn.dt_bias"][0], generator),
        "linear_attn.o_norm.weight": torch.ones(config.linear_value_head_dim),
    }
    return {name: drawn[name] for name in shapes}
