"""Gluon kernels of delta_rule_state_pass.py for Hopper: the inter-chunk recurrence of states and of their gradients.

A program carries VALUES columns of one head's state, transposed, in the registers of four warps: a state or its gradient is
then always the left factor of a product, which tensor cores take from registers. The right factors are tiles of k, w
and queries, which a fifth warp has brought into a ring in shared memory meanwhile. So nothing that the recurrence waits for
passes through shared memory; what is stored is put together there while products run.

dk is 64, 128 or 256 and VALUES 64: what fits registers and shared memory. Numbers are bf16, states and decays fp32.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

RING = gl.constexpr(5)  # tiles: what fits beside the rest for dk of 256
SLOTS = gl.constexpr(2)  # of what comes once a chunk


@triton.jit(do_not_specialize=["tokens"])
def decay_factors(g, factors, tokens, HEADS: tl.constexpr, CHUNK: tl.constexpr):
    """Fill `factors` from the log2 of decays since the chunk's start.

    Decays from each token to the chunk's end, and, in all columns, that over the chunk: fp32 [b, h, chunks, 2, CHUNK], from
    g [b, t, h].
    """
    chunk, row = tl.program_id(0), tl.program_id(1)
    sequence, head = row // HEADS, row % HEADS
    column = tl.arange(0, CHUNK)
    token = chunk * CHUNK + column
    base = g + sequence.to(tl.int64) * tokens * HEADS + head
    since = tl.load(base + token.to(tl.int64) * HEADS, mask=token < tokens, other=0.0)
    whole = tl.load(base + (tl.minimum(chunk * CHUNK + CHUNK, tokens) - 1).to(tl.int64) * HEADS)
    out = factors + (row.to(tl.int64) * tl.num_programs(0) + chunk) * 2 * CHUNK + column
    tl.store(out, tl.exp2(whole - since))
    tl.store(out + CHUNK, tl.exp2(whole + tl.zeros([CHUNK], tl.float32)))


@triton.jit(do_not_specialize=["rows"])
def decayed_queries(q, g, out, scale, rows, DK: tl.constexpr, ROWS: tl.constexpr):
    """Fill `out` with q [rows, DK] times scale and the decay since the chunk's start, whose log2 is g [rows]."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DK)
    there = row < rows
    at = row.to(tl.int64)[:, None] * DK + column[None, :]
    factor = tl.exp2(tl.load(g + row, mask=there, other=0.0)) * scale
    value = tl.load(q + at, mask=there[:, None], other=0.0) * factor[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=there[:, None])


