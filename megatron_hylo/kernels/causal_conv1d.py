"""Short depthwise causal convolution with an optional SiLU, as in Mamba2 and Gated DeltaNet.

y_t = act(bias + sum_j weight[:, j] * x_{t-k+1+j}). The state is the last k-1 inputs, so a sequence can be
cut anywhere and continued, down to one token at a time. On CUDA fla's kernels run: those written in Gluon, which read each
input once, or the older ones in Triton.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.registry import forced, import_error, library_obstacle, select

FLA_MODULE = "fla.modules.causal_conv1d"
# fla takes them only where torch.distributed is not in use, which concerns its choice, not the kernels: they are one GPU's own
GLUON_MODULE = "fla.modules.causal_conv1d.backends.gluon"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    positions: Tensor | None = None,
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

    before = None if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    implementation = _choose(x, k)
    if implementation == "torch":
        y = _torch(before, x, weight, bias, activation, positions)
    elif before is not None and t < k and positions is None:  # decoding: so little is copied in no time
        y = _Fla.apply(torch.cat([before, x], 1), weight, bias, None, activation, None, implementation)[:, k - 1 :]
    else:
        y = _Fla.apply(x, weight, bias, before, activation, positions, implementation)
    return y, _last(before, x, k - 1) if output_final_state else None


def _last(before: Tensor | None, x: Tensor, count: int) -> Tensor:
    """The last `count` inputs, [b, c, count]: a copy, so that a cached state does not keep the whole input alive."""
    end = x[:, max(x.shape[1] - count, 0) :]
    if missing := count - end.shape[1]:
        end = F.pad(end, (0, 0, missing, 0)) if before is None else torch.cat([before[:, -missing:], end], 1)
    return end.transpose(1, 2).contiguous()


def _choose(x: Tensor, k: int) -> str:
    obstacle = library_obstacle("fla", FLA_MODULE, x, "pip install flash-linear-attention")
    fast = forced("causal_conv1d")
    if fast not in ("fla", "gluon"):
        gluon = obstacle is None and 2 <= k <= 4 and x.stride(-1) == 1 and import_error(GLUON_MODULE) is None
        fast = "gluon" if gluon else "fla"
    return select("causal_conv1d", fast, obstacle)


class _Fla(torch.autograd.Function):
    """fla's kernels see x alone; the first k - 1 outputs, which what came before x reaches too, are made again in plain torch.

    Copying x behind its history for them would cost a layer of 64K tokens a tenth of its time.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        before: Tensor | None,
        activation: str | None,
        positions: Tensor | None,
        implementation: str,
    ) -> Tensor:
        documents = None
        if positions is not None:  # where each token's document begins in x
            starts = (torch.arange(len(positions), device=x.device) - positions).clamp(min=0)
            documents = torch.cat([starts.new_tensor([0, len(positions)]), starts]).unique()
        if implementation == "gluon":
            module = importlib.import_module(GLUON_MODULE)
            convolve, ctx.differentiate = module.causal_conv1d_fwd_gluon, module.causal_conv1d_bwd_gluon
        else:
            module = importlib.import_module(FLA_MODULE)
            convolve, ctx.differentiate = module.causal_conv1d_fwd, module.causal_conv1d_bwd
        weight = weight.contiguous()
        ctx.settings = dict(activation=activation, cu_seqlens=documents)
        y, _ = convolve(x=x, weight=weight, bias=bias, residual=None, **ctx.settings)
        ctx.save_for_backward(x, weight, bias, before, positions)
        if before is not None:
            y[:, : before.shape[1]] = _head(before, x, weight, bias, activation, positions)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, before, positions = ctx.saved_tensors
        dx, dweight, dbias, *_ = ctx.differentiate(x=x, dy=grad, dht=None, weight=weight, bias=bias, **ctx.settings)
        dbefore = None
        if before is not None and before.shape[1]:
            # the kernel has taken the first outputs for those of no history: add what is between the two
            with torch.enable_grad():
                start = x[:, : before.shape[1]].detach()
                leaves = [z.detach().requires_grad_() for z in (start, weight, before, *([] if bias is None else [bias]))]
                rest = (*leaves[:2], leaves[3] if bias is not None else None, ctx.settings["activation"], positions)
                right, wrong = _head(leaves[2], *rest), _head(torch.zeros_like(before), *rest)
            upstream = grad[:, : right.shape[1]]
            changes = torch.autograd.grad((right, wrong), leaves, (upstream, -upstream))
            dx[:, : start.shape[1]] += changes[0]
            dweight = dweight + changes[1]
            dbefore = changes[2]
            dbias = dbias + changes[3] if bias is not None else None
        return dx, dweight, dbias, dbefore, None, None, None


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
    history, taps = history.to(wide), weight.to(wide).unbind(1)

    def earlier(j: int) -> Tensor:  # the inputs of tap j, of the same document
        inputs = history[:, j : j + t]
        return inputs if positions is None else inputs * (positions >= k - 1 - j)[:, None]

    y = earlier(0) * taps[0]
    if bias is not None:
        y = y + bias.to(wide)
    for j in range(1, k):
        y = torch.addcmul(y, earlier(j), taps[j])
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
