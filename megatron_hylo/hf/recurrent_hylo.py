"""Recurrent layers of HyLo models: Mamba2 `M`, Gated DeltaNet `G` and KDA `K`, each behind a short convolution.

The cache holds the convolution's last inputs and a state of fixed size. Padding writes nothing into either. Sources: HyLo
(arXiv:2604.24715), and the papers the kernels name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.kernels.elementwise import on_request
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.kernels.kda import kda
from megatron_hylo.kernels.norm import gated_rms_norm
from megatron_hylo.kernels.recurrence_step import delta_rule_step, ssd_step
from megatron_hylo.kernels.ssd import ssd

from .cache_hylo import HyloCache, States
from .configuration_hylo import HyloConfig
from .fused_hylo import linear, project, side_by_side
from .inputs_hylo import SequenceInputs

Recurrence = Callable[..., tuple[Tensor, Tensor | None]]
fused_gated_rms_norm = on_request(gated_rms_norm)


def _one_step(tokens: int, state: Tensor | None, padding: Tensor | None) -> bool:
    """Whether a recurrence is one step from a state, without gradients."""
    return tokens == 1 and state is not None and padding is None and not torch.is_grad_enabled()


@on_request
def step_sizes(raw: Tensor, bias: Tensor) -> Tensor:
    """Compute Mamba2's step sizes [batch, tokens, heads], fp32, from their projection."""
    return F.softplus(raw.float() + bias)


