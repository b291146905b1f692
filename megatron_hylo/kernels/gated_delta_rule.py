"""The gated delta rule, the recurrence of Gated DeltaNet, in chunks.

From "Gated Delta Networks" (Yang, Kautz and Hatamizadeh, 2024, equation 10 and section 3.3): within a chunk
the delta rule's corrections are one unit-lower-triangular system (the WY form), between chunks one decayed
[dk, dv] state a head is carried. On CUDA fla's Triton kernels run, on Hopper some of ours in their place
(delta_rule_state_pass.py). `recurrent_gated_delta_rule` is the definition, token by token: the oracle, and the decode step.
"""

import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F

from megatron_hylo.kernels.delta_rule_state_pass import register as register_state_pass
from megatron_hylo.kernels.delta_rule_states import KeptStates
from megatron_hylo.kernels.registry import Unsupported, library_unsupported, select, triton_version
from megatron_hylo.kernels.ssd import segment_sum

TORCH_CHUNK = 32  # tokens in plain torch; larger ones cost more within chunks than they save between them
L2_EPS = 1e-6  # as fla's l2norm
FLA_MODULE = "fla.ops.gated_delta_rule"
FLA_MAX_KEY_DIM = 256


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> None:
    heads = q.shape[:3]
    if k.shape != q.shape or v.shape[:3] != heads or g.shape != heads or beta.shape != heads or q.shape[1] < 1:
        raise ValueError(
            f"q {tuple(q.shape)} [b, t, h, dk] needs t >= 1, k like q, v [b, t, h, dv], g and beta [b, t, h], got "
            f"{tuple(k.shape)}, {tuple(v.shape)}, {tuple(g.shape)}, {tuple(beta.shape)}"
        )


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    keep_states: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule: S = exp(g_t) S_{t-1};  S_t = S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = S_t^T q_t / sqrt(dk).

    q and k are L2-normalised here, over dk.

    Args:
        q, k: [b, t, h, dk], floating.
        v: [b, t, h, dv], floating.
        g: [b, t, h], log decay <= 0, float32.
        beta: [b, t, h], writing strength in [0, 1].
        initial_state: [b, h, dk, dv] or None for zeros.
        output_final_state: also return the state after the last token.
        keep_states: between chunks, for a faster backward pass of fla's kernels: [b, t / 64, h, dk, dv] in v's dtype.

    Returns:
        o [b, t, h, dv] in v's dtype, and the state [b, h, dk, dv] (float32; float64 for float64 v) or None.

    Raises:
        ValueError: shapes that disagree.
    """
    _check(q, k, v, g, beta)
    if q.shape[1] == 1:  # one token: the recurrence itself is the fastest
        return recurrent_gated_delta_rule(q, k, v, g, beta, initial_state, output_final_state)
    differentiates = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, g, beta, initial_state)
    )
    if delta_rule_implementation(k, v, differentiates) == "fla":
        return _fla(q, k, v, g, beta, initial_state, output_final_state, keep_states and differentiates)
    with torch.autocast(v.device.type, enabled=False):
        return _chunked(q, k, v, g, beta, initial_state, output_final_state)


def delta_rule_implementation(k: torch.Tensor, v: torch.Tensor, differentiates: bool) -> str:
    """The registry's choice for keys [b, t, h, dk] and values [b, t, h, dv]; `differentiates`: as in `fla_unsupported`."""
    implementation = select("gated_delta_rule", "fla", fla_unsupported(k, v, differentiates))
    if implementation == "fla":
        register_state_pass()  # kernels of ours that fla's functions call where they can
    return implementation


