"""Triton kernels over frames and tables: append, attend, merge, gather, and the tables' upkeep.

frames      the device tier, `[frames, 2 (K, V), kv_heads, block_tokens, head_dim]`, each frame
            contiguous and `frame_stride` elements from the next
table       of one layer, `[rows, blocks]` int32: the frame of each block of each sequence. With
            IN_PLACE, where bit 30 is set, that of the pool, whose frames lie like those of the
            device, `pool_offset` elements from them
pieces      `[pieces, 8]` int32: table row, entry, first packed row, rows, position of the first of
            them, begin and end (in tokens) of the KV they read, flags (1: the first, 2: the last
            piece of these rows in this layer)
items       `[items, 2]` int32: a piece, and the first of its rows that a program serves

Attention consumes KV in tiles of TILE tokens counted from position 0, in splits whose ends are
multiples of `split_tokens`; what several splits or calls have found is merged by natural
log-sum-exp, in order.

Every kernel takes its tensors first, then numbers, then constants.

UPCAST does arithmetic in float32: Triton's interpreter holds bfloat16 as integers. The kernels keep
to what Triton 3.4 and later share.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bring(to, staged, count, BLOCK: tl.constexpr):
    """Copies numbers from pinned CPU memory to the device."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to + i, tl.load(staged + i, mask=i < count), mask=i < count)


@triton.jit
def edit(tables, edits, rows, blocks, BLOCK: tl.constexpr):
    """Writes runs of frames to `[layers, rows, blocks]`: a program an edit, `[edits, 5]` int32."""
    at = edits + tl.program_id(0) * 5
    layer = tl.load(at).to(tl.int64)
    row = tl.load(at + 1)
    block = tl.load(at + 2)
    count = tl.load(at + 3)
    frame = tl.load(at + 4)
    entries = tables + (layer * rows + row) * blocks + block
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        tl.store(entries + i, frame + i, mask=i < count)