@on_request
def scalar_gates(raw: Tensor, strength: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log decays [batch, tokens, heads] and writing strengths from their projections; `rate` is A_log [heads]."""
    return -rate.exp() * F.softplus(raw.float() + bias), strength.sigmoid()


@on_request
def channel_gates(raw: Tensor, strength: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log decays [batch, tokens, heads, key channels] and writing strengths; `raw` and `bias` have all channels."""
    step = F.softplus(raw.float() + bias)
    return -rate.exp()[:, None] * step.unflatten(-1, (len(rate), -1)), strength.sigmoid()


class HyloConv1d(nn.Conv1d):
    """Depthwise convolution that hands out its parameters, for one kernel that runs several.

    They are read by a call, as those who keep weights elsewhere (device_map) bring them when a module is called.
    """

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return the weight [channels, taps] and the bias [channels]."""
        return self.weight.squeeze(1), self.bias


class HyloGatedRMSNorm(nn.Module):
    """RMSNorm with a SiLU gate, before it or after it."""

    def __init__(self, channels: int, eps: float, group_size: int | None = None, norm_before_gate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.settings: dict[str, Any] = {"eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate}

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise x and multiply by silu(gate): [..., channels] each -> the same shape."""
        return fused_gated_rms_norm(x, gate, self.weight, **self.settings)


def convolve(
    x: Tensor,
    convolutions: Sequence[nn.Module],
    state: Tensor | None,
    padding: Tensor | None,
    keep_state: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Apply a short causal convolution with SiLU whose channels are split over several modules; no tap reads padding.

    Args:
        x: [batch, new tokens, channels].
        convolutions: depthwise, their channels together are x's; all with a bias or none.
        state: [batch, channels, taps - 1], the tokens before x; None for zeros.
        padding: bool [batch, new tokens], False at padding.
        keep_state: also return the state after x.
        in_place: it may be the one given, changed.

    Raises:
        ValueError: a convolution was replaced by another module (LoRA on conv1d), whose weights would not be used.
    """
    for module in convolutions:
        if not isinstance(module, HyloConv1d):
            raise ValueError(
                f"a short convolution (conv1d) was replaced by {type(module).__name__}, but its weights are handed to a fused "
                f"kernel, so an adapter there would have no effect; leave conv1d out of target_modules"
            )
    weights, biases = zip(*(module() for module in convolutions))
    joined = side_by_side(weights)
    weight, bias = torch.cat(weights) if joined is None else joined, None if biases[0] is None else torch.cat(biases)
    if padding is None:
        return causal_conv1d(x, weight, bias, "silu", state, output_final_state=keep_state, in_place=in_place)
    # Padding goes before everything, the state's tokens included, as zeros: then a token's neighbours are tokens.
    before = weight.shape[1] - 1
    history = x.new_zeros(len(x), before, x.shape[2]) if state is None else state.transpose(1, 2).to(x.dtype)
    order = F.pad(padding, (before, 0), value=True).to(torch.uint8).argsort(dim=1, stable=True)
    places = order[..., None].expand(-1, -1, x.shape[2])
    moved = torch.cat([history, x.masked_fill(~padding[..., None], 0.0)], dim=1).gather(1, places)
    y, state = causal_conv1d(moved, weight, bias, "silu", None, output_final_state=keep_state)
    return torch.empty_like(y).scatter(1, places, y)[:, before:], state


class HyloMamba2(nn.Module):
    """`M`: Mamba2 whose x and B have the base model's KV heads, repeated to all heads after the convolution."""

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.layer, self.heads, self.groups = layer, c.mamba_num_heads, c.num_query_groups
        self.head_dim, self.state_dim = c.mamba_head_dim, c.mamba_state_dim
        inner = self.heads * self.head_dim
        self.sections = [self.groups * self.head_dim, self.groups * self.state_dim, self.heads * self.state_dim]  # x, B, C
        channels = sum(self.sections)
        self.in_proj = nn.Linear(config.hidden_size, inner + channels + self.heads, bias=False)
        self.conv1d = HyloConv1d(channels, channels, c.linear_conv_kernel_dim, groups=channels)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = HyloGatedRMSNorm(inner, c.layernorm_epsilon, group_size=self.head_dim, norm_before_gate=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: None, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        z, xbc, dt = linear(self.in_proj, x).split([self.heads * self.head_dim, sum(self.sections), self.heads], dim=-1)
        dt = step_sizes(dt, self.dt_bias)
        if cache is None:
            y, _ = self.scan((xbc, dt), inputs.padding, (None, None), keep=False)
        else:
            y = cache.advance(self.layer, self.scan, (xbc, dt), inputs.padding)
        return linear(self.out_proj, self.norm(y.flatten(2), z))

    def scan(
        self, parts: tuple[Tensor, ...], padding: Tensor | None, states: States, keep: bool = True, in_place: bool = False
    ) -> tuple[Tensor, States]:
        """Convolve and run the recurrence.

        Args:
            parts: x, B and C side by side [batch, tokens, channels], and steps dt [batch, tokens, heads].
            padding: bool [batch, tokens], False at padding, where nothing is written; None: none.
            states: of the convolution [batch, channels, taps - 1] and of the recurrence [batch, heads, head_dim, state]; or
                None.
            keep: return the states after the tokens.
            in_place: they may be the ones given, changed.

        Returns:
            [batch, tokens, heads, head_dim], and the states after them, None without `keep`.
        """
        xbc, dt = parts
        xbc, conv_state = convolve(xbc, [self.conv1d], states[0], padding, keep, in_place)
        shared_x, shared_b, state_out = xbc.split(self.sections, dim=-1)
        value, state_in = (part.unflatten(-1, (self.groups, -1)).repeat_interleave(self.heads // self.groups, dim=2)
                           for part in (shared_x, shared_b))  # fmt: skip
        state_out = state_out.unflatten(-1, (self.heads, -1))
        if padding is not None:
            dt = dt.masked_fill(~padding[..., None], 0.0)  # no decay, nothing written
        rate, state = -self.A_log.exp(), states[1]
        if state is not None and _one_step(xbc.shape[1], state, padding):
            state = state if in_place else state.clone()
            return ssd_step(value, dt, rate, state_in, state_out, self.D, state), (conv_state, state)
        y, state = ssd(value, dt, rate, state_in, state_out, self.D, state, output_final_state=keep)
        return y, (conv_state, state)


class HyloGatedDeltaNet(nn.Module):
    """`G`: Gated DeltaNet, S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T, o_t = S_t^T q_t."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    b_proj: nn.Linear
    g_proj: nn.Linear
    q_conv1d: HyloConv1d
    k_conv1d: HyloConv1d
    v_conv1d: HyloConv1d
    # query, key, value, log decay, writing strength, state -> outputs, state
    recurrence: Recurrence = staticmethod(gated_delta_rule)

    def __init__(self, config: HyloConfig, layer: int) -> None:
        super().__init__()
        c = config.architecture()
        self.layer, self.heads = layer, c.linear_num_heads
        keys, values = self.heads * c.linear_key_head_dim, self.heads * c.linear_value_head_dim
        for name, width in {"q": keys, "k": keys, "v": values, "g": values, "b": self.heads}.items():
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, width, bias=False))
        self.build_decay(config)
        for name, width in {"q": keys, "k": keys, "v": values}.items():
            conv = HyloConv1d(width, width, c.linear_conv_kernel_dim, groups=width, bias=False)
            setattr(self, f"{name}_conv1d", conv)
        self.sections = [keys, keys, values]
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.o_norm = HyloGatedRMSNorm(c.linear_value_head_dim, c.layernorm_epsilon)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def build_decay(self, config: HyloConfig) -> None:
        """Build the map to one decay a head, and its bias."""
        self.a_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))

    def projections(self) -> list[list[nn.Module]]:
        """Maps of the input to q, k and v together, the gate, the writing strength and the decay."""
        return [[self.q_proj, self.k_proj, self.v_proj], [self.g_proj], [self.b_proj], [self.a_proj]]

    def gates(self, raw: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log decays [batch, new tokens, heads], fp32, and writing strengths from their projections."""
        return scalar_gates(raw, strength, self.A_log, self.dt_bias)

    def step(self, q: Tensor, k: Tensor, v: Tensor, raw: Tensor, strength: Tensor, state: Tensor) -> Tensor:
        """Take the recurrence's step of one token; the state is changed.

        Args:
            q, k, v: [batch, 1, heads, channels].
            raw, strength: projections of decay and writing strength, [batch, 1, heads].
            state: float32 [batch, heads, key channels, value channels].

        Returns:
            [batch, 1, heads, value channels].
        """
        return delta_rule_step(q, k, v, raw, strength, state, (self.A_log, self.dt_bias))

    def forward(self, x: Tensor, inputs: SequenceInputs, rope: None, cache: HyloCache | None) -> Tensor:
        """Apply the mixer to x: [batch, new tokens, hidden] -> the same shape."""
        qkv, gate, strength, raw = project(x, self.projections())
        parts = (qkv, raw, strength)
        if cache is None:
            out, _ = self.scan(parts, inputs.padding, (None, None), keep=False)
        else:
            out = cache.advance(self.layer, self.scan, parts, inputs.padding)
        return linear(self.o_proj, self.o_norm(out, gate.reshape(out.shape)).flatten(2))

    def scan(
        self, parts: tuple[Tensor, ...], padding: Tensor | None, states: States, keep: bool = True, in_place: bool = False
    ) -> tuple[Tensor, States]:
        """Convolve and run the recurrence.

        Args:
            parts: q, k and v side by side [batch, tokens, channels], and the projections of decay and writing strength.
            padding: bool [batch, tokens], False at padding, where nothing is written; None: none.
            states: of the convolution [batch, channels, taps - 1] and of the recurrence [batch, heads, keys, values]; or None.
            keep: return the states after the tokens.
            in_place: they may be the ones given, changed.

        Returns:
            [batch, tokens, heads, value channels], and the states after them, None without `keep`.
        """
        qkv, raw, strength = parts
        convolutions = [self.q_conv1d, self.k_conv1d, self.v_conv1d]
        qkv, conv_state = convolve(qkv, convolutions, states[0], padding, keep, in_place)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in qkv.split(self.sections, dim=-1))
        state = states[1]
        if state is not None and _one_step(query.shape[1], state, padding):
            state = state if in_place else state.clone()
            return self.step(query, key, value, raw, strength, state), (conv_state, state)
        decay, beta = self.gates(raw, strength)
        if padding is not None:  # no decay, nothing written
            absent = ~padding
            decay = decay.masked_fill(absent.view(*absent.shape, *[1] * (decay.dim() - 2)), 0.0)
            beta = beta.masked_fill(absent[..., None], 0.0)
        out, state = self.recurrence(query, key, value, decay, beta, state, output_final_state=keep)
        return out, (conv_state, state)


class HyloKimiDeltaAttention(HyloGatedDeltaNet):
    """`K`: Gated DeltaNet with a decay for each key channel, S_t = Diag(exp(g_t)) S_{t-1} + ...; g from a map of low rank."""

    recurrence: Recurrence = staticmethod(kda)

    def build_decay(self, config: HyloConfig) -> None:
        """Build the low-rank map to the decays, and a bias for each key channel."""
        c = config.architecture()
        keys = self.heads * c.linear_key_head_dim
        self.f_a_proj = nn.Linear(config.hidden_size, c.kda_decay_rank, bias=False)
        self.f_b_proj = nn.Linear(c.kda_decay_rank, keys, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(keys))

    def projections(self) -> list[list[nn.Module]]:
        """Maps of the input to q, k and v together, the gate, the writing strength and the first of the decay's two."""
        return [[self.q_proj, self.k_proj, self.v_proj], [self.g_proj], [self.b_proj], [self.f_a_proj]]

    def gates(self, raw: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log decays [batch, new tokens, heads, key channels], fp32, and writing strengths."""
        return channel_gates(linear(self.f_b_proj, raw), strength, self.A_log, self.dt_bias)

    def step(self, q: Tensor, k: Tensor, v: Tensor, raw: Tensor, strength: Tensor, state: Tensor) -> Tensor:
        """Take the recurrence's step of one token, as `HyloGatedDeltaNet.step`; `raw` is [batch, 1, rank of the decay]."""
        return delta_rule_step(q, k, v, *self.gates(raw, strength), state)
