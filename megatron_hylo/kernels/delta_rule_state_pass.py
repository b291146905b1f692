"""Hopper kernels for Gated DeltaNet's inter-chunk recurrence (state pass), registered as a backend of fla's functions.

Every chunk waits for the one before it, so these kernels take as long as their steps do, whatever the GPU could do beside: one
program for each VALUES columns of a head's state. fla's write the state to shared memory in every step and read it back; ours
keep it in registers. `chunk_bwd_dqkwg`, which follows the backward state pass, is fla's kernel in smaller blocks: more fit a
multiprocessor.
"""

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from megatron_hylo.kernels.delta_rule_states import CHUNK
from megatron_hylo.kernels.registry import import_error, overridden, triton_version, use

MODULE = "megatron_hylo.kernels.gluon_delta_rule_state_pass"
FLA_OUTPUTS = "fla.ops.common.chunk_o"
OPERATION = "delta_rule_state_pass"
VALUES = 64  # columns of a state that a program carries
KEY_DIMS = (128, 256)  # that pay; narrower states fla has as fast
BLOCK = 64  # keys and values of a program of `chunk_bwd_dqkwg`, where fla takes 128
TRITON = (3, 7, 1), (3, 8)  # from, and below: Gluon may change with every version
ARGUMENTS = {"scale", "initial_state", "output_final_state", "h0", "dht"}  # of fla's calls, beside tensors [b, t, h, d] and g


@functools.cache
def register() -> None:
    """Register these kernels as fla's first backend; inputs that they do not take go to fla's own kernels."""
    backends = importlib.import_module("fla.backends")
    base: Any = backends.BaseBackend

    class HopperStatePass(base):
        """Backend with fla's names for its functions; each function's verifier accepts or declines a call."""

        backend_type = "hylo"
        priority = -1  # before all that come with fla

        def chunk_gated_delta_rule_fwd_h_verifier(self, *, k, w, u, g=None, **others) -> tuple[bool, str | None]:
            """Say whether `_takes` the call, else why not."""
            return _takes(k, (w, u), g, **others)

        def chunk_gated_delta_rule_fwd_h(self, *, k, w, u, g, initial_state=None, output_final_state=False, **others):
            """States before each chunk, v_new, and the state after the last chunk or None; see `states_forward`."""
            return states_forward(k, w, u, g, initial_state, output_final_state)

        def chunk_gated_delta_rule_bwd_dhu_verifier(self, *, q, k, w, do, dv, g=None, **others) -> tuple[bool, str | None]:
            """Say whether `_takes` the call, else why not."""
            return _takes(k, (q, w, do, dv), g, **others)

        def chunk_gated_delta_rule_bwd_dhu(self, *, q, k, w, do, dv, g, scale, h0=None, dht=None, **others):
            """Gradients of the states, the initial state and v_new; see `states_backward`."""
            return states_backward(q, k, w, do, dv, g, h0, dht, scale)

        def chunk_bwd_dqkwg_verifier(self, *, q, k, v, do, h, dh, w=None, dv=None, g=None, **others) -> tuple[bool, str | None]:
            """Say whether `_takes` the call, which must be a delta rule's (with w and dv), else why not."""
            if w is None or dv is None:
                return False, "made for delta rules"
            return _takes(k, (q, w, do, dv, v), g, **others)

        def chunk_bwd_dqkwg(self, *, q, k, v, do, h, dh, w, dv, g, scale, **others):
            """Gradients of q, k, w and g from those of outputs and states; see `chunk_gradients`."""
            return chunk_gradients(q, k, v, do, h, dh, w, dv, g, scale)

    backends.register("common")(HopperStatePass)


def _takes(k: Tensor, tensors: tuple[Tensor, ...], g: Tensor | None, **others) -> tuple[bool, str | None]:
    """Tell fla whether these kernels take a call, and why not. Tensors are [b, t, h, d]."""
    reason = _unsupported(k, tensors, g, **others)
    level = logging.WARNING if reason and overridden(OPERATION) == "gluon" else logging.DEBUG  # fla would swallow an error
    use(OPERATION, "fla" if reason else "gluon", reason or "available", level)
    return reason is None, reason


def _unsupported(k: Tensor, tensors: tuple[Tensor, ...], g: Tensor | None, **others) -> str | None:
    if overridden(OPERATION) == "fla":
        return "override"
    if not k.is_cuda or torch.cuda.get_device_capability(k.device)[0] != 9:
        return "made for Hopper"
    usual = {"chunk_size": CHUNK, "save_new_value": True}
    special = {n: x for n, x in others.items() if n not in ARGUMENTS and x is not None and x is not False and x != usual.get(n)}
    if special:
        return f"not made for {', '.join(special)}"
    if g is None or g.dtype != torch.float32 or not g.is_contiguous():
        return "made for one decay a head and token, contiguous and float32"
    widths = [x.shape[-1] for x in (k, *tensors)]
    if k.shape[-1] not in KEY_DIMS or any(x.shape[:3] != k.shape[:3] for x in tensors) or any(n % VALUES for n in widths):
        return f"made for keys of {' or '.join(map(str, KEY_DIMS))} and values in multiples of {VALUES}, not for {widths}"
    if any(x.dtype != torch.bfloat16 or not x.is_contiguous() or x.data_ptr() % 16 for x in (k, *tensors)):
        return "made for contiguous bf16"
    if not TRITON[0] <= triton_version() < TRITON[1]:
        return f"made for Triton from {TRITON[0]} to below {TRITON[1]}, not {triton_version()}"
    return import_error(MODULE)


