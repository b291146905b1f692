"""A recurrence over one part of a sequence, before the initial state is known; its gradients once both states are.

Both linear layers are affine in their state: with S before the part its outputs are o + R S and the state after it is A S + B.
All four are found from nothing before the part, in the one pass that o costs anyway. Backward, with the gradients of the
outputs and of the state after the part, a recurrence that began with S gives those of all inputs; its own kernels do that.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hylo.kernels.delta_rule_states import FLA_CHUNK, FLA_NORM
from megatron_hylo.kernels.gated_delta_rule import delta_rule_implementation, gated_delta_rule
from megatron_hylo.kernels.kda import kda
from megatron_hylo.kernels.ssd import document_numbers, log_decay, mamba_ssm_gradients, ssd, ssd_implementation


class AffineMap(NamedTuple):
    """A part of a sequence as an affine map of the state S before it: out + readout S, and transition S + increment."""

    out: Tensor  # [b, t, h, dv]
    readout: Tensor  # [b, t, h, dk], of out's dtype
    transition: Tensor  # [b, h, dk, dk], or [b, h, 1, 1] where it is a number; of the states' dtype
    increment: Tensor  # [b, h, dk, dv], the same

    def outputs(self, before: Tensor) -> Tensor:
        """Add readout S to `out` [b, t, h, dv] in place, for the state S before the part [b, h, dk, dv]."""
        for out, readout, state in zip(self.out, self.readout, before.to(self.out.dtype)):
            out.transpose(0, 1).baddbmm_(readout.transpose(0, 1), state)
        return self.out


def times(transition: Tensor, state: Tensor) -> Tensor:
    """Multiply a state [b, h, dk, dv] by a transition, a matrix [b, h, dk, dk] or a number [b, h, 1, 1]."""
    return transition @ state if transition.shape[-1] > 1 else transition * state


def state_gradient(readout: Tensor, grad_out: Tensor) -> Tensor:
    """Gradient of the state before the part from the outputs': readout^T grad_out, [b, h, dk, dv], in fp32 or wider."""
    wide, sums = torch.promote_types(readout.dtype, torch.float32), []
    for r, grad in zip(readout.permute(0, 2, 3, 1), grad_out.transpose(1, 2)):  # [h, dk, t], [h, t, dv]
        if r.is_cuda and r.dtype != wide:
            sums.append(torch.bmm(r, grad, out_dtype=wide))
        else:
            sums.append(torch.bmm(r.to(wide), grad.to(wide)))
    return torch.stack(sums)


class DeltaRulePart(NamedTuple):
    """Tensors that one part of Gated DeltaNet keeps for its backward pass: the arguments of `gated_delta_rule`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    # of fla's pass, after which q and k are normalised and g is summed within chunks: the lengths of q and k, the inverses
    # of the chunks' triangular systems
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def begin(cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple["DeltaRulePart", AffineMap]:
        """Run one pass over values [v, 0] from the state [0, I], which shows the part's whole affine map.

        Args:
            q, k, v, g, beta: as of `gated_delta_rule`.

        Returns:
            What the backward pass needs, and the map of the state before the part.
        """
        part, (values, state), dv = cls(q, k, v, g, beta), _extended(k, v), v.shape[-1]
        if delta_rule_implementation(k, v, differentiates=True) == "fla":
            part, out, state = part._fla(values, state)
        else:
            out, after = gated_delta_rule(q, k, values, g, beta, state, output_final_state=True)
            assert after is not None
            state = after
        return part, AffineMap(out[..., :dv], out[..., dv:], state[..., dv:], state[..., :dv])

    def _fla(self, values: Tensor, state: Tensor) -> tuple["DeltaRulePart", Tensor, Tensor]:
        chunk, norm = importlib.import_module(FLA_CHUNK), importlib.import_module(FLA_NORM)
        v, beta = self.v.contiguous(), self.beta.contiguous()
        q, q_scale = norm.l2norm_fwd(self.q.to(v.dtype).contiguous())
        k, k_scale = norm.l2norm_fwd(self.k.to(v.dtype).contiguous())
        g, out, inverse, state, *_ = chunk.chunk_gated_delta_rule_fwd(
            q=q, k=k, v=values, g=self.g.float().contiguous(), beta=beta, scale=k.shape[-1] ** -0.5, initial_state=state,
            output_final_state=True,
        )  # fmt: skip
        return DeltaRulePart(q, k, v, g, beta, q_scale, k_scale, inverse), out, state

    def gradients(self, before: Tensor, grad_out: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, g, beta.

        Args:
            before: state that the part began with, [b, h, dk, dv].
            grad_out: of the outputs, [b, t, h, dv].
            grad_after: of the state after the part, like `before`.
        """
        if self.inverse is None:
            return _again(functools.partial(gated_delta_rule, output_final_state=True), self[:5], before, grad_out, grad_after)
        chunk, norm = importlib.import_module(FLA_CHUNK), importlib.import_module(FLA_NORM)
        q, k, v, g, beta = self[:5]
        dq, dk, dv, dbeta, dg, *_ = chunk.chunk_gated_delta_rule_bwd(
            q=q, k=k, v=v, g=g, beta=beta, A=self.inverse, scale=k.shape[-1] ** -0.5, initial_state=before,
            do=grad_out.contiguous(), dht=grad_after,
        )  # fmt: skip
        dq, dk = norm.l2norm_bwd(q, self.q_scale, dq), norm.l2norm_bwd(k, self.k_scale, dk)
        return dq.to(q), dk.to(k), dv.to(v), dg.to(g), dbeta.to(beta)