def fla_unsupported(k: torch.Tensor, v: torch.Tensor, differentiates: bool, module: str = FLA_MODULE) -> Unsupported | None:
    """Why fla cannot run on these keys [b, t, h, dk] and values [b, t, h, dv]; None if it can.

    Args:
        k, v: on the device and of the dtype in question.
        differentiates: whether a backward pass follows; fla's is wrong with some Triton versions.
        module: of fla, whose kernels they are.
    """
    unsupported = library_unsupported("fla", module, v, "pip install flash-linear-attention")
    if unsupported is not None:
        return unsupported
    if k.shape[-1] > FLA_MAX_KEY_DIM:
        return Unsupported(f"fla takes keys up to {FLA_MAX_KEY_DIM} wide, not {k.shape[-1]}")
    return triton_unsupported(torch.cuda.get_device_capability(v.device)) if differentiates else None


@functools.cache
def triton_unsupported(capability: tuple[int, int]) -> Unsupported | None:
    """Why fla refuses to train on this GPU, before it does: Triton 3.4.0 to 3.7.0 on Hopper without tilelang."""
    version = triton_version()
    if capability[0] != 9 or not (3, 4, 0) <= version < (3, 7, 1) or importlib.util.find_spec("tilelang"):
        return None
    return Unsupported(
        f"fla refuses to train on Hopper with Triton {'.'.join(map(str, version))}: wrong gradients, fla issue 640",
        "pip install 'triton>=3.7.1' (or tilelang)",
    )


def _fla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    keep_states: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, g, state = q.to(v.dtype), k.to(v.dtype), g.float(), None if initial_state is None else initial_state.float()
    if keep_states:
        return KeptStates.apply(q, k, v, g, beta, state, output_final_state)
    return importlib.import_module(FLA_MODULE).chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state=state, output_final_state=output_final_state, use_qk_l2norm_in_kernel=True
    )


def normalised(x: torch.Tensor) -> torch.Tensor:
    """L2-normalise x [..., d] along d, as fla's kernels do with queries and keys."""
    return x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + L2_EPS)


def unit_lower_inverse(system: torch.Tensor) -> torch.Tensor:
    """Invert I + tril(system, -1) by blocks: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]], of size 1, 2, 4, ...

    A handful of batched products; torch's triangular solver calls LAPACK once a matrix, five times slower on a CPU.

    Args:
        system: [..., n, n], n a power of two; what is on and above the diagonal is not read.
    """
    n, size = system.shape[-1], 1
    inverse = system.new_ones(*system.shape[:-2], n, 1, 1)  # of the diagonal blocks: [..., n / size, size, size]
    while size < n:
        pairs = n // (2 * size)
        below = system.unflatten(-1, (pairs, 2, size)).unflatten(-4, (pairs, 2, size))[..., 1, :, :, 0, :]
        below = below.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # C of each pair: [..., pairs, size, size]
        first, second = inverse.unflatten(-3, (pairs, 2)).unbind(-3)
        upper = torch.cat([first, torch.zeros_like(first)], -1)
        inverse = torch.cat([upper, torch.cat([-(second @ below @ first), second], -1)], -2)
        size *= 2
    return inverse.squeeze(-3)