def states_forward(
    k: Tensor, w: Tensor, u: Tensor, g: Tensor, initial: Tensor | None, output_final: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the forward state pass: the state before each chunk, and v_new.

    S' = d S + (D K)^T (u - w S) of each chunk, d its decay and D those from its tokens to its end ("Gated Delta
    Networks", section 3.3, in the notation of fla's kernels); v_new = u - w S.

    Args:
        k, w: [b, t, h, dk], bf16, contiguous and 16-byte aligned as all that follows; dk of KEY_DIMS. Not checked here.
        u: [b, t, h, dv], bf16; dv a multiple of VALUES.
        g: log2 of the decays since the chunk's start, float32 [b, t, h].
        initial: state before the first token, float32 [b, h, dk, dv], or None for zeros.
        output_final: also return the state after the last token, like `initial`.

    Returns:
        States [b, chunks, h, dk, dv] and u - w S [b, t, h, dv], in k's dtype; the last state or None.
    """
    b, t, h, dk, dv = *k.shape, u.shape[-1]
    states, v_new = k.new_empty(b, _chunks(t), h, dk, dv), torch.empty_like(u)
    initial = None if initial is None else initial.float().contiguous()
    last = k.new_empty(b, h, dk, dv, dtype=torch.float32) if output_final else None
    _kernels().states_forward[(dv // VALUES, b * h)](
        k, w, u, _factors(g), states, v_new, initial, last, t,
        HEADS=h, DK=dk, DV=dv, CHUNK=CHUNK, VALUES=VALUES, num_warps=4,
    )  # fmt: skip
    return states, v_new, last


def states_backward(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    grad_out: Tensor,
    grad_local: Tensor,
    g: Tensor,
    initial: Tensor | None,
    grad_last: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run the backward state pass: gradients of the states, the initial state and v_new.

    The outputs are scale q S of the decayed states, and each chunk's own share of v_new.

    Args:
        q, k, w: [b, t, h, dk], as of `states_forward`.
        grad_out, grad_local: of the outputs, and what those of the same chunk say of `v_new`: [b, t, h, dv], bf16.
        g: as of `states_forward`.
        initial: whether it is there tells whether its gradient is wanted.
        grad_last: of the last state, float32 [b, h, dk, dv], or None.
        scale: of the outputs.

    Returns:
        Gradients of the states after each chunk [b, chunks, h, dk, dv], of `initial`, and of `v_new` [b, t, h, dv].
    """
    b, t, h, dk, dv = *k.shape, grad_out.shape[-1]
    kernels = _kernels()
    decayed, rows = torch.empty_like(q), b * t * h
    kernels.decayed_queries[(-(-rows // 16),)](q, g, decayed, scale, rows, DK=dk, ROWS=16)
    grad_states, grad_v_new = k.new_empty(b, _chunks(t), h, dk, dv), torch.empty_like(grad_local)
    grad_initial = None if initial is None else k.new_empty(b, h, dk, dv, dtype=torch.float32)
    grad_last = None if grad_last is None else grad_last.float().contiguous()
    kernels.states_backward[(dv // VALUES, b * h)](
        decayed, k, w, _factors(g), grad_out, grad_local, grad_states, grad_v_new, grad_last, grad_initial, t,
        HEADS=h, DK=dk, DV=dv, CHUNK=CHUNK, VALUES=VALUES, num_warps=4,
    )  # fmt: skip
    return grad_states, grad_initial, grad_v_new


def chunk_gradients(
    q: Tensor, k: Tensor, v_new: Tensor, grad_out: Tensor, states: Tensor, grad_states: Tensor, w: Tensor,
    grad_v_new: Tensor, g: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the chunks' inputs after the backward state pass: fla's `chunk_bwd_dqkwg` with blocks of BLOCK.

    Args:
        q, k, w: [b, t, h, dk], as of `states_forward`.
        v_new, grad_out, grad_v_new: [b, t, h, dv], bf16.
        states, grad_states: [b, chunks, h, dk, dv], bf16.
        g: as of `states_forward`.
        scale: of the outputs.

    Returns:
        Gradients of q, k and w, and of g, float32 [b, t, h].
    """
    b, t, h, dk, dv = *k.shape, v_new.shape[-1]
    grad_q, grad_k, grad_w = torch.empty_like(q), torch.empty_like(k), torch.empty_like(w)
    grad_g = g.new_empty(dk // BLOCK, b, t, h)  # of each block of keys
    importlib.import_module(FLA_OUTPUTS).chunk_bwd_kernel_dqkwg[(dk // BLOCK * _chunks(t), b * h)](
        q=q, k=k, v=v_new, g=g, g_gamma=None, h=states, do=grad_out, dh=grad_states, dq=grad_q, dk=grad_k, dw=grad_w,
        dv=grad_v_new, dg=grad_g, cu_seqlens=None, chunk_indices=None, scale=scale, B=b, T=t, H=h, HV=h, K=dk, V=dv,
        BT=CHUNK, BK=BLOCK, BV=BLOCK, STATE_V_FIRST=False,
    )  # fmt: skip
    return grad_q, grad_k, grad_w, grad_g.sum(0)


def _chunks(tokens: int) -> int:
    return -(-tokens // CHUNK)


def _factors(g: Tensor) -> Tensor:
    """Decay factors as `decay_factors` writes them: float32 [b, h, chunks, 2, CHUNK]."""
    b, t, h = g.shape
    factors = g.new_empty(b, h, _chunks(t), 2, CHUNK)
    _kernels().decay_factors[(_chunks(t), b * h)](g, factors, t, HEADS=h, CHUNK=CHUNK, num_warps=1)
    return factors


def _kernels():
    """Import the Gluon kernels and set Triton's allocator for tensor descriptors, which every thread must set."""
    importlib.import_module("triton").set_allocator(_memory)
    return importlib.import_module(MODULE)


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