class KdaPart(NamedTuple):
    """Tensors that one part of KDA keeps: the arguments of `kda`; the backward pass runs the recurrence once more."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    @classmethod
    def begin(cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple["KdaPart", AffineMap]:
        """Run one pass over values [v, 0] from the state [0, I]; as `DeltaRulePart.begin`, with the arguments of `kda`."""
        (values, state), dv = _extended(k, v), v.shape[-1]
        out, after = kda(q, k, values, g, beta, state, output_final_state=True)
        assert after is not None
        return cls(q, k, v, g, beta), AffineMap(out[..., :dv], out[..., dv:], after[..., dv:], after[..., :dv])

    def gradients(self, before: Tensor, grad_out: Tensor, grad_after: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, g, beta, g's [b, t, h, dk]; arguments as those of `DeltaRulePart.gradients`."""
        return _again(functools.partial(kda, output_final_state=True), self, before, grad_out, grad_after)


class SsdPart(NamedTuple):
    """Tensors that one part of Mamba2 keeps: the arguments of `ssd`; states are [n, p], transposed."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    reset_mask: Tensor | None

    @classmethod
    def begin(
        cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reset_mask: Tensor | None
    ) -> tuple["SsdPart", AffineMap]:
        """Run one pass from a zero state; y_t also gains exp(A sum_{s <= t} dt_s) h C_t of the state h before the part.

        Args:
            x, dt, A, B, C, D, reset_mask: as of `ssd`.

        Returns:
            What the backward pass needs, and the map of the state [b, h, n, p] before the part; its transition is [b, h, 1, 1].
        """
        out, state = ssd(x, dt, A, B, C, D, output_final_state=True, reset_mask=reset_mask)
        assert state is not None
        decay = log_decay(dt, A, reset_mask).transpose(1, 2).contiguous()  # a GPU sums fast along the last dimension alone
        left = decay.cumsum(-1).exp()  # [b, h, t]
        readout = C * left.transpose(1, 2)[..., None].to(C.dtype)
        affine = AffineMap(out, readout, left[..., -1, None, None].to(state), state.transpose(-1, -2))
        return cls(x, dt, A, B, C, D, reset_mask), affine

    def gradients(self, before: Tensor, grad_out: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, dt, A, B, C, D; None for reset_mask.

        Args:
            before: state that the part began with, [b, h, n, p].
            grad_out: of the outputs, [b, t, h, p].
            grad_after: of the state after the part, like `before`.
        """
        x, dt, A, B, C, D, reset_mask = self
        before, grad_after = (state.transpose(-1, -2).contiguous() for state in (before, grad_after))
        if ssd_implementation(x) != "mamba_ssm":
            run = functools.partial(ssd, output_final_state=True, reset_mask=reset_mask)
            return *_again(run, self[:6], before, grad_out, grad_after), None
        dx, ddt, dA, dB, dC, dD, _ = mamba_ssm_gradients(
            x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), D.float(), before, document_numbers(x, reset_mask),
            grad_out, grad_after,
        )  # fmt: skip
        assert dD is not None
        return dx, ddt.to(dt), dA.to(A), dB.to(B), dC.to(C), dD.to(D), None


def _extended(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Values [v, 0] of [b, t, h, dv + dk] and the state [0, I] of [b, h, dk, dv + dk] that show a part's whole affine map."""
    dk, dv = k.shape[-1], v.shape[-1]
    values = v.new_empty(*v.shape[:3], dv + dk)
    values[..., :dv], values[..., dv:] = v, 0
    wide = torch.promote_types(v.dtype, torch.float32)
    state = v.new_zeros(v.shape[0], v.shape[2], dk, dv + dk, dtype=wide)
    state[..., dv:] = torch.eye(dk, dtype=wide, device=v.device)
    return values, state


def _again(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    inputs: tuple[Tensor, ...],
    before: Tensor,
    grad_out: Tensor,
    grad_after: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the inputs of a plain recurrence, which is run once more."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, after = run(*leaves, initial_state=before)
    assert after is not None
    return torch.autograd.grad((out, after), leaves, (grad_out, grad_after))
