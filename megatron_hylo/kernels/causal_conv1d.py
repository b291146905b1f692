"""Short depthwise causal convolution with an optional SiLU, as in Mamba2 and Gated DeltaNet.

y_t = act(bias + sum_j weight[:, j] * x_{t-k+1+j}). The state is the last k-1 inputs, so a sequence can be
cut anywhere and continued, down to one token at a time. On CUDA fla's kernels run: those written in Gluon, which read each
input once, or the older ones in Triton.
"""

import importlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.elementwise import on_request
from megatron_hylo.kernels.registry import Unsupported, import_error, library_unsupported, overridden, select

FLA_MODULE = "fla.modules.causal_conv1d"
# fla takes them only where torch.distributed is not in use, which concerns its choice, not the kernels: they are one GPU's own
GLUON_MODULE = "fla.modules.causal_conv1d.backends.gluon"
STEP_CHANNELS = 128  # of a program of the step's kernel


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    positions: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolve each channel over time with its own k taps.

    Args:
        x: [b, t, c], floating.
        weight: [c, k]; the last tap multiplies the current token.
        bias: [c] or None.
        activation: "silu" or None.
        initial_state: [b, c, k-1], the inputs before x, oldest first; None for zeros.
        output_final_state: also return the state after x.
        positions: int64 [t], place of each token in its document; no tap reaches before a document's first token.
        in_place: the state after one token may be the one given, changed.

    Returns:
        y [b, t, c] in x's dtype (float32 inside, float64 stays), and the state [b, c, k-1] in x's dtype or None.

    Raises:
        ValueError: an unknown activation or shapes that disagree.
    """
    b, t, c = x.shape
    k = weight.shape[-1]
    if activation not in ("silu", None):
        raise ValueError(f"activation {activation!r} is not supported; use 'silu' or None")
    if weight.shape != (c, k) or (bias is not None and bias.shape != (c,)):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(f"x {tuple(x.shape)} needs weight [{c}, k] and bias [{c}], got {tuple(weight.shape)} and {shape}")
    if initial_state is not None and initial_state.shape != (b, c, k - 1):
        raise ValueError(f"initial_state must be {[b, c, k - 1]}, got {list(initial_state.shape)}")

    if initial_state is not None and t == 1 and positions is None and not torch.is_grad_enabled():
        if one_token_implementation(x, initial_state) == "triton":
            state = initial_state if in_place else initial_state.clone()
            y = convolve_one_token(x, state, weight.contiguous(), bias, activation)
        else:
            y, state = _one_token(x, initial_state, weight, bias, activation)
        return y, state if output_final_state else None
    before = None if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    # while decoding so little is copied in no time
    if before is not None and t < k and positions is None and _choose(x, k) != "torch":
        y = causal_conv1d_sections([torch.cat([before, x], 1)], weight, bias, activation)[0][:, k - 1 :]
    else:
        (y,) = causal_conv1d_sections([x], weight, bias, activation, initial_state, positions)
    return y, _last(before, x, k - 1) if output_final_state else None


def one_token_implementation(x: Tensor, state: Tensor) -> str:
    """The registry's choice for a step from a state [b, c, k - 1]."""
    takes = x.dtype == state.dtype and state.is_contiguous() and x.stride(-1) == 1
    unsupported = (
        library_unsupported("triton", "triton", x, "pip install triton") if takes else Unsupported("made for one dtype")
    )
    return select("causal_conv1d_step", "triton", unsupported)


