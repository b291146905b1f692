"""A recurrence whose sequence is split over ranks: every rank computes its part at once, and only states travel.

Part r of n turns the state S into A_r S + B_r (`kernels/recurrence_part.py`). Forward, the ranks gather A and B and each
composes those before it into the state that its part begins with. Backward the same happens in the other direction: with G_r
what the gradients of a part's own outputs say of the state before it, the gradient of the state after part r is that of the
state before part r + 1,

    dS_r = A_{r+1}^T dS_{r+1} + G_{r+1},    dS_{n-1} = 0,

so the ranks gather A and G. Then each has both ends of its part, and its own recurrence gives the gradients of its inputs: no
rank waits for another's pass, and the backward pass is that of one rank with a state to begin with.
"""

import torch
from torch import Tensor

from megatron_hylo.kernels.recurrence_part import DeltaRulePart, SsdPart, state_gradient, times
from megatron_hylo.parallel.context import ContextGroup


def delta_rule_over_ranks(context: ContextGroup, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """`gated_delta_rule` of a sequence of which this rank has a part; outputs of that part, [b, t, h, dv]."""
    return _OverRanks.apply(context, DeltaRulePart, q, k, v, g, beta)


def ssd_over_ranks(
    context: ContextGroup, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, begins: Tensor | None
) -> Tensor:
    """`ssd` of a sequence of which this rank has a part; outputs of that part, [b, t, h, p]."""
    return _OverRanks.apply(context, SsdPart, x, dt, A, B, C, D, begins)


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context: ContextGroup, kind: type[DeltaRulePart] | type[SsdPart], *inputs: Tensor | None) -> Tensor:
        part, effect = kind.begin(*inputs)
        parts = context.effects(effect.kept, effect.added)
        before = torch.zeros_like(effect.added)
        for kept, added in parts[: context.rank]:
            before = times(kept, before) + added
        out = effect.outputs(before)
        ctx.context, ctx.kind = context, kind
        ctx.save_for_backward(effect.reach, effect.kept, before, *part)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        reach, kept, before, *part = ctx.saved_tensors
        context = ctx.context
        parts = context.effects(kept, state_gradient(reach, grad), backward=True)
        after = torch.zeros_like(before)
        for kept, added in reversed(parts[context.rank + 1 :]):
            after = times(kept.transpose(-1, -2), after) + added
        return None, None, *ctx.kind(*part).gradients(before, grad, after)
