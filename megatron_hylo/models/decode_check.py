"""Check of the kernels of a decode step against their definitions in fp32 torch, at a model's shapes."""

from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import ATTENTION_SYMBOL, LINEAR_SYMBOLS, MLA_SYMBOL, complete
from megatron_hylo.kernels.causal_conv1d import causal_conv1d
from megatron_hylo.kernels.decode_attention import decode_attention
from megatron_hylo.kernels.matvec import matvec
from megatron_hylo.kernels.recurrence_step import delta_rule_step, ssd_step
from megatron_hylo.kernels.registry import in_use, override
from megatron_hylo.models.kernel_check import LIMITS, Check

BATCH, CACHED, ROWS = 2, 3000, 1024  # sequences, tokens before the step, rows of a matrix
Case = tuple[str, str, Callable[..., Tensor], dict[str, Tensor]]  # operation, shape, run, inputs in fp32


def check_decode_kernels(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, known: Container[tuple[str, str]] = ()
) -> list[Check]:
    """Run one token through every operation of a decode step that the model's layers use.

    Args:
        config: gives layers and shapes.
        dtype: of weights and activations, bf16 or fp32; gates and states stay fp32.
        device: where.
        known: operations and shapes to leave out.
    """
    generator, found = torch.Generator().manual_seed(0), []

    def draw(*shape: int) -> Tensor:
        """Draw normal numbers of this shape on the device, from a seed of the check's own."""
        return torch.randn(shape, generator=generator).to(device)

    with torch.no_grad():
        for operation, shape, run, inputs in _cases(config, draw):
            if (operation, shape) in known:
                continue
            given = {name: x if name in ("state", "decay", "dt") else x.to(dtype) for name, x in inputs.items()}
            ours = run(**{name: x.clone() for name, x in given.items()})
            chosen = in_use()[operation]
            with override(operation, "torch"):
                theirs = run(**{name: x.float() for name, x in given.items()})
            error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
            found.append(Check(operation, shape, chosen, error, "output", LIMITS[dtype]))
    return found


def _cases(c: ModelConfig, draw: Callable[..., Tensor]) -> Iterator[Case]:
    for symbol in dict.fromkeys(c.mixers):
        if symbol in MIXER_CASES:
            yield MIXER_CASES[symbol](c, draw)
    if MLA_SYMBOL in c.mixers:
        yield _packed(_latents(c, draw), c.kv_lora_rank)
    if ATTENTION_SYMBOL in c.mixers:
        yield _packed(_attention(c, draw))
    yield (
        "matvec", f"{ROWS:,} x {c.hidden_size:,}, SwiGLU",
        lambda x, weight, residual: matvec(x, weight, residual, swiglu=True),
        {"x": draw(1, 1, c.hidden_size), "weight": draw(ROWS, c.hidden_size), "residual": draw(1, 1, ROWS // 2)},
    )  # fmt: skip
    if set(c.mixers) & set(LINEAR_SYMBOLS):
        taps, channels = c.linear_conv_kernel_dim, c.hidden_size
        yield (
            "causal_conv1d_step", f"{channels:,} channels", _convolve,
            {"x": draw(BATCH, 1, channels), "before": draw(BATCH, channels, taps - 1), "weight": draw(channels, taps)},
        )  # fmt: skip


def _latents(c: ModelConfig, draw: Callable[..., Tensor]) -> Case:
    heads, rank, width = c.num_attention_heads, c.kv_lora_rank, c.kv_lora_rank + c.qk_pos_emb_head_dim
    return (
        "decode_attention", f"{heads} heads on latents of {rank} + {width - rank}",
        lambda q, k: decode_attention(q, k, rank, width**-0.5),
        {"q": draw(BATCH, heads, width), "k": draw(BATCH, CACHED, 1, width)},
    )  # fmt: skip


def _packed(case: Case, rank: int = 0) -> Case:
    """The same attention with the sequences' rows one after the other, and lengths of their own."""
    operation, shape, _, inputs = case

    def run(q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        """Attend with two sequences of unlike lengths out of the rows of both, [1, 2 CACHED, groups, channels]."""
        starts, length = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([CACHED, 7], [CACHED, 300]))
        values = rank if v is None else v.flatten(0, 1)[None]
        return decode_attention(q, k.flatten(0, 1)[None], values, q.shape[-1] ** -0.5, length, starts=starts)

    return operation, f"{shape}, packed lengths", run, inputs


def _attention(c: ModelConfig, draw: Callable[..., Tensor]) -> Case:
    heads, groups, width = c.num_attention_heads, c.num_query_groups, c.kv_channels
    return (
        "decode_attention", f"{heads}/{groups} heads, {width} wide",
        lambda q, k, v: decode_attention(q, k, v, width**-0.5),
        {"q": draw(BATCH, heads, width), "k": draw(BATCH, CACHED, groups, width), "v": draw(BATCH, CACHED, groups, width)},
    )  # fmt: skip


def _convolve(x: Tensor, before: Tensor, weight: Tensor) -> Tensor:
    y, state = causal_conv1d(x, weight, None, "silu", before, output_final_state=True)
    assert state is not None
    return torch.cat([y.flatten(), state.flatten()])


def _delta_rule(c: ModelConfig, draw: Callable[..., Tensor], operation: str, *channels: int) -> Case:
    heads, keys, values = c.linear_num_heads, c.linear_key_head_dim, c.linear_value_head_dim

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        """Step once; returns the outputs and the changed state as one float32 vector, so that both are compared."""
        out = delta_rule_step(q, k, v, -decay.abs(), beta.sigmoid(), state)
        return torch.cat([out.flatten().float(), state.flatten()])

    inputs = {"q": draw(BATCH, 1, heads, keys), "k": draw(BATCH, 1, heads, keys), "v": draw(BATCH, 1, heads, values)}
    inputs |= {"decay": draw(BATCH, 1, heads, *channels), "beta": draw(BATCH, 1, heads)}
    inputs |= {"state": draw(BATCH, heads, keys, values)}
    return operation, f"{heads} heads, {keys} x {values}, one token", run, inputs


def _mamba2(c: ModelConfig, draw: Callable[..., Tensor]) -> Case:
    heads, width, size = c.mamba_num_heads, c.mamba_head_dim, c.mamba_state_dim

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
        """Step once; returns the outputs and the changed state as one float32 vector, so that both are compared."""
        rate = -torch.linspace(0.5, 2, heads, device=x.device)
        out = ssd_step(x, dt.abs(), rate, B, C, torch.ones_like(rate), state)
        return torch.cat([out.flatten().float(), state.flatten()])

    inputs = {"x": draw(BATCH, 1, heads, width), "dt": draw(BATCH, 1, heads), "B": draw(BATCH, 1, heads, size)}
    inputs |= {"C": draw(BATCH, 1, heads, size), "state": draw(BATCH, heads, width, size)}
    return "ssd", f"{heads} heads, {width} x {size}, one token", run, inputs


MIXER_CASES: dict[str, Callable[[ModelConfig, Callable[..., Tensor]], Case]] = {
    "*": _attention,
    "+": _latents,
    "M": _mamba2,
    "G": lambda c, draw: _delta_rule(c, draw, "gated_delta_rule"),
    "K": lambda c, draw: _delta_rule(c, draw, "kda", c.linear_key_head_dim),
}
complete(MIXER_CASES, "models/decode_check.py: MIXER_CASES", besides="W")  # whose step is torch's own