def by_chunks(x: torch.Tensor, chunk: int, dtype: torch.dtype) -> torch.Tensor:
    """Cut x [b, t, h, ...] into chunks, padded with zeros at the end: [chunks, b h, chunk, ...], contiguous."""
    padded = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk))
    return padded.unflatten(1, (-1, chunk)).movedim(1, 0).transpose(2, 3).flatten(1, 2).contiguous()


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Chunked form (section 3.3) with v_new_i = beta_i (v_i - S^T k_i), the values that the state receives; fla's names.

    With decays D_ij from token j to i and d_i from the chunk's start to i, a chunk's v_new solve
    (I + tril(beta_i D_ij k_i.k_j, -1)) v_new = beta v - beta d (k S_0). All but the products with the state is computed for all
    chunks at once. The right side is made when S_0 is known: a third less products than with fla's w and u, which are for
    chunks that go on side by side.
    """
    t, wide = v.shape[1], torch.promote_types(v.dtype, torch.float32)
    chunk = min(TORCH_CHUNK, 1 << (t - 1).bit_length())  # a power of two, for `unit_lower_inverse`
    # padded tokens have g = 0 and k = 0: no decay, nothing written
    queries = normalised(by_chunks(q, chunk, wide)) * q.shape[-1] ** -0.5  # [n, b h, c, dk]
    keys = normalised(by_chunks(k, chunk, wide))
    values, strength, log_decay = by_chunks(v, chunk, wide), by_chunks(beta, chunk, wide), by_chunks(g, chunk, wide)
    decay = segment_sum(log_decay).exp()  # D: [n, b h, c, c]
    since_start = log_decay.cumsum(-1).exp()[..., None]  # d: [n, b h, c, 1]

    system = keys @ keys.transpose(-1, -2) * decay * strength[..., None]
    inverse = unit_lower_inverse(system) * strength[..., None, :]  # v_new = inverse (v - d k S_0)
    scores = queries @ keys.transpose(-1, -2) * decay
    to_end = (keys * decay[..., -1, :, None]).transpose(-1, -2)  # [n, b h, dk, c]
    parts = (values, keys * since_start, inverse, queries * since_start, scores, to_end, since_start[:, :, -1:])
    o, state = pass_state(parts, initial_state, v.shape)
    return o.to(v.dtype), state if output_final_state else None


def pass_state(
    parts: tuple[torch.Tensor, ...], initial_state: torch.Tensor | None, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the delta rule from chunk to chunk; `kda` too.

    Args:
        parts: of all chunks, [n, b h, ...] each: values [c, dv]; keys and, fourth, queries [c, dk] with the decay since the
            chunk's start; third, the inverse [c, c] that makes v_new; scores [c, c]; keys [dk, c] with the decay to the chunk's
            end; the whole chunk's decay, [1, 1] or [dk, 1].
        initial_state: [b, h, dk, dv] or None for zeros.
        shape: of the outputs, [b, t, h, dv].

    Returns:
        Outputs of `shape`, and the state after the last chunk [b, h, dk, dv].
    """
    b, t, h, dv = shape
    values, keys = parts[:2]
    if initial_state is None:
        state = values.new_zeros(b * h, keys.shape[-1], dv)
    else:
        state = initial_state.to(values.dtype).flatten(0, 1)
    outputs: list[torch.Tensor] = []
    for value, key, inverse, query, scores, to_end, kept in zip(*(part.unbind() for part in parts), strict=True):
        v_new = inverse @ torch.baddbmm(value, key, state, alpha=-1)
        outputs.append(torch.baddbmm(query @ state, scores, v_new))
        state = torch.baddbmm(state * kept, to_end, v_new)
    o = torch.stack(outputs).unflatten(1, (b, h)).transpose(2, 3).movedim(0, 1).flatten(1, 2)[:, :t]
    return o, state.unflatten(0, (b, h))


def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The definition of `gated_delta_rule`, one token after another: same arguments, results and errors."""
    _check(q, k, v, g, beta)
    return delta_rule_by_token(q, k, v, g[..., None], beta, initial_state, output_final_state)


def delta_rule_by_token(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The delta rule, one token after another, with the log decay g [b, t, h, dk], or [b, t, h, 1] for all key channels.

    Other arguments and results as `gated_delta_rule`.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    b, t, h, dk = q.shape
    queries = (normalised(q.to(wide)) * dk**-0.5)[..., None]
    keys = normalised(k.to(wide))[..., None]  # [b, t, h, dk, 1]
    values, decay, strength = v.to(wide), g.to(wide).exp()[..., None], beta.to(wide)[..., None]
    state = v.new_zeros(b, h, dk, v.shape[-1], dtype=wide) if initial_state is None else initial_state.to(wide)
    outputs = []
    for i in range(t):
        state = state * decay[:, i]
        written = strength[:, i] * (values[:, i] - (state * keys[:, i]).sum(-2))  # [b, h, dv]
        state = state + keys[:, i] * written[..., None, :]
        outputs.append((state * queries[:, i]).sum(-2))
    return torch.stack(outputs, 1).to(v.dtype), state if output_final_state else None