@gluon.jit
def _tiles(x, sequence, head, tokens, HEADS: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Descriptor of one sequence and head of x [b, t, h, WIDTH] in tiles [ROWS, COLUMNS]; zeros past the last token."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], x.dtype.element_ty)
    base = x + (sequence.to(gl.int64) * tokens * HEADS + head) * WIDTH
    return tma.make_tensor_descriptor(base, [tokens, WIDTH], [HEADS * WIDTH, 1], [ROWS, COLUMNS], layout)


@gluon.jit
def _state_tiles(x, sequence, head, chunks, HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, VALUES: gl.constexpr):
    """States [b, chunks, h, DK, DV] of one sequence from this head's first on; a chunk's next is HEADS * DK rows below."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DK, VALUES], x.dtype.element_ty)
    base = x + (sequence.to(gl.int64) * chunks * HEADS + head) * DK * DV
    return tma.make_tensor_descriptor(base, [chunks * HEADS * DK, DV], [DV, 1], [DK, VALUES], layout)


@gluon.jit
def _factor_tiles(factors, row, chunks, CHUNK: gl.constexpr):
    """The factors of one sequence and head, two rows a chunk."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    base = factors + row.to(gl.int64) * chunks * 2 * CHUNK
    return tma.make_tensor_descriptor(base, [chunks * 2, CHUNK], [CHUNK, 1], [2, CHUNK], layout)


@gluon.jit
def _first_state(before, row, column, DK: gl.constexpr, DV: gl.constexpr, VALUES: gl.constexpr, layout: gl.constexpr):
    """The state [VALUES, DK] that a program begins with, zeros without `before`; where it lies in fp32 [b, h, DK, DV]."""
    value, key = gl.arange(0, VALUES, gl.SliceLayout(1, layout)), gl.arange(0, DK, gl.SliceLayout(0, layout))
    at = row.to(gl.int64) * DK * DV + column + value[:, None] + key[None, :] * DV
    if before is not None:
        state = gl.load(before + at)
    else:
        state = gl.zeros([VALUES, DK], gl.float32, layout)
    return state, at


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _wait_empty(empty, number, COUNT: gl.constexpr):
    """Wait until the slot of the number-th use, of COUNT slots in turn, is free again."""
    mbarrier.wait(empty.index(number % COUNT), (number // COUNT - 1) & 1, pred=number >= COUNT)


@gluon.jit
def _wait_full(full, number, COUNT: gl.constexpr):
    mbarrier.wait(full.index(number % COUNT), (number // COUNT) & 1)


@gluon.jit
def _load_tile(tiles, start, ring, full, empty, number):
    """Copy the tile of tokens from `start` on into the ring as its number-th, asynchronously."""
    _wait_empty(empty, number, RING)
    slot = number % RING
    mbarrier.expect(full.index(slot), tiles.nbytes_per_cta)
    tma.async_copy_global_to_shared(tiles, [start, 0], full.index(slot), ring.index(slot))


@gluon.jit
def _load_forward(chunks, column, tiles, shared, CHUNK: gl.constexpr):
    w_tiles, key_tiles, u_tiles, factor_tiles = tiles
    ring, u, factors, ring_full, ring_empty, full, empty = shared
    for chunk in range(chunks):
        start, slot = chunk * CHUNK, chunk % SLOTS
        _load_tile(w_tiles, start, ring, ring_full, ring_empty, 2 * chunk)
        _wait_empty(empty, chunk, SLOTS)
        mbarrier.expect(full.index(slot), u_tiles.nbytes_per_cta + factor_tiles.nbytes_per_cta)
        tma.async_copy_global_to_shared(factor_tiles, [chunk * 2, 0], full.index(slot), factors.index(slot))
        tma.async_copy_global_to_shared(u_tiles, [start, column], full.index(slot), u.index(slot))
        _load_tile(key_tiles, start, ring, ring_full, ring_empty, 2 * chunk + 1)


@gluon.jit
def _state_pass_forward(
    state, chunks, column, v_new_tiles, state_tiles, stored, shared,
    HEADS: gl.constexpr, DK: gl.constexpr, CHUNK: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    ring, u, factors, ring_full, ring_empty, full, empty = shared
    dtype: gl.constexpr = ring.dtype
    of_state: gl.constexpr = state.type.layout
    of_chunk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    for chunk in range(chunks):
        slot, read, key = chunk % SLOTS, 2 * chunk, 2 * chunk + 1
        narrow = state.to(dtype)
        _wait_full(ring_full, read, RING)
        recalled = warpgroup_mma(
            gl.convert_layout(narrow, gl.DotOperandLayout(0, of_chunk, 2)), ring.index(read % RING).permute((1, 0)),
            gl.zeros([VALUES, CHUNK], gl.float32, of_chunk), use_acc=False, is_async=True,
        )  # fmt: skip
        tma.store_wait(0)
        mbarrier.arrive(empty.index((chunk + 1) % SLOTS), pred=chunk > 0)
        stored.permute((1, 0)).store(narrow)
        fence_async_shared()
        tma.async_copy_shared_to_global(state_tiles, [chunk * HEADS * DK, column], stored)
        _wait_full(full, chunk, SLOTS)
        state = state * factors.index(slot).slice(1, 1).slice(0, 1, dim=1).load(of_state)
        new = u.index(slot).permute((1, 0)).load(of_chunk) - warpgroup_mma_wait(0, deps=[recalled])
        mbarrier.arrive(ring_empty.index(read % RING))
        decayed = (new * factors.index(slot).slice(0, 1).load(of_chunk)).to(dtype)
        _wait_full(ring_full, key, RING)
        state = warpgroup_mma(
            gl.convert_layout(decayed, gl.DotOperandLayout(0, of_state, 2)), ring.index(key % RING), state, is_async=True
        )
        u.index(slot).permute((1, 0)).store(new.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(v_new_tiles, [chunk * CHUNK, column], u.index(slot))
        state = warpgroup_mma_wait(0, deps=[state])
        mbarrier.arrive(ring_empty.index(key % RING))
    tma.store_wait(0)
    return state


@gluon.jit(do_not_specialize=["tokens"])
def states_forward(
    k, w, u, factors, states, v_new, initial, last, tokens,
    HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, CHUNK: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Fill `states` with those before each chunk, `v_new` with u - w S, and `last` with the state after the last chunk.

    They are [b, chunks, h, DK, DV], [b, t, h, DV], and fp32 [b, h, DK, DV]. Grid: DV / VALUES, b h.
    """
    dtype: gl.constexpr = k.dtype.element_ty
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    row, column = gl.program_id(1), gl.program_id(0) * VALUES
    sequence, head, chunks = row // HEADS, row % HEADS, gl.cdiv(tokens, CHUNK)
    w_tiles = _tiles(w, sequence, head, tokens, HEADS, DK, CHUNK, DK)
    key_tiles = _tiles(k, sequence, head, tokens, HEADS, DK, CHUNK, DK)
    u_tiles = _tiles(u, sequence, head, tokens, HEADS, DV, CHUNK, VALUES)
    v_new_tiles = _tiles(v_new, sequence, head, tokens, HEADS, DV, CHUNK, VALUES)
    state_tiles = _state_tiles(states, sequence, head, chunks, HEADS, DK, DV, VALUES)
    factor_tiles = _factor_tiles(factors, row, chunks, CHUNK)
    ring = gl.allocate_shared_memory(dtype, [RING, CHUNK, DK], key_tiles.layout)
    u_slots = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, VALUES], u_tiles.layout)
    factor_slots = gl.allocate_shared_memory(gl.float32, [SLOTS, 2, CHUNK], factor_tiles.layout)
    stored = gl.allocate_shared_memory(dtype, [DK, VALUES], state_tiles.layout)
    ring_full, ring_empty, full, empty = _barriers(RING), _barriers(RING), _barriers(SLOTS), _barriers(SLOTS)

    state, at = _first_state(initial, row, column, DK, DV, VALUES, of_state)
    shared = (ring, u_slots, factor_slots, ring_full, ring_empty, full, empty)
    tiles = (w_tiles, key_tiles, u_tiles, factor_tiles)
    state = gl.warp_specialize(
        [
            (_state_pass_forward, (state, chunks, column, v_new_tiles, state_tiles, stored, shared, HEADS, DK, CHUNK, VALUES)),
            (_load_forward, (chunks, column, tiles, shared, CHUNK)),
        ],
        [1],
        [40],
    )
    if last is not None:
        gl.store(last + at, state)


@gluon.jit
def _load_backward(chunks, column, tiles, shared, CHUNK: gl.constexpr):
    key_tiles, query_tiles, w_tiles, out_tiles, local_tiles, factor_tiles = tiles
    ring, outs, locals_, factors, ring_full, ring_empty, full, empty = shared
    for step in range(chunks):
        chunk, slot = chunks - 1 - step, step % SLOTS
        start = chunk * CHUNK
        _load_tile(key_tiles, start, ring, ring_full, ring_empty, 3 * step)
        _wait_empty(empty, step, SLOTS)
        size: gl.constexpr = out_tiles.nbytes_per_cta + local_tiles.nbytes_per_cta + factor_tiles.nbytes_per_cta
        mbarrier.expect(full.index(slot), size)
        tma.async_copy_global_to_shared(factor_tiles, [chunk * 2, 0], full.index(slot), factors.index(slot))
        tma.async_copy_global_to_shared(out_tiles, [start, column], full.index(slot), outs.index(slot))
        tma.async_copy_global_to_shared(local_tiles, [start, column], full.index(slot), locals_.index(slot))
        _load_tile(query_tiles, start, ring, ring_full, ring_empty, 3 * step + 1)
        _load_tile(w_tiles, start, ring, ring_full, ring_empty, 3 * step + 2)


@gluon.jit
def _state_pass_backward(
    state, chunks, column, v_new_tiles, state_tiles, stored, shared,
    HEADS: gl.constexpr, DK: gl.constexpr, CHUNK: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    ring, outs, locals_, factors, ring_full, ring_empty, full, empty = shared
    dtype: gl.constexpr = ring.dtype
    of_state: gl.constexpr = state.type.layout
    of_chunk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, CHUNK, 16])
    for step in range(chunks):
        chunk, slot = chunks - 1 - step, step % SLOTS
        key, query, read = 3 * step, 3 * step + 1, 3 * step + 2
        narrow = state.to(dtype)
        _wait_full(full, step, SLOTS)
        state = state * factors.index(slot).slice(1, 1).slice(0, 1, dim=1).load(of_state)
        _wait_full(ring_full, key, RING)
        _wait_full(ring_full, query, RING)
        new = warpgroup_mma(
            gl.convert_layout(narrow, gl.DotOperandLayout(0, of_chunk, 2)), ring.index(key % RING).permute((1, 0)),
            gl.zeros([VALUES, CHUNK], gl.float32, of_chunk), use_acc=False, is_async=True,
        )  # fmt: skip
        state = warpgroup_mma(outs.index(slot).permute((1, 0)), ring.index(query % RING), state, is_async=True)
        tma.store_wait(0)
        mbarrier.arrive(empty.index((step + 1) % SLOTS), pred=step > 0)
        stored.permute((1, 0)).store(narrow)
        fence_async_shared()
        tma.async_copy_shared_to_global(state_tiles, [chunk * HEADS * DK, column], stored)
        new = warpgroup_mma_wait(1, deps=[new])
        mbarrier.arrive(ring_empty.index(key % RING))
        local = locals_.index(slot).permute((1, 0))
        new = (new * factors.index(slot).slice(0, 1).load(of_chunk) + local.load(of_chunk)).to(dtype)
        _wait_full(ring_full, read, RING)
        state = warpgroup_mma(
            gl.convert_layout(-new, gl.DotOperandLayout(0, of_state, 2)), ring.index(read % RING), state, is_async=True
        )
        local.store(new)
        fence_async_shared()
        tma.async_copy_shared_to_global(v_new_tiles, [chunk * CHUNK, column], locals_.index(slot))
        state = warpgroup_mma_wait(0, deps=[state])
        mbarrier.arrive(ring_empty.index(query % RING))
        mbarrier.arrive(ring_empty.index(read % RING))
    tma.store_wait(0)
    return state


@gluon.jit(do_not_specialize=["tokens"])
def states_backward(
    q, k, w, factors, grad_out, grad_local, grad_states, grad_v_new, grad_last, grad_initial, tokens,
    HEADS: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, CHUNK: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Fill `grad_states` with the gradients of the states after each chunk, and `grad_v_new` and `grad_initial`.

    `grad_states` is [b, chunks, h, DK, DV]; `grad_v_new` [b, t, h, DV] is the gradient of `v_new`, of which grad_local is the
    share of the chunk's own outputs; q are those of `decayed_queries`. Grid: DV / VALUES, b h.
    """
    dtype: gl.constexpr = k.dtype.element_ty
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    row, column = gl.program_id(1), gl.program_id(0) * VALUES
    sequence, head, chunks = row // HEADS, row % HEADS, gl.cdiv(tokens, CHUNK)
    key_tiles = _tiles(k, sequence, head, tokens, HEADS, DK, CHUNK, DK)
    query_tiles = _tiles(q, sequence, head, tokens, HEADS, DK, CHUNK, DK)
    w_tiles = _tiles(w, sequence, head, tokens, HEADS, DK, CHUNK, DK)
    out_tiles = _tiles(grad_out, sequence, head, tokens, HEADS, DV, CHUNK, VALUES)
    local_tiles = _tiles(grad_local, sequence, head, tokens, HEADS, DV, CHUNK, VALUES)
    v_new_tiles = _tiles(grad_v_new, sequence, head, tokens, HEADS, DV, CHUNK, VALUES)
    state_tiles = _state_tiles(grad_states, sequence, head, chunks, HEADS, DK, DV, VALUES)
    factor_tiles = _factor_tiles(factors, row, chunks, CHUNK)
    ring = gl.allocate_shared_memory(dtype, [RING, CHUNK, DK], key_tiles.layout)
    outs = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, VALUES], out_tiles.layout)
    locals_ = gl.allocate_shared_memory(dtype, [SLOTS, CHUNK, VALUES], local_tiles.layout)
    factor_slots = gl.allocate_shared_memory(gl.float32, [SLOTS, 2, CHUNK], factor_tiles.layout)
    stored = gl.allocate_shared_memory(dtype, [DK, VALUES], state_tiles.layout)
    ring_full, ring_empty, full, empty = _barriers(RING), _barriers(RING), _barriers(SLOTS), _barriers(SLOTS)

    state, at = _first_state(grad_last, row, column, DK, DV, VALUES, of_state)
    shared = (ring, outs, locals_, factor_slots, ring_full, ring_empty, full, empty)
    tiles = (key_tiles, query_tiles, w_tiles, out_tiles, local_tiles, factor_tiles)
    state = gl.warp_specialize(
        [
            (_state_pass_backward, (state, chunks, column, v_new_tiles, state_tiles, stored, shared, HEADS, DK, CHUNK, VALUES)),
            (_load_backward, (chunks, column, tiles, shared, CHUNK)),
        ],
        [1],
        [40],
    )
    if grad_initial is not None:
        gl.store(grad_initial + at, state)
