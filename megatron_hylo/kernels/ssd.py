"""State-space duality (SSD), the recurrence of Mamba2, in chunks.

From "Transformers are SSMs" (Dao and Gu, 2024, section 6, block decomposition): a masked matrix product
within chunks, one decayed [p, n] state a head between them. On CUDA mamba_ssm's Triton kernels run.
`recurrent_ssd` is the definition, token by token: the oracle, and the decode step.
"""

import importlib

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from megatron_hylo.kernels.registry import library_unsupported, select

RESET = -60.0  # a log decay that leaves nothing: e^-60 is far below fp32's rounding, and sums of it keep their digits

CHUNK = 64  # tokens; on a CPU as fast as 128 with half the memory
MAMBA_MODULE = "mamba_ssm.ops.triton.ssd_combined"
MAMBA_CHUNK = 256  # mamba_ssm's default


def segment_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums over segments, the log of the decay from token j to token i.

    Args:
        x: [..., c] log decays, float32 or float64.

    Returns:
        [..., c, c] in x's dtype: sum of x[j+1..i] at (i, j) for j <= i, -inf above the diagonal (masked
        before any exp, so no overflow reaches a gradient).
    """
    total = x.double().cumsum(-1)  # differences of large sums lose digits in float32
    segments = (total[..., :, None] - total[..., None, :]).to(x.dtype)
    future = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return segments.masked_fill_(future, -torch.inf)


def _check(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> None:
    b, t, h, _ = x.shape
    if dt.shape != (b, t, h) or A.shape != (h,) or B.shape[:3] != (b, t, h) or C.shape != B.shape or t < 1:
        raise ValueError(
            f"x {tuple(x.shape)} [b, t, h, p] needs t >= 1, dt [b, t, h], A [h], B and C [b, t, h, n], got {tuple(dt.shape)}, "
            f"{tuple(A.shape)}, {tuple(B.shape)}, {tuple(C.shape)}"
        )


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reset_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mamba2's recurrence: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t.

    Args:
        x: [b, t, h, p], floating.
        dt: [b, t, h], step sizes >= 0 (after softplus), float32.
        A: [h], negative, float32.
        B, C: [b, t, h, n], floating.
        D: [h] or None.
        initial_state: [b, h, p, n] or None for zeros.
        output_final_state: also return the state after the last token.
        reset_mask: bool [t], tokens that forget the state before them: the first of each document.

    Returns:
        y [b, t, h, p] in x's dtype, and the state [b, h, p, n] (float32; float64 for float64 x) or None.

    Raises:
        ValueError: shapes that disagree.
    """
    _check(x, dt, A, B, C)
    if x.shape[1] == 1:  # one token: the recurrence itself is the fastest
        return recurrent_ssd(x, dt, A, B, C, D, initial_state, output_final_state, reset_mask)
    if ssd_implementation(x) == "mamba_ssm":
        dt, A = dt.float(), A.float()
        D, initial_state = (None if y is None else y.float() for y in (D, initial_state))
        y, state = _MambaSsm.apply(x, dt, A, B.to(x.dtype), C.to(x.dtype), D, initial_state, document_numbers(x, reset_mask))
        return y, state if output_final_state else None
    with torch.autocast(x.device.type, enabled=False):
        return _chunked(x, dt, A, B, C, D, initial_state, output_final_state, reset_mask)


def ssd_implementation(x: torch.Tensor) -> str:
    """The registry's choice for x [b, t, h, p]."""
    return select("ssd", "mamba_ssm", library_unsupported("mamba_ssm", MAMBA_MODULE, x, "pip install mamba-ssm"))


def log_decay(dt: torch.Tensor, A: torch.Tensor, reset_mask: torch.Tensor | None) -> torch.Tensor:
    """Log decay dt A, [b, t, h]; `RESET` where `reset_mask` forgets the state."""
    decay = dt * A
    return decay if reset_mask is None else decay.masked_fill(reset_mask[:, None], RESET)