@triton.jit
def append(
    k,
    v,
    frames,
    table,
    step_rows,
    k_row,
    k_head,
    v_row,
    v_head,
    frame_stride,
    blocks,
    first_row,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Copies K and V of a packed row to where the table says: a program a row.

    step_rows: `[rows, 2]` int32, each packed row's row of the table and its position.
    """
    row = (first_row + tl.program_id(0)).to(tl.int64)
    position = tl.load(step_rows + 2 * row + 1)
    entry = tl.load(step_rows + 2 * row).to(tl.int64) * blocks + position // BLOCK_TOKENS
    frame = tl.load(table + entry).to(tl.int64)
    head = tl.arange(0, HEADS_PAD)[:, None]
    dim = tl.arange(0, DIM_PAD)[None, :]
    inside = (head < KV_HEADS) & (dim < HEAD_DIM)
    to = frames + frame * frame_stride
    to += (head * BLOCK_TOKENS + position % BLOCK_TOKENS) * HEAD_DIM + dim
    tl.store(to, tl.load(k + row * k_row + head * k_head + dim, mask=inside), mask=inside)
    to += KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    tl.store(to, tl.load(v + row * v_row + head * v_head + dim, mask=inside), mask=inside)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _start(frame, frame_stride, pool_offset, IN_PLACE: tl.constexpr):
    """Where a frame begins, in elements from the device's first.

    By a product and not by a choice, so that the compiler sees it aligned, and loads are wide.
    """
    if IN_PLACE:
        start = (frame & 0x3FFFFFFF).to(tl.int64) * frame_stride
        return start + (frame >> 30).to(tl.int64) * pool_offset
    else:
        return frame.to(tl.int64) * frame_stride


@triton.jit
def _places(
    frames,
    table,
    tile,
    there,
    frame_stride,
    pool_offset,
    kv_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Where the K of a tile's tokens lies, `[TILE, DIM_PAD]`."""
    step = tl.arange(0, TILE)
    dim = tl.arange(0, DIM_PAD)
    if BLOCK_TOKENS % TILE == 0:  # all of the tile lies in one frame
        frame = tl.load(table + tile // BLOCK_TOKENS)
        start = frames + _start(frame, frame_stride, pool_offset, IN_PLACE)
        start += (kv_head * BLOCK_TOKENS + tile % BLOCK_TOKENS) * HEAD_DIM
        return start + step[:, None] * HEAD_DIM + dim[None, :]
    else:
        token = tile + step
        if MASKED:
            frame = tl.load(table + token // BLOCK_TOKENS, mask=there, other=0)
        else:
            frame = tl.load(table + token // BLOCK_TOKENS)
        line = _start(frame, frame_stride, pool_offset, IN_PLACE)
        line += (kv_head * BLOCK_TOKENS + token % BLOCK_TOKENS) * HEAD_DIM
        return frames + line[:, None] + dim[None, :]


@triton.jit
def _fold(
    queries,
    best,
    total,
    sums,
    frames,
    table,
    tile,
    begin,
    end,
    at,
    frame_stride,
    pool_offset,
    scale,
    soft_cap,
    window,
    kv_head,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Folds one tile of KV into a tile of rows. MASKED: not every row sees every token of it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    V_AT: tl.constexpr = KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    step = tl.arange(0, TILE)
    token = tile + step
    there = (token >= begin) & (token < end)
    has_dim = tl.arange(0, DIM_PAD) < HEAD_DIM
    place = _places(
        frames, table, tile, there, frame_stride, pool_offset, kv_head, HEAD_DIM, BLOCK_TOKENS,
        DIM_PAD, TILE, IN_PLACE, MASKED,
    )  # fmt: skip
    if MASKED or DIM_PAD != HEAD_DIM:
        inside = (there if MASKED else step >= 0)[:, None] & has_dim[None, :]
        keys = tl.load(place, mask=inside, other=0.0)
        values = tl.load(place + V_AT, mask=inside, other=0.0)
    else:
        keys = tl.load(place)
        values = tl.load(place + V_AT)
    scores = _dot(queries, tl.trans(keys), UPCAST)
    if SOFT_CAP:
        # tanh, which the interpreter does not have
        scores = scores * scale
        scores = soft_cap * (1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * scores / soft_cap) + 1.0))
        scores = scores * LOG2E
    else:
        scores = scores * (scale * LOG2E)
    if MASKED:
        seen = there[None, :] & (token[None, :] <= at[:, None])
        if window > 0:
            seen = seen & (token[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    better = tl.maximum(best, tl.max(scores, 1))
    shift = better
    if MASKED:
        shift = tl.where(better == float("-inf"), 0.0, better)
    weights = tl.exp2(scores - shift[:, None])
    faded = tl.exp2(best - shift)
    total = total * faded + tl.sum(weights, 1)
    if not UPCAST:
        weights = weights.to(values.dtype)
    sums = sums * faded[:, None] + _dot(weights, values, UPCAST)
    return better, total, sums


@triton.jit
def _spans(
    kv_begin,
    kv_end,
    split,
    split_tokens,
    position,
    first,
    last,
    window,
    TILE: tl.constexpr,
):
    """Tokens [begin, end) of a split that rows [first, last] of a piece see, as tiles from
    `tile_begin` to `tile_end`; from `whole_begin` to `whole_end` every row sees all of each.
    """
    begin = tl.maximum(kv_begin, split * split_tokens)
    end = tl.minimum(kv_end, (split + 1) * split_tokens)
    end = tl.minimum(end, position + last + 1)
    all_begin = begin
    all_end = tl.minimum(end, position + first + 1)
    if window > 0:
        begin = tl.maximum(begin, position + first - window + 1)
        all_begin = tl.maximum(begin, position + last - window + 1)
    tile_begin = begin // TILE * TILE
    tile_end = tl.where(end > begin, (end + TILE - 1) // TILE * TILE, tile_begin)
    whole_begin = tl.minimum((all_begin + TILE - 1) // TILE * TILE, tile_end)
    whole_end = tl.maximum(all_end // TILE * TILE, whole_begin)
    return begin, end, tile_begin, whole_begin, whole_end, tile_end


@triton.jit
def attend(
    q,
    out,
    lse,
    sinks,
    frames,
    table,
    pieces,
    items,
    found,
    found_lse,
    q_row,
    q_head,
    out_row,
    out_head,
    frame_stride,
    pool_offset,
    blocks,
    found_rows,
    split_tokens,
    window,
    scale,
    soft_cap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DIRECT: tl.constexpr,
    BY_ITEM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    SINKS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attends rows of a piece, all query heads of one KV head, to one split of its KV.

    TILE_ROWS (row, head) pairs are served together, so that K and V are read once for a group of
    heads. DIRECT: there is one split and no other piece of these rows, so the result goes to `out`
    and `lse`; else to `found`, `[splits, found_rows, heads, head_dim]`, and `found_lse`, where rows
    are packed rows, or with BY_ITEM items of one row.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = TILE_ROWS // GROUP
    LOG2E: tl.constexpr = 1.4426950408889634
    item = items + 2 * tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    piece = pieces + 8 * tl.load(item)
    first = tl.load(item + 1)
    table += tl.load(piece).to(tl.int64) * blocks
    rows = tl.load(piece + 3)
    position = tl.load(piece + 4)

    pair = tl.arange(0, TILE_ROWS)
    row = first + pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    served = (pair < ROWS * GROUP) & (row < rows)
    at = position + row
    packed_row = (tl.load(piece + 2) + row).to(tl.int64)
    dim = tl.arange(0, DIM_PAD)
    stored = served[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(
        q + (packed_row * q_row + head * q_head)[:, None] + dim[None, :], mask=stored, other=0.0
    )
    last = tl.minimum(first + ROWS, rows) - 1
    kv_begin = tl.load(piece + 5)
    kv_end = tl.load(piece + 6)
    begin, end, tile_begin, whole_begin, whole_end, tile_end = _spans(
        kv_begin, kv_end, split, split_tokens, position, first, last, window, TILE
    )
    best = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    sums = tl.zeros([TILE_ROWS, DIM_PAD], tl.float32)
    for part in tl.static_range(3):
        start = tile_begin if part == 0 else (whole_begin if part == 1 else whole_end)
        stop = whole_begin if part == 0 else (whole_end if part == 1 else tile_end)
        for tile in range(start, stop, TILE):
            best, total, sums = _fold(
                queries, best, total, sums, frames, table, tile, begin, end, at, frame_stride,
                pool_offset, scale, soft_cap, window, kv_head, KV_HEADS, HEAD_DIM, BLOCK_TOKENS,
                DIM_PAD, TILE, IN_PLACE, SOFT_CAP, UPCAST, part != 1,
            )  # fmt: skip

    if DIRECT and SINKS:
        sink = tl.load(sinks + head, mask=served, other=0.0) * LOG2E
        higher = tl.maximum(best, sink)
        sums = sums * tl.exp2(best - higher)[:, None]
        total = total * tl.exp2(best - higher) + tl.exp2(sink - higher)
        best = higher
    whole = tl.where(total == 0, 1.0, total)
    result = sums / whole[:, None]
    log_sum = tl.where(total == 0, float("-inf"), (best + tl.log2(whole)) / LOG2E)
    if DIRECT:
        to = out + (packed_row * out_row + head * out_head)[:, None] + dim[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=stored)
        tl.store(lse + packed_row * HEADS + head, log_sum, mask=served)
    else:
        if BY_ITEM:
            packed_row = packed_row * 0 + tl.program_id(0)
        place = (packed_row + split * found_rows) * HEADS + head
        tl.store(found + place[:, None] * HEAD_DIM + dim[None, :], result, mask=stored)
        tl.store(found_lse + place, log_sum, mask=served)


@triton.jit
def merge(
    out,
    lse,
    sinks,
    found,
    found_lse,
    state,
    state_lse,
    merged,
    out_row,
    out_head,
    found_rows,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Merges what splits have found of a row with what calls before have: a program a row and head.

    merged: `[rows, 5]` int32: packed row, flags of its piece, first and end of its splits, row of
    `found`. `state`, `[packed rows, heads, head_dim]`, and `state_lse` hold what is not finished.
    """
    about = merged + 5 * tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(about).to(tl.int64)
    flags = tl.load(about + 1)
    found_row = tl.load(about + 4)
    place = row * HEADS + head
    dim = tl.arange(0, DIM_PAD)
    has_dim = dim < HEAD_DIM
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    sums = tl.zeros([DIM_PAD], tl.float32)
    if flags % 2 == 0:
        best = tl.load(state_lse + place)
        total = tl.where(best == float("-inf"), 0.0, 1.0)
        sums = tl.load(state + place * HEAD_DIM + dim, mask=has_dim, other=0.0)
    for split in range(tl.load(about + 2), tl.load(about + 3)):
        at = (found_row.to(tl.int64) + split * found_rows) * HEADS + head
        log_sum = tl.load(found_lse + at)
        better = tl.maximum(best, log_sum)
        base = tl.where(better == float("-inf"), 0.0, better)
        faded = tl.exp(best - base)
        weight = tl.exp(log_sum - base)
        total = total * faded + weight
        part = tl.load(found + at * HEAD_DIM + dim, mask=has_dim, other=0.0)
        sums = sums * faded + part * weight
        best = better
    if flags >= 2:
        base = tl.where(best == float("-inf"), 0.0, best)
        if SINKS:
            sink = tl.load(sinks + head)
            higher = tl.maximum(best, sink)
            sums = sums * tl.exp(best - higher)
            total = total * tl.exp(best - higher) + tl.exp(sink - higher)
            base = higher
        to = out + row * out_row + head * out_head + dim
        tl.store(to, (sums / total).to(out.dtype.element_ty), mask=has_dim)
        tl.store(lse + place, base + tl.log(total))
    else:
        whole = tl.where(total == 0, 1.0, total)
        tl.store(state + place * HEAD_DIM + dim, sums / whole, mask=has_dim)
        log_sum = tl.where(total == 0, float("-inf"), best + tl.log(whole))
        tl.store(state_lse + place, log_sum)


@triton.jit
def gather(
    out,
    frames,
    table,
    pieces,
    longest,
    frame_stride,
    blocks,
    batch,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TOKENS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Copies a block of a piece to contiguous `[2, batch, kv_heads, longest, head_dim]`.

    A program a piece, a block of it and a head of K or V.
    """
    piece = pieces + 8 * tl.program_id(0)
    which = tl.program_id(2)
    entry = tl.load(piece + 1).to(tl.int64)
    kv_begin = tl.load(piece + 5)
    kv_end = tl.load(piece + 6)
    block = kv_begin // BLOCK_TOKENS + tl.program_id(1)
    if block * BLOCK_TOKENS < kv_end:
        frame = tl.load(table + tl.load(piece).to(tl.int64) * blocks + block).to(tl.int64)
        token = tl.arange(0, TOKENS_PAD)[:, None]
        dim = tl.arange(0, DIM_PAD)[None, :]
        inside = (token < BLOCK_TOKENS) & (block * BLOCK_TOKENS + token < kv_end)
        inside = inside & (dim < HEAD_DIM)
        rows = tl.load(
            frames + frame * frame_stride + (which * BLOCK_TOKENS + token) * HEAD_DIM + dim,
            mask=inside,
        )
        line = (which // KV_HEADS * batch + entry) * KV_HEADS + which % KV_HEADS
        to = out + (line * longest + block * BLOCK_TOKENS + token) * HEAD_DIM + dim
        tl.store(to, rows, mask=inside)
