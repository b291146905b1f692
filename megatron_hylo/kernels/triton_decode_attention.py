"""Triton kernels of decode_attention.py: partial attention over a part of the keys, and the parts' combination.

A batch of equal lengths divides each sequence into SPLITS parts. A packed batch, of any lengths, has parts of about equal
size in one list, the parts of the first sequence first, so that programs have the same work whatever the lengths are.
"""

try:  # transformers refuses files of a model whose imports fail, unless they are tried
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of decode_attention.py need Triton") from error


@triton.jit
def parts_of(lengths, batch, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Divide sequences into parts: the keys of a part, and the sequences' lengths, numbers of parts and their running totals.

    At most PARTS + batch parts come of it. A part has 4 blocks at least.
    """
    sequence = tl.arange(0, COLUMNS)
    lengths = tl.load(lengths + sequence, mask=sequence < batch, other=0).to(tl.int32)
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(lengths, 0), PARTS), BLOCK), 4) * BLOCK
    counts = tl.cdiv(lengths, share)
    return share, lengths, counts, tl.cumsum(counts, 0)


@triton.jit(do_not_specialize=["rows", "groups", "sequences"])
def attend_part(
    q, k, v, length, starts, real, scales, partial, sums, scale, rows, groups, sequences,
    k_batch, k_row, k_group, v_batch, v_row, v_group, real_batch, scales_batch, scales_row,
    HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, FIRST: tl.constexpr, FIRST_COLUMNS: tl.constexpr, REST: tl.constexpr,
    REST_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_COLUMNS: tl.constexpr, SHARED: tl.constexpr, LENGTH: tl.constexpr,
    MASKED: tl.constexpr, QUANTISED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Attend with all query heads of one sequence and key head to one part of the keys.

    q [b, groups, HEADS, FIRST + REST] and `partial` fp32 [b * groups * HEADS, SPLITS, WIDTH] are contiguous, as is `sums`
    [b * groups * HEADS, SPLITS, 2]: the largest score (base 2, times `scale`) and the sum of exponentials relative to it.
    SHARED: values are the first FIRST channels of the keys. PACKED: the keys of sequence i are `length[i]` rows from
    `starts[i]` on, SPLITS is the wanted number of parts of all sequences, and `partial` is [parts, groups * HEADS, WIDTH].
    """
    if PACKED:
        part, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
        share, lengths, counts, ends = parts_of(length, sequences, COLUMNS, SPLITS, BLOCK)
        batch = tl.sum((ends <= part).to(tl.int64), 0)
        if batch >= sequences:
            return
        mine = tl.arange(0, COLUMNS) == batch
        begin = (part - tl.sum(tl.where(mine, ends - counts, 0), 0)).to(tl.int32) * share
        end = tl.minimum(begin + share, tl.sum(tl.where(mine, lengths, 0), 0))
        program = batch * groups + group
        first_row = tl.load(starts + batch).to(tl.int64)
        k += first_row * k_row + group * k_group
        v += first_row * v_row + group * v_group
        scales += first_row * scales_row
    else:
        program, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        batch, group = program // groups, program % groups
        end = rows
        if LENGTH:
            end = tl.load(length).to(tl.int32)
        share = tl.cdiv(tl.cdiv(end, BLOCK), SPLITS) * BLOCK
        begin = split * share
        end = tl.minimum(begin + share, end)
        k += batch * k_batch + group * k_group
        v += batch * v_batch + group * v_group
        real += batch * real_batch
        scales += batch * scales_batch

    head, first, rest = tl.arange(0, HEAD_ROWS), tl.arange(0, FIRST_COLUMNS), tl.arange(0, REST_COLUMNS)
    wide = tl.arange(0, WIDTH_COLUMNS)
    there = head < HEADS
    row_of = program * HEADS + head
    at = q + row_of[:, None] * (FIRST + REST)
    query = tl.load(at + first[None, :], mask=there[:, None] & (first < FIRST)[None, :], other=0.0)
    if REST > 0:
        query_rest = tl.load(at + FIRST + rest[None, :], mask=there[:, None] & (rest < REST)[None, :], other=0.0)

    largest = tl.full([HEAD_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_ROWS], tl.float32)
    out = tl.zeros([HEAD_ROWS, WIDTH_COLUMNS], tl.float32)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < end
        far = row.to(tl.int64)  # rows x channels passes 2^31 at a million tokens of a few sequences
        key = tl.load(k + far[:, None] * k_row + first[None, :], mask=inside[:, None] & (first < FIRST)[None, :], other=0.0)
        key = key.to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if QUANTISED:
            key_scale = tl.load(scales + far * scales_row, mask=inside, other=0.0).to(tl.float32)
            scores *= key_scale[None, :]
        if REST > 0:
            place = k + far[:, None] * k_row + FIRST + rest[None, :]
            other = tl.load(place, mask=inside[:, None] & (rest < REST)[None, :], other=0.0).to(query.dtype)
            added = tl.dot(query_rest, tl.trans(other), input_precision="ieee")
            if QUANTISED:
                added *= tl.load(scales + far * scales_row + 1, mask=inside, other=0.0).to(tl.float32)[None, :]
            scores += added
        visible = inside
        if MASKED:
            visible = visible & (tl.load(real + far, mask=inside, other=0).to(tl.int32) != 0)
        scores = tl.where(visible[None, :], scores * scale, float("-inf"))
        reached = tl.maximum(largest, tl.max(scores, 1))
        offset = tl.where(reached == float("-inf"), 0.0, reached)  # a block of padding
        weight = tl.exp2(scores - offset[:, None])
        shrink = tl.exp2(largest - offset)
        total = total * shrink + tl.sum(weight, 1)
        if SHARED:
            value = key
        else:
            place = v + far[:, None] * v_row + wide[None, :]
            value = tl.load(place, mask=inside[:, None] & (wide < WIDTH)[None, :], other=0.0)
        if QUANTISED:
            weight *= key_scale[None, :]
        out = out * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        largest = reached
    place = (part * groups + group) * HEADS + head if PACKED else row_of * SPLITS + split
    tl.store(partial + place[:, None] * WIDTH + wide[None, :], out, mask=there[:, None] & (wide < WIDTH)[None, :])
    tl.store(sums + place * 2, largest, mask=there)
    tl.store(sums + place * 2 + 1, total, mask=there)


@triton.jit
def combine_parts(partial, sums, out, SPLITS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Combine the parts of one sequence and head into a row of `out` [rows, WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    column, part = tl.arange(0, COLUMNS), tl.arange(0, TILE)
    every = tl.arange(0, SPLITS)
    largest = tl.max(tl.load(sums + (row * SPLITS + every) * 2), 0)
    total = tl.zeros([TILE], tl.float32)
    result = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, SPLITS, TILE):
        place = row * SPLITS + start + part
        weight = tl.exp2(tl.load(sums + place * 2) - largest)
        total += weight * tl.load(sums + place * 2 + 1)
        value = tl.load(partial + place[:, None] * WIDTH + column[None, :], mask=(column < WIDTH)[None, :], other=0.0)
        result += tl.sum(value * weight[:, None], 0)
    tl.store(out + row * WIDTH + column, (result / tl.sum(total, 0)).to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["sequences"])
def combine_packed_parts(
    partial, sums, lengths, out, sequences, HEADS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_COLUMNS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Combine a packed batch's parts, partial [parts, HEADS, WIDTH], of one sequence and head into out [b, HEADS, WIDTH]."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, counts, ends = parts_of(lengths, sequences, COLUMNS, PARTS, BLOCK)
    mine = tl.arange(0, COLUMNS) == batch
    end = tl.sum(tl.where(mine, ends, 0), 0)
    begin = end - tl.sum(tl.where(mine, counts, 0), 0)
    column, tile = tl.arange(0, WIDTH_COLUMNS), tl.arange(0, TILE)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    result = tl.zeros([WIDTH_COLUMNS], tl.float32)
    for start in range(begin, end, TILE):
        part = start + tile
        inside = part < end
        place = part.to(tl.int64) * HEADS + head
        score = tl.load(sums + place * 2, mask=inside, other=float("-inf"))
        reached = tl.maximum(largest, tl.max(score, 0))  # a part has one key at least, so this is a number
        weight, shrink = tl.exp2(score - reached), tl.exp2(largest - reached)
        total = total * shrink + tl.sum(weight * tl.load(sums + place * 2 + 1, mask=inside, other=0.0), 0)
        chosen = inside[:, None] & (column < WIDTH)[None, :]
        value = tl.load(partial + place[:, None] * WIDTH + column[None, :], mask=chosen, other=0.0)
        result = result * shrink + tl.sum(value * weight[:, None], 0)
        largest = reached
    row = batch * HEADS + head
    tl.store(out + row * WIDTH + column, (result / total).to(out.dtype.element_ty), mask=column < WIDTH)
