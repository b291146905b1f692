"""Cases of the kernel check: the operations of each mixer and of the output head, each with its definition in fp32 torch.

A mixer's cases are a function in `MIXER_CASES`; a case names the operation as kernels/registry.py does, draws inputs at the
model's shapes, and has a function that runs the kernels and one that defines the result. kernel_check.py compares them.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, complete
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.causal_conv1d import causal_conv1d_sections
from megatron_hylo.kernels.elementwise import elementwise
from megatron_hylo.kernels.flash_attention_3 import Documents, choose_forward
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule, recurrent_gated_delta_rule
from megatron_hylo.kernels.head_softmax import head_softmax, unsupported
from megatron_hylo.kernels.kda import kda, recurrent_kda
from megatron_hylo.kernels.norm import gated_rms_norm
from megatron_hylo.kernels.recurrence_part import DeltaRulePart, KdaPart
from megatron_hylo.kernels.registry import select
from megatron_hylo.kernels.residual_norm import backward_programs, rms_norm_and_residual
from megatron_hylo.kernels.rope import apply_rope, rope_cos_sin, rope_frequencies
from megatron_hylo.kernels.sections import split_sections
from megatron_hylo.kernels.ssd import recurrent_ssd, ssd
from megatron_hylo.kernels.window_attention import window_attention
from megatron_hylo.parallel.recurrence import delta_rule_over_ranks, ssd_over_ranks

TOKENS = 300  # more than one chunk of every kernel, and not whole ones
DELTA_TOKENS = 140  # the same for Gated DeltaNet, whose definition keeps a state a token for its gradient
PADDING = 8  # channels that are nobody's
DOCUMENTS = [(slice(a, b),) * 2 for a, b in ((0, 140), (140, 141), (141, TOKENS))]
VOCABULARY = 10_007  # more than one block of the head's kernel


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    shape: str  # all that the case takes from the configuration: a check that passed is kept by it
    run: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    inputs: dict[str, Tensor]  # fp32; those in `kept` stay so
    kept: tuple[str, ...] = ()
    forward_only: bool = False


@dataclass(frozen=True)
class Draw:
    """Random inputs [1, tokens, ...] on the device."""

    generator: torch.Generator
    device: torch.device

    def normal(self, *shape: int, tokens: int = TOKENS) -> Tensor:
        """Draw from the standard normal distribution: [1, tokens, *shape]."""
        return torch.randn(1, tokens, *shape, generator=self.generator).to(self.device)

    def between(self, low: float, high: float, *shape: int, tokens: int = TOKENS) -> Tensor:
        """Draw evenly from low to high: [1, tokens, *shape]."""
        return (low + (high - low) * torch.rand(1, tokens, *shape, generator=self.generator)).to(self.device)


def all_cases(c: ModelConfig, device: torch.device, parts: bool) -> Iterator[Case]:
    """Cases of a model's layers and head; with `parts` also of sequences that are split over ranks."""
    draw = Draw(torch.Generator().manual_seed(0), device)
    for symbol in dict.fromkeys(c.mixers):
        yield from MIXER_CASES[symbol](c, draw, parts)
    yield from _compiled(c, draw)
    yield from _fused_projections(c, draw)
    if select("head_softmax", "triton", unsupported(torch.empty(0, dtype=torch.bfloat16, device=device))) == "triton":
        teacher = 3 * torch.randn(64, VOCABULARY, generator=draw.generator).to(device).bfloat16().float()
        student = 3 * torch.randn(64, VOCABULARY, generator=draw.generator).to(device)
        yield Case(
            "head_softmax", f"vocabulary {VOCABULARY:,}",
            lambda student: _HeadKL.apply(student, teacher), lambda student: _head_kl(student, teacher), {"student": student},
        )  # fmt: skip


def _attention_cases(c: ModelConfig, draw: Draw, parts: bool) -> Iterator[Case]:
    yield from _softmax_cases(c, draw, parts, c.kv_channels, c.kv_channels)


def _mla_cases(c: ModelConfig, draw: Draw, parts: bool) -> Iterator[Case]:
    yield from _softmax_cases(c, draw, parts, c.qk_head_dim + c.qk_pos_emb_head_dim, c.v_head_dim)


