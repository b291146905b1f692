"""The delta rule with a decay for each key channel, the recurrence of Kimi Delta Attention, in chunks.

From "Kimi Linear" (arXiv:2510.26692, section 3): the gated delta rule whose state decays by Diag(exp(g_t)), not exp(g_t).
On CUDA fla's Triton kernels run. `recurrent_kda` is the definition, token by token: the oracle, and the decode step.
"""

import importlib

import torch
import torch.nn.functional as F

from megatron_hylo.kernels.gated_delta_rule import (
    delta_rule_by_token,
    fla_unsupported,
    normalised,
    unit_lower_inverse,
)
from megatron_hylo.kernels.registry import select
from megatron_hylo.kernels.ssd import segment_sum

FLA_MODULE = "fla.ops.kda"
CHUNK = 16  # tokens; plain torch holds a decay for each pair of a chunk's tokens and each channel


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
    pad = -t % chunk  # padded tokens have g = 0 and k = 0: no decay, nothing written

    def chunks(value: torch.Tensor) -> torch.Tensor:  # [b, t, h, ...] -> [b, h, chunks, chunk, ...]
        padded = F.pad(value.to(wide), (0, 0) * (value.dim() - 2) + (0, pad))
        return padded.unflatten(1, (-1, chunk)).movedim(3, 1)

    queries = chunks(normalised(q.to(wide)) * q.shape[-1] ** -0.5)
    keys = chunks(normalised(k.to(wide)))
    strength = chunks(beta)[..., None]
    log_decay = chunks(g)  # [b, h, n, c, dk]
    decay = segment_sum(log_decay.transpose(-1, -2)).exp().movedim(-3, -1)  # D: [b, h, n, c, c, dk]
    since_start = log_decay.cumsum(-2).exp()  # d: [b, h, n, c, dk]

    reached = decay * keys[..., None, :, :]  # keys j as token i meets them: [b, h, n, i, j, dk]
    inverse = unit_lower_inverse(strength * (reached @ keys[..., None]).squeeze(-1))
    u = inverse @ (chunks(v) * strength)  # v_new for a zero state: [b, h, n, c, dv]
    w = inverse @ (keys * strength * since_start)  # v_new = u - w S: [b, h, n, c, dk]
    to_end = reached[..., -1, :, :].transpose(-1, -2)  # [b, h, n, dk, c]

    state = u.new_zeros(*u.shape[:2], k.shape[-1], v.shape[-1]) if initial_state is None else initial_state.to(wide)
    before: list[torch.Tensor] = []
    v_new: list[torch.Tensor] = []
    for chunk_u, chunk_w, key, kept in zip(
        u.unbind(2), w.unbind(2), to_end.unbind(2), since_start[:, :, :, -1, :, None].unbind(2), strict=True
    ):
        before.append(state)
        v_new.append(chunk_u - chunk_w @ state)
        state = state * kept + key @ v_new[-1]
    o = (queries * since_start) @ torch.stack(before, 2)
    o = o + (reached @ queries[..., None]).squeeze(-1) @ torch.stack(v_new, 2)
    o = o.movedim(1, 3).flatten(1, 2)[:, :t]  # [b, t, h, dv]
    return o.to(v.dtype), state if output_final_state else None


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
