"""The gated delta rule by fla's kernels, with the states between chunks kept for the backward pass.

fla's own function computes them again: the slowest kernel of its forward pass, one step after another for all chunks.
They are large, dk / 64 times as large as the values. But where a layer's activations are recomputed they are kept from right
before the backward pass alone, which then has no more in memory at its fullest moment than fla's.
"""

import importlib

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # tokens
FLA_CHUNK, FLA_NORM = "fla.ops.gated_delta_rule.chunk", "fla.modules.norm.l2norm"


class KeptStates(torch.autograd.Function):
    """`gated_delta_rule` by fla's kernels; all inputs have one dtype but g and the state, which are float32."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, output_final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs [b, t, h, dv], and the state [b, h, dk, dv], float32, if `output_final_state`; else None."""
        fla, norm = importlib.import_module(FLA_CHUNK), importlib.import_module(FLA_NORM)
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        initial_state = None if initial_state is None else initial_state.contiguous()
        (q, q_scale), (k, k_scale) = norm.l2norm_fwd(q), norm.l2norm_fwd(k)
        g = fla.chunk_local_cumsum(g, chunk_size=CHUNK, scale=fla.RCP_LN2)
        w, u, inverse = fla.chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=g, beta=beta, chunk_size=CHUNK)
        states, v_new, last = fla.chunk_gated_delta_rule_fwd_h(
            k=k, w=w, u=u, g=g, initial_state=initial_state, output_final_state=output_final_state, chunk_size=CHUNK
        )
        ctx.scale = k.shape[-1] ** -0.5
        out = fla.chunk_fwd_o(q=q, k=k, v=v_new, h=states, g=g, scale=ctx.scale, chunk_size=CHUNK)
        ctx.save_for_backward(q, q_scale, k, k_scale, v, g, beta, inverse, initial_state, w, states, v_new)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v, g, beta and the initial state, in their shapes."""
        fla, norm = importlib.import_module(FLA_CHUNK), importlib.import_module(FLA_NORM)
        q, q_scale, k, k_scale, v, g, beta, inverse, initial_state, w, states, v_new = ctx.saved_tensors
        grad_out, grad_last = grad_out.contiguous(), None if grad_last is None else grad_last.contiguous()
        shared = dict(g=g, chunk_size=CHUNK)
        local = fla.chunk_bwd_dv_local(q=q, k=k, do=grad_out, scale=ctx.scale, **shared)
        grad_states, grad_initial, grad_v_new = fla.chunk_gated_delta_rule_bwd_dhu(
            q=q, k=k, w=w, h0=initial_state, dht=grad_last, do=grad_out, dv=local, scale=ctx.scale, **shared
        )
        dq, dk, grad_w, dg = fla.chunk_bwd_dqkwg(
            q=q, k=k, v=v_new, w=w, h=states, dv=grad_v_new, do=grad_out, dh=grad_states, scale=ctx.scale, **shared
        )
        dk_system, dv, dbeta, dg_system = fla.prepare_wy_repr_bwd(k=k, v=v, beta=beta, g=g, A=inverse, dw=grad_w, du=grad_v_new)
        dg = fla.chunk_local_cumsum(dg.add_(dg_system), chunk_size=CHUNK, reverse=True)
        dq, dk = norm.l2norm_bwd(q, q_scale, dq), norm.l2norm_bwd(k, k_scale, dk.add_(dk_system))
        return dq, dk, dv, dg, dbeta.to(beta), grad_initial, None
