"""A recurrence whose sequence is split, over ranks or within one GPU: parts are computed at once, and only states travel.

Part r of n turns the state S into A_r S + B_r (`kernels/recurrence_part.py`). Forward, A and B of all parts compose into the
state that each part begins with. Backward the same happens in the other direction: with G_r what the gradients of a part's own
outputs say of the state before it, the gradient of the state after part r is that of the state before part r + 1,

    dS_r = A_{r+1}^T dS_{r+1} + G_{r+1},    dS_{n-1} = 0.

Then each has both ends of its part, and its own recurrence gives the gradients of its inputs: no part waits for another's pass,
and the backward pass is that of one part with a state to begin with.

Ranks gather A and B, and A and G, of each rank's tokens (context parallelism). A rank may cut its own tokens into parts as
well, which lie in the batch: a long sequence with few heads is a chain of small steps, most of a GPU idle beside it.
"""

import torch
from torch import Tensor

from megatron_hylo.kernels.recurrence_part import DeltaRulePart, SsdPart, state_gradient, times
from megatron_hylo.parallel.context import ContextGroup

PART = 8192  # tokens; what a part costs besides is made up for from here on
COLUMNS = 64  # of a state's, that one program of fla's kernels carries
PROGRAMS = 1  # of them that a multiprocessor has at a time


def parts_that_fill(value: Tensor) -> int:
    """Parts that a rank's tokens are cut into so that programs that carry a state occupy the whole GPU; 1 on a CPU.

    Args:
        value: [b, t, h, dv].
    """
    if not value.is_cuda:
        return 1
    b, t, heads, width = value.shape
    programs = b * heads * -(-width // COLUMNS)
    room = PROGRAMS * torch.cuda.get_device_properties(value.device).multi_processor_count // programs
    return max((n for n in (1, 2, 4, 8) if n <= room and t % n == 0 and t >= n * PART), default=1)


def delta_rule_in_parts(context: ContextGroup, parts: int, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """`gated_delta_rule` of a sequence of which this rank has a part, or all.

    Args:
        context: the ranks that share the sequence.
        parts: that this rank cuts its tokens into; a divisor of t.
        q, k, v, g, beta: [b, t, h, ...], this rank's tokens.

    Returns:
        Outputs of these tokens, [b, t, h, dv].
    """
    cut = [x.unflatten(1, (parts, -1)).flatten(0, 1) for x in (q, k, v, g, beta)]
    return _InParts.apply(context, parts, DeltaRulePart, *cut).unflatten(0, (-1, parts)).flatten(1, 2)


def ssd_over_ranks(
    context: ContextGroup, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, begins: Tensor | None
) -> Tensor:
    """`ssd` of a sequence of which this rank has a part; outputs of that part, [b, t, h, p]."""
    return _InParts.apply(context, 1, SsdPart, x, dt, A, B, C, D, begins)


class _InParts(torch.autograd.Function):
    """Inputs are [batch * parts, tokens of a part, ...]."""

    @staticmethod
    def forward(
        ctx, context: ContextGroup, parts: int, kind: type[DeltaRulePart] | type[SsdPart], *inputs: Tensor | None
    ) -> Tensor:
        part, effect = kind.begin(*inputs)
        steps = list(zip(_by_part(effect.kept, parts), _by_part(effect.added, parts)))
        state = torch.zeros_like(steps[0][1])
        if context.by_parts:
            for kept, added in context.effects(*_composed(steps))[: context.rank]:
                state = times(kept, state) + added
        before = [state]
        for kept, added in steps[:-1]:
            before.append(times(kept, before[-1]) + added)
        before = torch.stack(before, 1).flatten(0, 1)
        out = effect.outputs(before)
        ctx.context, ctx.parts, ctx.kind = context, parts, kind
        ctx.save_for_backward(effect.reach, effect.kept, before, *part)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        reach, kept, before, *part = ctx.saved_tensors
        context, parts = ctx.context, ctx.parts
        back = [x.transpose(-1, -2) for x in _by_part(kept, parts)]
        steps = list(zip(back, _by_part(state_gradient(reach, grad), parts)))[::-1]
        state = torch.zeros_like(steps[0][1])
        if context.by_parts:
            whole, gradient = _composed(steps)
            for kept, added in reversed(context.effects(whole, gradient, backward=True)[context.rank + 1 :]):
                state = times(kept, state) + added
        after = [state]
        for kept, added in steps[:-1]:
            after.append(times(kept, after[-1]) + added)
        after = torch.stack(after[::-1], 1).flatten(0, 1)
        return None, None, None, *ctx.kind(*part).gradients(before, grad, after)


def _by_part(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """[batch * parts, ...] -> [batch, ...] of each part, in order."""
    return x.unflatten(0, (-1, parts)).unbind(1)


def _composed(steps: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(kept, added) of steps S -> kept S + added, done one after the other."""
    (kept, added), *rest = steps
    for next_kept, next_added in rest:
        kept, added = times(next_kept, kept), times(next_kept, added) + next_added
    return kept, added
