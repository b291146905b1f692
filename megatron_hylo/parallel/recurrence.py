"""A recurrence whose sequence is split over ranks: every part is computed at once, and only states travel.

Part r of n turns the state S into A_r S + B_r (`kernels/recurrence_part.py`). Forward, A and B of all parts compose into the
state that each part begins with. Backward the same happens in the other direction: with G_r what the gradients of a part's own
outputs say of the state before it, the gradient of the state after part r is that of the state before part r + 1,

    dS_r = A_{r+1}^T dS_{r+1} + G_{r+1},    dS_{n-1} = 0.

Then each has both ends of its part, and its own recurrence gives the gradients of its inputs: no part waits for another's pass,
and the backward pass is that of one part with a state to begin with.

Ranks gather A and B, and A and G, of all their tokens. On a GPU each cuts them into parts of its own first, which lie in the
batch: one pass over many tokens with few heads is many small steps that leave much of the GPU idle. (A GPU that has the
whole sequence gains nothing by it: A makes the pass half as long again, and it need not know A.)
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hylo.kernels.recurrence_part import DeltaRulePart, KdaPart, SsdPart, state_gradient, times

Part = DeltaRulePart | KdaPart | SsdPart
Steps = Sequence[tuple[Tensor, Tensor]]  # (transition, increment) of each: S -> transition S + increment

PART = 8192  # tokens of a part at least
COLUMNS = 64  # of a state's, that one program of fla's kernels carries
PROGRAMS = 4  # of them for each multiprocessor (measured: 1, 2 and 4 of them, two H200, 65,536 tokens a rank)


class StateExchange(Protocol):
    """The ranks that share a sequence, as a recurrence needs them: `ContextGroup`, or what stands for it in a kernel check."""

    rank: int

    def gather_affine_maps(self, transition: Tensor, increment: Tensor, backward: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Gather transition [b, h, dk, dk] (or [b, h, 1, 1]) and increment [b, h, dk, dv] of every rank; see `ContextGroup`."""


def delta_rule_over_ranks(
    context: StateExchange,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    kind: type[DeltaRulePart] | type[KdaPart] = DeltaRulePart,
) -> Tensor:
    """Gated delta rule (or KDA) over a sequence that is split over the context-parallel ranks.

    Args:
        context: the ranks.
        q, k, v, g, beta: this rank's part, as `gated_delta_rule` (or `kda`) takes them.
        kind: the recurrence.

    Returns:
        Outputs of this rank's part, [b, t, h, dv] in v's dtype.
    """
    parts = own_parts(v)
    cut = [x.unflatten(1, (parts, -1)).flatten(0, 1) for x in (q, k, v, g, beta)]  # [b * parts, t / parts, h, ...]
    out = _InParts.apply(context, parts, kind, *cut)  # [b * parts, t / parts, h, dv]
    return out.unflatten(0, (-1, parts)).flatten(1, 2)  # [b, t, h, dv]


def own_parts(value: Tensor) -> int:
    """Number of parts that a rank's tokens are cut into, for programs that carry a state to fill its GPU; 1 on a CPU.

    Args:
        value: [b, t, h, dv].
    """
    if not value.is_cuda:
        return 1
    b, t, heads, width = value.shape
    programs = b * heads * -(-width // COLUMNS)
    room = PROGRAMS * torch.cuda.get_device_properties(value.device).multi_processor_count // programs
    return max((n for n in (1, 2, 4, 8) if n <= room and t % n == 0 and t >= n * PART), default=1)


def ssd_over_ranks(
    context: StateExchange, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reset_mask: Tensor | None
) -> Tensor:
    """Mamba2's recurrence over a sequence that is split over the context-parallel ranks.

    Args:
        context: the ranks.
        x, dt, A, B, C, D, reset_mask: this rank's part, as `ssd` takes them.

    Returns:
        Outputs of this rank's part, [b, t, h, p] in x's dtype.
    """
    return _InParts.apply(context, 1, SsdPart, x, dt, A, B, C, D, reset_mask)


class _InParts(torch.autograd.Function):
    """Recurrence over parts of a sequence; inputs are [batch * parts, tokens of a part, ...]."""

    @staticmethod
    def forward(
        ctx,
        context: StateExchange,
        parts: int,
        kind: type[Part],
        *inputs: Any,  # tensors or None: the fields of `kind`
    ) -> Tensor:
        """Compose this rank's maps, gather those of all ranks, and return the outputs from the state before each part.

        Args:
            ctx: keeps the state before each part.
            context: the ranks.
            parts: parts of this rank's tokens.
            kind: the recurrence.
            inputs: fields of `kind`.

        Returns:
            [batch * parts, tokens of a part, heads, value channels].
        """
        part, affine = kind.begin(*inputs)
        steps = list(zip(_by_part(affine.transition, parts), _by_part(affine.increment, parts)))
        earlier = context.gather_affine_maps(*_composed(steps))[: context.rank]
        before = torch.stack(_states(earlier, steps), 1).flatten(0, 1)  # [batch * parts, heads, rows, columns]
        out = affine.outputs(before)
        ctx.context, ctx.parts, ctx.kind = context, parts, kind
        ctx.save_for_backward(affine.readout, affine.transition, before, *part)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `inputs`; those of the states come from the later parts and ranks, as in the forward pass."""
        readout, transition, before, *part = ctx.saved_tensors
        context, parts = ctx.context, ctx.parts
        back = [x.transpose(-1, -2) for x in _by_part(transition, parts)]
        steps = list(zip(back, _by_part(state_gradient(readout, grad), parts)))[::-1]
        later = context.gather_affine_maps(*_composed(steps), backward=True)[: context.rank : -1]
        after = torch.stack(_states(later, steps)[::-1], 1).flatten(0, 1)  # [batch * parts, heads, rows, columns]
        return None, None, None, *ctx.kind(*part).gradients(before, grad, after)


def _by_part(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split [batch * parts, ...] into [batch, ...] of each part, in order."""
    return x.unflatten(0, (-1, parts)).unbind(1)


def _states(others: Steps, own: Steps) -> list[Tensor]:
    """Initial state of each of a rank's own steps, after the steps of earlier ranks, from a zero state."""
    states = [torch.zeros_like(own[0][1])]
    for transition, increment in [*others, *own[:-1]]:
        states.append(times(transition, states[-1]) + increment)
    return states[len(others) :]


def _composed(steps: Steps) -> tuple[Tensor, Tensor]:
    """Compose steps S -> transition S + increment, done one after the other, into one."""
    (transition, increment), *rest = steps
    for next_transition, next_increment in rest:
        increment = times(next_transition, increment) + next_increment
        transition = times(next_transition, transition)
    return transition, increment