def convolve_one_token(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Convolve one token by the Triton kernel; the state is changed.

    Args:
        x: [b, 1, c], channels contiguous.
        state: [b, c, k - 1], contiguous, of x's dtype: the tokens before, oldest first.
        weight: [c, k], contiguous.
        bias: [c] or None.
        activation: "silu" or None.

    Returns:
        [b, 1, c] in x's dtype.
    """
    from megatron_hylo.kernels.triton_causal_conv1d_step import step

    b, _, c = x.shape
    out = x.new_empty(b, 1, c)
    with torch.cuda.device_of(x):
        step[(-(-c // STEP_CHANNELS), b)](
            x, state, weight, x if bias is None else bias, out, c, x.stride(0),
            TAPS=weight.shape[1], BIAS=bias is not None, SILU=activation == "silu", BLOCK=STEP_CHANNELS, num_warps=2,
        )  # fmt: skip
    return out


@on_request
def _one_token(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> tuple[Tensor, Tensor]:
    """Outputs [b, 1, c] and state [b, c, k - 1] after one token."""
    wide = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state.to(x.dtype), x.transpose(1, 2)], 2)
    y = (window.to(wide) * weight.to(wide)).sum(2)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)[:, None], window[:, :, 1:].clone()


def causal_conv1d_sections(
    sections: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Convolve channels that lie in several sections; each result is a contiguous tensor, as recurrences need.

    Args:
        sections: [b, t, width] of each, c channels together.
        weight, bias, initial_state: of all c channels.
        activation, positions: as there.
    """
    before = None if initial_state is None else initial_state.transpose(1, 2).to(sections[0].dtype)
    if (implementation := _choose(sections[0], weight.shape[-1])) != "torch":
        return list(_Fla.apply(weight, bias, before, activation, positions, implementation, *sections))
    befores = _like(sections, before) if before is not None else [None] * len(sections)
    parts = zip(befores, _parts(weight, bias, sections), strict=True)
    return [_torch(first, x, w, offset, activation, positions) for first, (x, w, offset) in parts]


def _last(before: Tensor | None, x: Tensor, count: int) -> Tensor:
    """The last `count` inputs, [b, c, count]: a copy, so that a cached state does not keep the whole input alive."""
    end = x[:, max(x.shape[1] - count, 0) :]
    if missing := count - end.shape[1]:
        end = F.pad(end, (0, 0, missing, 0)) if before is None else torch.cat([before[:, -missing:], end], 1)
    return end.transpose(1, 2).contiguous()


def _choose(x: Tensor, k: int) -> str:
    unsupported = library_unsupported("fla", FLA_MODULE, x, "pip install flash-linear-attention")
    fast = overridden("causal_conv1d")
    if fast not in ("fla", "gluon"):
        gluon = unsupported is None and 2 <= k <= 4 and x.stride(-1) == 1 and import_error(GLUON_MODULE) is None
        fast = "gluon" if gluon else "fla"
    return select("causal_conv1d", fast, unsupported)


class _Fla(torch.autograd.Function):
    """fla's kernels on x alone; plain torch computes the first k - 1 outputs again, which depend on the tokens before x.

    Copying x behind its history for them would cost a layer of 64K tokens a tenth of its time.
    """

    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        bias: Tensor | None,
        before: Tensor | None,
        activation: str | None,
        positions: Tensor | None,
        implementation: str,
        *sections: Tensor,
    ) -> tuple[Tensor, ...]:
        """Convolve sections [b, t, width]; returns as many tensors of the same shapes.

        `before` is [b, k - 1, all channels] or None, `positions` as of `causal_conv1d`, `implementation` "fla" or "gluon".
        """
        documents = None
        if positions is not None:  # where each token's document begins in x
            starts = (torch.arange(len(positions), device=weight.device) - positions).clamp(min=0)
            documents = torch.cat([starts.new_tensor([0, len(positions)]), starts]).unique()
        if implementation == "gluon":
            module = importlib.import_module(GLUON_MODULE)
            convolve, ctx.differentiate = module.causal_conv1d_fwd_gluon, module.causal_conv1d_bwd_gluon
        else:
            module = importlib.import_module(FLA_MODULE)
            convolve, ctx.differentiate = module.causal_conv1d_fwd, module.causal_conv1d_bwd
        weight = weight.contiguous()
        ctx.settings = dict(activation=activation, cu_seqlens=documents)
        parts = _parts(weight, bias, sections)
        outs = [convolve(x=x, weight=w, bias=offset, residual=None, **ctx.settings)[0] for x, w, offset in parts]
        ctx.save_for_backward(weight, bias, before, positions, *sections)
        if before is not None:
            count = before.shape[1]
            right = _head(before, _starts(sections, count), weight, bias, activation, positions)
            for out, start in zip(outs, _like(sections, right)):
                out[:, :count] = start
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of weight, bias, `before` and the sections; None for those that have none."""
        weight, bias, before, positions, *sections = ctx.saved_tensors
        found = [
            ctx.differentiate(x=x, dy=grad, dht=None, weight=w, bias=offset, **ctx.settings)[:3]
            for (x, w, offset), grad in zip(_parts(weight, bias, sections), grads)
        ]
        dxs, dweights, dbiases = zip(*found)
        dweight, dbias = torch.cat(dweights), torch.cat(dbiases) if bias is not None else None
        dbefore = None
        if before is not None and before.shape[1]:
            # the kernel has taken the first outputs for those of no history: add what is between the two
            count = before.shape[1]
            with torch.enable_grad():
                start = _starts(sections, count)
                leaves = [z.detach().requires_grad_() for z in (start, weight, before, *([] if bias is None else [bias]))]
                rest = (*leaves[:2], leaves[3] if bias is not None else None, ctx.settings["activation"], positions)
                right, wrong = _head(leaves[2], *rest), _head(torch.zeros_like(before), *rest)
            upstream = _starts(grads, right.shape[1])
            changes = torch.autograd.grad((right, wrong), leaves, (upstream, -upstream))
            for dx, change in zip(dxs, _like(sections, changes[0])):
                dx[:, :count] += change
            dweight = dweight + changes[1]
            dbefore = changes[2]
            dbias = dbias + changes[3] if dbias is not None else None
        return dweight, dbias, dbefore, None, None, None, *dxs


def _parts(weight: Tensor, bias: Tensor | None, sections: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Pair each section with its rows of weight and bias."""
    widths = [x.shape[-1] for x in sections]
    return zip(sections, weight.split(widths), bias.split(widths) if bias is not None else [None] * len(widths), strict=True)