def document_numbers(x: torch.Tensor, reset_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Document number of each token of x [b, t, h, p] for mamba_ssm (`seq_idx`): int32 [b, t]; the initial state's is 0."""
    return None if reset_mask is None else reset_mask.int().cumsum(0, dtype=torch.int32).expand(x.shape[0], -1).contiguous()


class _MambaSsm(torch.autograd.Function):
    """`ssd` by mamba_ssm's kernels, without the copies of its own autograd function; see `mamba_ssm_gradients`."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        documents: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs [b, t, h, p] and the last state [b, h, p, n], float32; arguments as of `mamba_ssm_gradients`."""
        out, _, _, _, _, last = importlib.import_module(MAMBA_MODULE)._mamba_chunk_scan_combined_fwd(
            x, dt, A, B, C, MAMBA_CHUNK, D=D, initial_states=initial_state, seq_idx=documents
        )
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state, documents)
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: torch.Tensor | None, grad_last: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, dt, A, B, C, D and the initial state; either upstream gradient may be None."""
        x, dt, A, B, C, D, initial_state, documents = ctx.saved_tensors
        grad_out = torch.zeros_like(x) if grad_out is None else grad_out
        return *mamba_ssm_gradients(x, dt, A, B, C, D, initial_state, documents, grad_out, grad_last), None


def mamba_ssm_gradients(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    documents: torch.Tensor | None,
    grad_out: torch.Tensor,
    grad_last: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The backward pass of `ssd` by mamba_ssm's kernels, its forward pass run again as far as needed.

    Args:
        x, B, C: [b, t, h, p] and [b, t, h, n], of one dtype.
        dt, A, D: [b, t, h], [h] and [h] or None, float32.
        initial_state: [b, h, p, n], float32, or None.
        documents: of `document_numbers`.
        grad_out: of the outputs, like x.
        grad_last: of the last state, float32, or None.

    Returns:
        Gradients of x, dt, A, B, C, D and the initial state, in their shapes; None for those that are None.
    """
    with _SumsOfOne():
        dx, ddt, dA, dB, dC, dD, _, _, dstate = importlib.import_module(MAMBA_MODULE)._mamba_chunk_scan_combined_bwd(
            grad_out, x, dt, A, B, C, x, MAMBA_CHUNK,  # its argument for outputs is not read
            D=D, initial_states=initial_state, dfinal_states=grad_last, seq_idx=documents,
        )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dstate


class _SumsOfOne(TorchFunctionMode):
    """Sums over a dimension of one element without a copy.

    mamba_ssm sums over the programs that share a group of heads: each of our heads is a group, and those copies, of up to 2 GB
    a layer at 64K tokens, took a quarter of its time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.sum and args[0].dtype == torch.float32:
            dim = args[1] if len(args) == 2 else kwargs.get("dim")
            if isinstance(dim, int) and len(args) + len(kwargs) == 2 and args[0].shape[dim] == 1:
                return args[0].squeeze(dim)
        return func(*args, **kwargs)


def _chunked(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    reset_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    t = x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    chunk = min(CHUNK, t)
    pad = -t % chunk  # padded tokens have dt = 0: no decay, no input

    def chunks(value: torch.Tensor) -> torch.Tensor:
        """Pad and divide [b, t, h, ...] into [b, h, chunks, chunk, ...]."""
        padded = F.pad(value.to(wide), (0, 0) * (value.dim() - 2) + (0, pad))
        return padded.unflatten(1, (-1, chunk)).movedim(3, 1)

    dt = dt.to(wide)
    logs = chunks(log_decay(dt, A.to(wide), reset_mask))  # [b, h, n, c]
    inputs = chunks(x.to(wide) * dt[..., None])  # [b, h, n, c, p]
    keys, queries = chunks(B), chunks(C)  # [b, h, n, c, n_state]
    decay = segment_sum(logs).exp()  # [b, h, n, c, c], from token j to token i
    since_start = logs.cumsum(-1).exp()  # from before the chunk to token i

    y = (queries @ keys.transpose(-1, -2) * decay) @ inputs
    added = (inputs * decay[..., -1, :, None]).transpose(-1, -2) @ keys  # [b, h, n, p, n_state]
    state = x.new_zeros(added[:, :, 0].shape, dtype=wide) if initial_state is None else initial_state.to(wide)
    before = []
    for new, kept in zip(added.unbind(2), since_start[..., -1, None, None].unbind(2), strict=True):
        before.append(state)
        state = torch.addcmul(new, state, kept)
    y = y + (queries * since_start[..., None]) @ torch.stack(before, 2).transpose(-1, -2)
    y = y.movedim(1, 3).flatten(1, 2)[:, :t]  # [b, t, h, p]
    if D is not None:
        y = torch.addcmul(y, x.to(wide), D.to(wide)[:, None])
    return y.to(x.dtype), state if output_final_state else None


def recurrent_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reset_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The definition of `ssd`, one token after another: same arguments, results and errors."""
    _check(x, dt, A, B, C)
    wide = torch.promote_types(x.dtype, torch.float32)
    b, t, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1], dtype=wide) if initial_state is None else initial_state.to(wide)
    step = dt.to(wide)[..., None, None]  # [b, t, h, 1, 1]
    kept = log_decay(dt.to(wide), A.to(wide), reset_mask).exp()[..., None, None]
    added = step * x.to(wide)[..., None] * B.to(wide)[..., None, :]  # [b, t, h, p, n]
    outputs = []
    for i in range(t):
        state = state * kept[:, i] + added[:, i]
        outputs.append((state * C[:, i, :, None].to(wide)).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + x.to(wide) * D.to(wide)[:, None]
    return y.to(x.dtype), state if output_final_state else None
