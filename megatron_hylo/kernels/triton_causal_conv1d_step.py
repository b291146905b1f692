"""Triton kernel of causal_conv1d.py for one token a sequence: outputs, and the state moved on in its place."""

try:  # transformers refuses files of a model whose imports fail, unless they are tried
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernel of causal_conv1d.py's step needs Triton") from error


@triton.jit
def step(
    x, state, weight, bias, out, channels, x_batch,
    TAPS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill out [b, channels] from x [b, channels] and state [b, channels, TAPS - 1], whose oldest token goes for x.

    weight [channels, TAPS], state and out are contiguous. A program has BLOCK channels of one sequence.
    """
    channel, batch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = channel < channels
    new = tl.load(x + batch * x_batch + channel, mask=inside, other=0.0)
    at = state + (batch * channels + channel) * (TAPS - 1)
    taps = weight + channel * TAPS
    total = new.to(tl.float32) * tl.load(taps + TAPS - 1, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(TAPS - 1):
        held = tl.load(at + j, mask=inside, other=0.0)
        total += held.to(tl.float32) * tl.load(taps + j, mask=inside, other=0.0).to(tl.float32)
        if j > 0:
            tl.store(at + (j - 1), held, mask=inside)
    tl.store(at + (TAPS - 2), new.to(state.dtype.element_ty), mask=inside)
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(out + batch * channels + channel, total.to(out.dtype.element_ty), mask=inside)