def _like(sections: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Split x [b, t, c] of all channels into the sections' widths."""
    return x.split([section.shape[-1] for section in sections], -1)


def _starts(sections: Sequence[Tensor], count: int) -> Tensor:
    """The first tokens of all sections' channels: [b, count, c]."""
    return torch.cat([x[:, :count] for x in sections], -1)


def _head(
    before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, positions: Tensor | None
) -> Tensor:
    """The outputs that `before` reaches, as many as it has tokens."""
    count = before.shape[1]
    return _torch(before, x[:, :count], weight, bias, activation, None if positions is None else positions[:count])


def _torch(
    before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, positions: Tensor | None
) -> Tensor:
    """Shifted multiply-adds: for k = 4 two to three times as fast as a grouped F.conv1d on a CPU, forward and backward."""
    wide = torch.promote_types(x.dtype, torch.float32)
    t, k = x.shape[1], weight.shape[1]
    history = F.pad(x, (0, 0, k - 1, 0)) if before is None else torch.cat([before, x], 1)
    history, taps = history.to(wide), weight.to(wide).t().contiguous().unbind()  # a strided tap is no vector to a CPU

    def earlier(j: int) -> Tensor:
        """Inputs of tap j of each token, [b, t, channels]; zeros where they are of the document before."""
        inputs = history[:, j : j + t]
        return inputs if positions is None else inputs * (positions >= k - 1 - j)[:, None]

    y = earlier(0) * taps[0]
    if bias is not None:
        y = y + bias.to(wide)
    for j in range(1, k):
        y.addcmul_(earlier(j), taps[j])  # in place: no gradient needs the sums, and new memory costs more than the products
    if activation == "silu":
        y = F.silu(y, inplace=not y.requires_grad)
    return y.to(x.dtype)
