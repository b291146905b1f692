"""Attention -> Gated DeltaNet and Mamba2 from calibration statistics, everything but the output projection.

Measured on the teacher's own layers (docs/upcycling.md has the ablation): q, k, v in the attention's heads, convolutions
that pass the current token alone, values so small that SiLU is a straight line, half-lives spread from a token or two
over a few dozen (the mean distance of attention is a bad half-life: the first token holds most of it), weak writing.
Two things are predicted from the input by least squares on the statistics, since linear layers have no softmax to make
them: how strongly a token is written (by the attention that it receives), and how long each head's output is (the gate).
`calibrate.solve` then fits the output projection with all of this live.
"""

import math

import torch
from torch import Generator, Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.initialise.calibrated_mla import AttentionMoments, attention_moments
from megatron_hylo.initialise.moments import damped, unit_functional
from megatron_hylo.initialise.registry import CalibrationStatistics, TeacherLayer, needed_statistics, register_initialiser

VALUE_TAP = 0.2  # of the values' convolution: SiLU of so small a number is half of it
GATE = 2.0  # SiLU(2 n) is nearly proportional to n, the length of a head's output over its mean
# half-lives in tokens of the heads that share keys: shortest and longest
DELTA_RULE_HALF_LIVES, MAMBA2_HALF_LIVES = (2.0, 32.0), (1.0, 16.0)
WRITING = 0.2  # mean writing strength of Gated DeltaNet
RECEPTION = 0.5  # how much the log of the received attention changes the logit of writing, or Mamba2's step size
STEP = 0.1  # Mamba2's mean step size