def _softmax_cases(c: ModelConfig, draw: Draw, parts: bool, width: int, values: int) -> Iterator[Case]:
    heads, groups, scale = c.num_attention_heads, c.num_query_groups, width**-0.5
    for queries, of in ((TOKENS, ""), *([(TOKENS // 2, ", queries of the last half")] if parts else [])):
        yield Case(
            "attention", f"{heads}/{groups} heads, {width} and {values} wide{of}",
            lambda q, k, v: attention(q, k, v, scale), lambda q, k, v: _attention(q, k, v, scale),
            {"q": draw.normal(heads, width, tokens=queries), "k": draw.normal(groups, width), "v": draw.normal(groups, values)},
        )  # fmt: skip
    inputs = {"q": draw.normal(heads, width), "k": draw.normal(groups, width), "v": draw.normal(groups, values)}
    with torch.no_grad():
        if choose_forward(*(x.bfloat16() for x in inputs.values())) == "torch":
            return
    for documents, of in ((None, ""), (DOCUMENTS, f", {len(DOCUMENTS)} documents")):
        yield Case(
            "attention_forward", f"{heads}/{groups} heads, {width} and {values} wide{of}",
            functools.partial(attention, scale=scale, documents=documents),
            functools.partial(_attention_by_document, scale=scale, documents=documents or [(slice(0, TOKENS),) * 2]),
            inputs, forward_only=True,
        )  # fmt: skip


def _window_cases(c: ModelConfig, draw: Draw, parts: bool) -> Iterator[Case]:
    heads, groups, width = c.num_attention_heads, c.num_query_groups, c.kv_channels
    window, scale = min(c.attention_window, TOKENS // 3), width**-0.5  # several blocks
    yield from _softmax_cases(c, draw, parts, width, width)  # of a sequence that one window holds
    yield Case(
        "window_attention", f"{heads}/{groups} heads, {width} wide, windows of {window}",
        lambda q, k, v: window_attention(q, k, v, scale, window), lambda q, k, v: _attention(q, k, v, scale, window),
        {"q": draw.normal(heads, width), "k": draw.normal(groups, width), "v": draw.normal(groups, width)},
    )  # fmt: skip


def _gated_delta_net_cases(c: ModelConfig, draw: Draw, parts: bool) -> Iterator[Case]:
    inputs, shape = _delta_rule_inputs(c, draw, c.linear_num_heads)
    yield from _delta_rule_cases(
        c, draw, parts, "gated_delta_rule", DeltaRulePart, gated_delta_rule, recurrent_gated_delta_rule, inputs
    )
    if draw.device.type == "cuda":  # as recomputed layers have it; plain torch knows no difference
        yield Case(
            "gated_delta_rule", f"{shape}, states kept", lambda **x: gated_delta_rule(**x, keep_states=True)[0],
            lambda **x: recurrent_gated_delta_rule(**x)[0], inputs, ("g",),
        )  # fmt: skip


def _kda_cases(c: ModelConfig, draw: Draw, parts: bool) -> Iterator[Case]:
    inputs, _ = _delta_rule_inputs(c, draw, c.linear_num_heads, c.linear_key_head_dim)
    yield from _delta_rule_cases(c, draw, parts, "kda", KdaPart, kda, recurrent_kda, inputs)


def _delta_rule_inputs(c: ModelConfig, draw: Draw, *decays: int) -> tuple[dict[str, Tensor], str]:
    heads, keys, values = c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim
    names = {"q": keys, "k": keys, "v": values}
    inputs = {name: draw.normal(heads, width, tokens=DELTA_TOKENS) for name, width in names.items()}
    inputs |= {"g": draw.between(-1, 0, *decays, tokens=DELTA_TOKENS), "beta": draw.between(0, 1, heads, tokens=DELTA_TOKENS)}
    return inputs, f"{heads} heads, {keys} x {values}"


def _delta_rule_cases(
    c: ModelConfig,
    draw: Draw,
    parts: bool,
    operation: str,
    part: type[DeltaRulePart] | type[KdaPart],
    run: Callable[..., tuple[Tensor, Tensor | None]],
    definition: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: dict[str, Tensor],
) -> Iterator[Case]:
    heads, keys, values = c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim
    yield from _convolutions(c, [heads * keys, heads * keys, heads * values], draw, parts)
    shape = f"{heads} heads, {keys} x {values}"
    yield Case(operation, shape, lambda **x: run(**x)[0], lambda **x: definition(**x)[0], inputs, ("g",))
    if parts:  # with states that outlive their part
        inputs = inputs | {"g": inputs["g"] / 70, "beta": inputs["beta"] / 16}
        yield Case(
            operation, f"{shape}, split", functools.partial(delta_rule_over_ranks, _Middle(), kind=part),
            lambda **x: _middle_part(definition, **x), inputs, ("g",),
        )  # fmt: skip


def _mamba2_cases(c: ModelConfig, draw: Draw, parts: bool) -> Iterator[Case]:
    heads, width, state, groups = c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_dim, c.num_query_groups
    yield from _convolutions(c, [groups * (width + state) + heads * state], draw, parts)
    rate = -torch.linspace(0.5, 2, heads, device=draw.device)
    scan = functools.partial(recurrent_ssd, A=rate)
    inputs = {"x": draw.normal(heads, width), "dt": draw.between(0, 0.5, heads), "B": draw.normal(heads, state)}
    inputs |= {"C": draw.normal(heads, state)}
    shape = f"{heads} heads, {width} x {state}"
    yield Case("ssd", shape, lambda **x: ssd(A=rate, **x)[0], lambda **x: scan(**x)[0], inputs, ("dt",))
    if parts:
        inputs = inputs | {"dt": inputs["dt"] / 70}
        none = torch.zeros(heads, device=draw.device)
        yield Case(
            "ssd", f"{shape}, split", lambda **x: ssd_over_ranks(_Middle(), A=rate, D=none, reset_mask=None, **x),
            lambda **x: _middle_part(scan, **x), inputs, ("dt",),
        )  # fmt: skip


MIXER_CASES: dict[str, Callable[[ModelConfig, Draw, bool], Iterator[Case]]] = {
    "*": _attention_cases,
    "+": _mla_cases,
    "M": _mamba2_cases,
    "G": _gated_delta_net_cases,
    "K": _kda_cases,
    "W": _window_cases,
}
complete(MIXER_CASES, "models/kernel_cases.py: MIXER_CASES")


class _Middle:
    """Stand-in for the third of five context-parallel ranks with equal parts and equal upstream gradients."""

    rank = 2

    def gather_affine_maps(self, transition: Tensor, increment: Tensor, backward: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Return this rank's map for all five ranks."""
        return [(transition, increment)] * 5


def _middle_part(recurrence: Callable[..., tuple[Tensor, Tensor | None]], **inputs: Tensor) -> Tensor:
    """Outputs of the third of five equal parts, with the gradient that the later parts' outputs send to it."""
    others = {name: x.detach() for name, x in inputs.items()}
    state = None
    for _ in range(_Middle.rank):
        _, state = recurrence(initial_state=state, output_final_state=True, **others)
    out, state = recurrence(initial_state=state, output_final_state=True, **inputs)
    for _ in range(_Middle.rank):
        later, state = recurrence(initial_state=state, output_final_state=True, **others)
        out = out + (later - later.detach())
    return out


def _compiled(c: ModelConfig, draw: Draw) -> Iterator[Case]:
    """Cases for a rotation and a gated norm compiled by torch.compile."""
    heads, width, device = c.num_attention_heads, c.kv_channels, draw.device
    if not set(c.mixers) <= set(LINEAR_SYMBOLS):
        frequencies = rope_frequencies(width, c.rotary_base, device=device)
        cos, sin = rope_cos_sin(torch.arange(TOKENS, device=device), frequencies)
        rotation: dict[str, Any] = dict(cos=cos, sin=sin, interleaved=False)
        yield Case(
            "elementwise", f"rotation of {heads} heads, {width} wide", functools.partial(elementwise(apply_rope), **rotation),
            functools.partial(apply_rope, **rotation), {"x": draw.normal(heads, width)},
        )  # fmt: skip
    if set(c.mixers) & set(LINEAR_SYMBOLS):
        settings: dict[str, Any] = dict(eps=1e-5, norm_before_gate=True)
        weight = torch.linspace(0.5, 2, width, device=device)
        yield Case(
            "elementwise", f"gated norm of {heads} heads, {width} wide",
            functools.partial(elementwise(gated_rms_norm), **settings), functools.partial(gated_rms_norm, **settings),
            {"x": draw.normal(heads, width), "gate": draw.normal(heads, width), "weight": weight},
        )  # fmt: skip


def _fused_projections(c: ModelConfig, draw: Draw) -> Iterator[Case]:
    """The norm before a layer with its residual, and what becomes of the sections of a linear mixer's projection."""
    width, eps = c.hidden_size, c.layernorm_epsilon
    rows = 3 * backward_programs(draw.device) + 1  # several for each program
    yield Case(
        "rms_norm", f"{width:,} channels",
        lambda x, weight: torch.stack(rms_norm_and_residual(x, weight, eps)),
        lambda x, weight: torch.stack([F.rms_norm(x, weight.shape, weight, eps), x]),
        {"x": draw.normal(width, tokens=rows), "weight": torch.linspace(0.5, 2, width, device=draw.device)},
    )  # fmt: skip
    if set(c.mixers) & set(LINEAR_SYMBOLS):
        widths = [width, c.num_attention_heads]
        yield Case(
            "concatenate", f"{width:,} and {widths[1]} channels, {PADDING} of padding",
            lambda x: torch.cat([i * part for i, part in enumerate(split_sections(x, widths), 1)], -1),
            lambda x: torch.cat([i * part for i, part in enumerate(x.split([*widths, PADDING], -1)[:2], 1)], -1),
            {"x": draw.normal(sum(widths) + PADDING)},
        )  # fmt: skip


def _convolutions(c: ModelConfig, widths: list[int], draw: Draw, parts: bool) -> Iterator[Case]:
    """Cases for a convolution of channels in sections of these widths, as the layer has them."""
    taps, channels = c.linear_conv_kernel_dim, sum(widths)
    shape = f"{' + '.join(f'{width:,}' for width in widths)} channels, {taps} taps"

    def convolve(x: Tensor, weight: Tensor, before: Tensor | None = None) -> Tensor:
        """Convolve the sections of x [b, t, channels]; returns them joined."""
        return torch.cat(causal_conv1d_sections(x.split(widths, -1), weight, None, "silu", before), -1)

    inputs = {
        "x": draw.normal(channels),
        "weight": torch.linspace(-1, 1, taps * channels, device=draw.device).reshape(channels, -1),
    }
    yield Case(
        "causal_conv1d", shape,
        convolve, lambda x, weight: F.silu(_convolve(x, weight)), inputs,
    )  # fmt: skip
    if parts:
        yield Case(
            "causal_conv1d", f"{shape}, split",
            convolve,
            lambda x, weight, before: F.silu(_convolve(torch.cat([before.transpose(1, 2), x], 1), weight)[:, taps - 1 :]),
            inputs | {"before": draw.normal(taps - 1, tokens=channels)},
        )  # fmt: skip


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    taps, channels = weight.shape[1], x.shape[2]
    return F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], groups=channels).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    whole, before = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device), k.shape[1] - q.shape[1]
    unseen = whole.triu(1 + before) | (whole.tril(before - window) if window else False)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


def _attention_by_document(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents) -> Tensor:
    return torch.cat([_attention(q[:, own], k[:, seen], v[:, seen], scale) for own, seen in documents], 1)


def _head_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True).reshape(1)


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        """Return KL(teacher || student) summed over tokens, [1], of logits [n, V]; keeps the gradient that the kernel made."""
        logits, dtype = student.clone(), student.dtype
        scales = torch.tensor([1.0, 0.0], device=student.device)
        kl, _, gradient = head_softmax(logits, teacher.to(dtype), None, 0, scales, grad_dtype=dtype)
        ctx.save_for_backward(gradient)
        return kl.reshape(1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        """Return the student's gradient [n, V]; the teacher has none."""
        return ctx.saved_tensors[0] * upstream.to(ctx.saved_tensors[0].dtype), None
