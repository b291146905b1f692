"""The delta rule with a decay for each key channel, the recurrence of Kimi Delta Attention, in chunks.

From "Kimi Linear" (arXiv:2510.26692, section 3): the gated delta rule whose state decays by Diag(exp(g_t)), not exp(g_t).
On CUDA fla's Triton kernels run. `recurrent_kda` is the definition, token by token: the oracle, and the decode step.
"""

import importlib

import torch

from megatron_hylo.kernels.gated_delta_rule import (
    by_chunks,
    delta_rule_by_token,
    fla_unsupported,
    normalised,
    pass_state,
    unit_lower_inverse,
)
from megatron_hylo.kernels.registry import exporting, select
from megatron_hylo.kernels.ssd import segment_sum

FLA_MODULE = "fla.ops.kda"
CHUNK = 16  # tokens in plain torch
FACTORED = 60.0  # nats that a channel may lose in a chunk: e^60 times a few hundred channels is far from fp32's end


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> None:
    heads = q.shape[:3]
    if k.shape != q.shape or v.shape[:3] != heads or g.shape != q.shape or beta.shape != heads or q.shape[1] < 1:
        raise ValueError(
            f"q {tuple(q.shape)} [b, t, h, dk] needs t >= 1, k and g like q, v [b, t, h, dv], beta [b, t, h], got "
            f"{tuple(k.shape)}, {tuple(g.shape)}, {tuple(v.shape)}, {tuple(beta.shape)}"
        )


def kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention: S = Diag(exp(g_t)) S_{t-1};  S_t = S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = S_t^T q_t / sqrt(dk).

    q and k are L2-normalised here, over dk.

    Args:
        q, k: [b, t, h, dk], floating.
        v: [b, t, h, dv], floating.
        g: [b, t, h, dk], log decay <= 0, float32.
        beta: [b, t, h], writing strength in [0, 1].
        initial_state: [b, h, dk, dv] or None for zeros.
        output_final_state: also return the state after the last token.

    Returns:
        o [b, t, h, dv] in v's dtype, and the state [b, h, dk, dv] (float32; float64 for float64 v) or None.

    Raises:
        ValueError: shapes that disagree.
    """
    _check(q, k, v, g, beta)
    if q.shape[1] == 1:  # one token: the recurrence itself is the fastest
        return recurrent_kda(q, k, v, g, beta, initial_state, output_final_state)
    differentiates = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, g, beta, initial_state)
    )
    if select("kda", "fla", fla_unsupported(k, v, differentiates, FLA_MODULE)) == "fla":
        state = None if initial_state is None else initial_state.float()
        return importlib.import_module(FLA_MODULE).chunk_kda(
            q.to(v.dtype), k.to(v.dtype), v, g.float(), beta.to(v.dtype), initial_state=state,
            output_final_state=output_final_state, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
    with torch.autocast(v.device.type, enabled=False):
        return _chunked(q, k, v, g, beta, initial_state, output_final_state)


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Chunked form (Kimi Linear, section 3.1) with v_new_i = beta_i (v_i - S^T k_i), the values that the state receives.

    With D_ij[d] the decay of channel d from token j to i and d_i that from the chunk's start to i, a chunk's v_new solve
    (I + tril(beta_i sum_d k_i D_ij k_j, -1)) v_new = beta v - beta (d k) S_0.
    """
    t, wide = v.shape[1], torch.promote_types(v.dtype, torch.float32)
    chunk = min(CHUNK, 1 << (t - 1).bit_length())  # a power of two, for `unit_lower_inverse`
    # padded tokens have g = 0 and k = 0: no decay, nothing written
    queries = normalised(by_chunks(q, chunk, wide)) * q.shape[-1] ** -0.5  # [n, b h, c, dk]
    keys = normalised(by_chunks(k, chunk, wide))
    values, strength, log_decay = by_chunks(v, chunk, wide), by_chunks(beta, chunk, wide), by_chunks(g, chunk, wide)
    total = log_decay.double().cumsum(-2)  # differences of large sums lose digits in float32
    since_start = total.exp().to(wide)  # d: [n, b h, c, dk]
    to_end = (keys * (total[..., -1:, :] - total).exp().to(wide)).transpose(-1, -2)  # [n, b h, dk, c]
    system, scores = _decayed_products(keys, queries, log_decay, total)
    inverse = unit_lower_inverse(system * strength[..., None]) * strength[..., None, :]  # v_new = inverse (v - d k S_0)
    parts = (values, keys * since_start, inverse, queries * since_start, scores, to_end, since_start[..., -1, :, None])
    o, state = pass_state(parts, initial_state, v.shape)
    return o.to(v.dtype), state if output_final_state else None


def _decayed_products(
    keys: torch.Tensor, queries: torch.Tensor, log_decay: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products of keys and of queries i with keys j <= i over the channels, each with its decay from j to i: [n, b h, c, c].

    The decay is a factor of token i and one of token j, both by the chunk's middle, so that a product of matrices does; where a
    channel loses more than `FACTORED` in a chunk these would overflow, and each pair's decay is computed.

    Args:
        keys, queries, log_decay: [n, b h, c, dk].
        total: float64, sums of `log_decay` from the chunk's start.
    """
    if keys.is_cuda or exporting():  # no choice by the data, which a captured graph or an exported program cannot make
        return _products_by_pair(keys, queries, log_decay)
    away = total - (total[..., :1, :] + total[..., -1:, :]) / 2
    strong = (total[..., 0, :] - total[..., -1, :]).amax(-1) > FACTORED  # [n, b h]
    away = away.clamp(-FACTORED / 2, FACTORED / 2)  # changes strong ones alone
    after, before = away.exp().to(keys), (keys * (-away).exp().to(keys)).transpose(-1, -2)
    system, scores = ((x * after @ before).tril() for x in (keys, queries))
    if strong.any():
        own = _products_by_pair(keys[strong], queries[strong], log_decay[strong])
        system, scores = (found.index_put((strong,), right) for found, right in zip((system, scores), own, strict=True))
    return system, scores


def _products_by_pair(keys: torch.Tensor, queries: torch.Tensor, log_decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_decayed_products` of any [..., c, dk], with a decay for each pair of tokens and each channel in memory."""
    decay = segment_sum(log_decay.transpose(-1, -2)).exp().movedim(-3, -1)  # [..., c, c, dk]
    reached = decay * keys[..., None, :, :]  # keys j as token i meets them
    return (reached @ keys[..., None]).squeeze(-1), (reached @ queries[..., None]).squeeze(-1)


def recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The definition of `kda`, one token after another: same arguments, results and errors."""
    _check(q, k, v, g, beta)
    return delta_rule_by_token(q, k, v, g, beta, initial_state, output_final_state)