@register_initialiser("calibrated", "G")
def gated_delta_net_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """Gated DeltaNet in the attention's heads where it has as many of the same size, else in the best alignment found.

    In other shapes (the paper's 256/512) a head holds the keys of as many KV heads as fit, each met by the mean of its
    query heads, the values of as many KV heads as fit, and where room is left the leading directions of the input; head
    i of n begins with KV head i Hkv / n.

    Args:
        teacher: one attention layer; QKV biases and q/k-norm have no place in the student and are left out.
        config: of the student; any number and size of heads.
        teacher_config: of the teacher.
        generator: unused, nothing is random.
        statistics: of this layer.

    Returns:
        The `linear_attn.*` tensors of `get_mixer("G").tensors(config)`, fp32; o_proj has what fits of W_O.

    Raises:
        ConfigError: no statistics.
    """
    statistics = needed_statistics(statistics)
    m = attention_moments(teacher, teacher_config, statistics)
    shapes, heads = get_mixer("G").tensors(config), config.linear_num_heads
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    one, length, reception = _predictions(m, statistics)
    groups = len(m.key)
    group_length, group_reception = (p.unflatten(0, (groups, -1)).mean(1) for p in (length, reception))
    per_head = heads == len(m.query) and keys == m.query.shape[1]
    leading = m.input_mean.new_empty(0, len(m.input_mean))  # as many rows as are there where the values fill a head
    if values > groups * m.value.shape[1]:
        leading = torch.linalg.eigh(m.input_moment).eigenvectors.flip(-1).T
        leading = leading * (m.value.norm() / len(m.value.flatten(0, 1)) ** 0.5)  # rows as long as those of W_V
    query, key, value, gate, write = [], [], [], [], []
    for i in range(heads):
        order = [(i * groups // heads + j) % groups for j in range(groups)]
        if per_head:
            query.append(m.query[i])
        else:
            query.append(_fit(torch.cat([m.query.unflatten(0, (groups, -1))[g].mean(0) for g in order]), keys))
        key.append(_fit(torch.cat([*m.key[order]]), keys))
        value.append(_fit(torch.cat([*m.value[order], leading]), values))
        lengths = group_length[order].repeat_interleave(m.value.shape[1], 0)
        mean_length = group_length.mean(0).expand(len(leading), -1)
        gate.append(length[i].expand(values, -1) if per_head else _fit(torch.cat([lengths, mean_length]), values))
        write.append(reception[i] if per_head else group_reception[order[0]])
    cycle = heads // groups if per_head else heads
    half_lives = spread(heads, cycle, *DELTA_RULE_HALF_LIVES)
    b_proj = math.log(WRITING / (1 - WRITING)) * one + RECEPTION * torch.stack(write)
    mixer = {
        "q_proj.weight": torch.cat(query),
        "k_proj.weight": torch.cat(key),
        "v_proj.weight": torch.cat(value),
        "g_proj.weight": GATE * torch.cat(gate),
        "b_proj.weight": b_proj,
        "a_proj.weight": torch.zeros(shapes["linear_attn.a_proj.weight"]),
        "q_conv1d.weight": pass_current(shapes["linear_attn.q_conv1d.weight"]),
        "k_conv1d.weight": pass_current(shapes["linear_attn.k_conv1d.weight"]),
        "v_conv1d.weight": pass_current(shapes["linear_attn.v_conv1d.weight"], VALUE_TAP),
        "A_log": torch.zeros(heads),
        "dt_bias": (math.log(2) / half_lives).expm1().log(),  # exp(A_log) softplus(dt_bias) = ln 2 / half-life
        "o_norm.weight": torch.ones(values),
        "o_proj.weight": _fit(teacher["o_proj.weight"].T, heads * values).T,
    }
    return {f"linear_attn.{name}": _plain(tensor) for name, tensor in mixer.items()}


@register_initialiser("calibrated", "K")
def kda_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """KDA that equals the calibrated Gated DeltaNet: all channels of a head decay alike until training parts them.

    Args, Raises: as `gated_delta_net_from_attention`.

    Returns:
        The `linear_attn.*` tensors of `get_mixer("K").tensors(config)`, fp32. f_a holds the leading directions of the layer's
        input, which f_b (zero) learns to read.
    """
    mixer = gated_delta_net_from_attention(teacher, config, teacher_config, generator, statistics)
    m, width = attention_moments(teacher, teacher_config, statistics), config.linear_key_head_dim
    leading = torch.linalg.eigh(m.input_moment).eigenvectors.flip(-1).T  # rows of length 1
    del mixer["linear_attn.a_proj.weight"]
    mixer["linear_attn.dt_bias"] = mixer["linear_attn.dt_bias"].repeat_interleave(width)
    mixer["linear_attn.f_a_proj.weight"] = _plain(_fit(leading, config.kda_decay_rank))
    shapes = get_mixer("K").tensors(config)
    mixer["linear_attn.f_b_proj.weight"] = torch.zeros(shapes["linear_attn.f_b_proj.weight"])
    return {name: mixer[name] for name in shapes}


@register_initialiser("calibrated", "M")
def mamba2_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """Mamba2 with x from W_V, B from W_K, C from W_Q; step sizes follow the received attention, z the output's length.

    Args:
        teacher: one attention layer; QKV biases and q/k-norm have no place in the student and are left out.
        config: of the student; must have the teacher's heads and mamba_head_dim = mamba_state_dim = kv_channels.
        teacher_config: of the teacher.
        generator: unused, nothing is random.
        statistics: of this layer.

    Returns:
        The `mamba.*` tensors of `get_mixer("M").tensors(config)`, fp32; out_proj is W_O.

    Raises:
        ConfigError: no statistics, or dimensions that do not fit.
    """
    dh, heads, groups = teacher_config.kv_channels, teacher_config.num_attention_heads, teacher_config.num_query_groups
    for name, needed in (
        ("mamba_num_heads", heads), ("num_query_groups", groups), ("mamba_head_dim", dh), ("mamba_state_dim", dh),
    ):  # fmt: skip
        if getattr(config, name) != needed:
            raise ConfigError(f"{name} {getattr(config, name)} does not fit the calibrated initialisation: it must be {needed}")
    statistics = needed_statistics(statistics)
    m = attention_moments(teacher, teacher_config, statistics)
    shapes = get_mixer("M").tensors(config)
    _, length, reception = _predictions(m, statistics)
    taps = pass_current(shapes["mamba.conv1d.weight"])
    taps[: groups * dh] *= VALUE_TAP
    gate = GATE * length.repeat_interleave(dh, 0)
    parts = [gate, m.value.flatten(0, 1), m.key.flatten(0, 1), m.query.flatten(0, 1), RECEPTION * reception]
    half_lives = spread(heads, heads // groups, *MAMBA2_HALF_LIVES)
    mixer = {
        "in_proj.weight": torch.cat(parts),
        "conv1d.weight": taps,
        "conv1d.bias": torch.zeros(shapes["mamba.conv1d.bias"]),
        "dt_bias": torch.full((heads,), math.log(math.expm1(STEP))),
        "A_log": (math.log(2) / (half_lives * STEP)).log(),
        "D": torch.zeros(heads),
        "norm.weight": torch.ones(shapes["mamba.norm.weight"]),
        "out_proj.weight": teacher["o_proj.weight"],
    }
    return {f"mamba.{name}": _plain(tensor) for name, tensor in mixer.items()}


def spread(heads: int, cycle: int, first: float, last: float) -> Tensor:
    """Numbers evenly spaced in their logarithm over each `cycle` heads in a row: fp32 [heads].

    A cycle is the query heads of one KV head, which would otherwise remember the same; a cycle of 1 gets the middle.
    """
    steps = torch.linspace(0, 1, cycle) if cycle > 1 else torch.full((1,), 0.5)
    return (first * (last / first) ** steps).repeat(-(-heads // cycle))[:heads]


def _predictions(m: AttentionMoments, statistics: CalibrationStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Linear functionals of the input, by least squares: the constant 1 [d], output lengths and reception [Hq, d]."""
    moment = damped(m.input_moment)
    moments = torch.cat([statistics["length_moment"], statistics["reception_moment"]]).to(moment)
    length, reception = torch.linalg.solve(moment, moments.T).T.chunk(2)
    return unit_functional(m.input_mean, m.input_moment), length, reception


def pass_current(shape: tuple[int, ...], tap: float = 1.0) -> Tensor:
    """Make a depthwise convolution [channels, 1, kernel] that is `tap` times the current token."""
    taps = torch.zeros(shape)
    taps[..., -1] = tap
    return taps


def _fit(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows, zeros where there are fewer."""
    return torch.nn.functional.pad(rows[:count], (0, 0, 0, max(0, count - len(rows))))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32, copy=True).contiguous()
