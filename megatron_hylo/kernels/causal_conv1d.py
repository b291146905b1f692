"""Short depthwise causal convolution with an optional SiLU, as in Mamba2 and Gated DeltaNet.

y_t = act(bias + sum_j weight[:, j] * x_{t-k+1+j}). The state is the last k-1 inputs, so a sequence can be
cut anywhere and continued, down to one token at a time. On CUDA fla's Triton kernel runs.
"""

import importlib

import torch
import torch.nn.functional as F

from megatron_hylo.kernels.registry import library_obstacle, select

FLA_MODULE = "fla.modules.causal_conv1d"


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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

    if initial_state is None:
        final = F.pad(x[:, max(t - k + 1, 0) :], (0, 0, max(k - 1 - t, 0), 0)) if output_final_state else None
    else:
        # The state is put in front instead of handed to the kernel: exact gradients for it in every implementation.
        x = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], 1)
        final = x[:, t:] if output_final_state else None
    obstacle = library_obstacle("fla", FLA_MODULE, x, "pip install flash-linear-attention")
    run = _fla if select("causal_conv1d", "fla", obstacle) == "fla" else _torch
    y = run(x, weight, bias, activation, initial_state is not None, positions)
    # a copy: a cached state must not keep the whole input alive
    return y, None if final is None else final.transpose(1, 2).contiguous()


def _fla(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    has_history: bool,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    kernel, documents = importlib.import_module(FLA_MODULE).causal_conv1d, None
    if positions is not None:  # where each token's document begins in x, which the history is part of
        starts = torch.arange(x.shape[1] - len(positions), x.shape[1], device=x.device) - positions
        documents = torch.cat([starts.new_tensor([0, x.shape[1]]), starts.clamp(min=0)]).unique()
    y, _ = kernel(x, weight, bias, activation=activation, backend="triton", cu_seqlens=documents)
    return y[:, weight.shape[1] - 1 :] if has_history else y


def _torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    has_history: bool,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """Shifted multiply-adds: for k = 4 two to three times as fast as a grouped F.conv1d on a CPU, forward and backward."""
    wide = torch.promote_types(x.dtype, torch.float32)
    k = weight.shape[1]
    history = x.to(wide) if has_history else F.pad(x.to(wide), (0, 0, k - 1, 0))
    t = history.shape[1] - k + 1
    taps = weight.to(wide).unbind(1)

    def earlier(j: int) -> torch.Tensor:  # the inputs of tap j, of the same document
        inputs = history[:, j : j + t]
        return inputs if positions is None else inputs * (positions >= k - 1 - j)[:, None]

    y = earlier(0) * taps[0]
    if bias is not None:
        y = y + bias.to(wide)
    for j in range(1, k):
        y = torch.addcmul(y, earlier(j), taps[j])
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)
