"""The sweeps: one kernel visits every element of every tensor.

Rows (one per tensor) are cut into chunks of CHUNK bytes. `run` chunks, of one row or of several
that follow each other, make a slot: what a program takes, and what leaves one partial result. Slots
are cut anew at every group, which is what gets totals of its own: a rule, or for `stats` a row. The
cut depends on sizes alone, and whoever finishes a group last adds its partials in float64 in slot
order. So the bits depend neither on the grid nor on the order of events; only whether a row is
16-byte aligned can change the last bits of a float64 total.

A thread adds up its elements of a chunk in the compute dtype, WIDTH in a row and DEPTH of those,
and goes on in float64. Each element passes at most DEPTH + WIDTH - 2 <= 15 additions and one
multiplication: a float32 sum of non-negative terms is within 16 * 2^-24 < 1e-6 of the exact one in
the worst case. Where rows are anchored, w - origin and the weight are a rounding more each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .penalties import divide, square_root
from .totals import finish, place_of
from .walk import (
    CHUNK,
    FIRST,
    GROUP,
    KIND,
    NUMEL,
    ROW,
    TENSOR,
    THREADS,
    UNALIGNED_BLOCKS,
    by_lane,
    find_row,
    load,
    narrow,
    pointer_to,
    store,
)

ANCHORED_BYTES = tl.constexpr(32)  # of a thread in a block of anchored rows, in the compute dtype
METRIC = tl.constexpr(4)  # numbers of a tensor's metric: numerator, factor, offset, root (0 or 1)


@triton.jit
def _weighed(x, weight, WEIGHT: tl.constexpr):
    return x if WEIGHT is None else weight * x


@triton.jit
def _prox(own, x, origin, weight, step, c0, c1, PROX, ORIGIN: tl.constexpr, WEIGHT: tl.constexpr):
    """origin + prox(x, step * weight), where x = own - origin; own itself where that stays."""
    if WEIGHT is not None:
        step = step * weight
    y = PROX(x, step, c0, c1)
    if ORIGIN is not None:
        y = tl.where(y == x, own, origin + y)
    return y


@triton.jit
def _visit(
    w_address,
    g_address,
    origin_address,
    weight_address,
    has_g,
    begin,
    end,
    n,
    c0,
    c1,
    scale,
    factor,
    offset,
    root,
    SWEEP: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    BESIDE: tl.constexpr,
    ORIGIN: tl.constexpr,
    WEIGHT: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUMS: tl.constexpr,
    TERM: tl.constexpr,
    GRAD: tl.constexpr,
    PROX: tl.constexpr,
):
    """One sweep over blocks [begin, end) of n elements; returns its sums, or those of `stats`.

    What lies at g: gradients, or for `prox_in_metric` moments, of dtype BESIDE. The penalty is that
    of w - origin, each element's times its weight: tensors of dtypes ORIGIN and WEIGHT, or None.

    ALIGNED blocks are of whole chunks at 16-byte boundaries and move without a mask, 16 bytes at a
    time. A mask needs a register for each element, anchors and weights some more: so a BLOCK is
    fewer elements there. Loads of STAGES blocks are under way at a time.
    """
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    WIDTH: tl.constexpr = 16 // BYTES if ALIGNED else 1
    DEPTH: tl.constexpr = BLOCK // (THREADS * WIDTH)
    tile = (
        tl.arange(0, DEPTH)[:, None, None] * (THREADS * WIDTH)
        + tl.arange(0, THREADS)[None, :, None] * WIDTH
        + tl.arange(0, WIDTH)[None, None, :]
    )
    sum0 = tl.zeros([THREADS], tl.float64)
    sum1 = tl.zeros([THREADS], tl.float64)
    top = tl.zeros([THREADS], COMPUTE)
    zeros = tl.zeros([THREADS], tl.int32)
    non_finite = tl.zeros([THREADS], tl.int32)
    for block in tl.range(begin, end, num_stages=STAGES):
        at = block * tl.full([], BLOCK, tl.int64)
        w = pointer_to(w_address, at, DTYPE, ALIGNED)
        g = pointer_to(g_address, at, BESIDE, ALIGNED)
        inside = tile < (n - at).to(tl.int32)
        own = load(w, tile, inside, ALIGNED, COMPUTE)
        x = own
        origin = own
        weight = own
        # All here, so that all loads are in flight together.
        if SWEEP == "accumulate" or SWEEP == "prox_in_metric":
            old = load(g, tile, inside, ALIGNED, COMPUTE)
        if WEIGHT is not None:
            place = pointer_to(weight_address, at, WEIGHT, ALIGNED)
            weight = load(place, tile, inside, ALIGNED, COMPUTE)
        if ORIGIN is not None:
            place = pointer_to(origin_address, at, ORIGIN, ALIGNED)
            origin = load(place, tile, inside, ALIGNED, COMPUTE)
            x = own - origin
        if SWEEP == "stats":
            a = tl.abs(x)
            sum0 += by_lane(a).to(tl.float64)
            sum1 += by_lane(a * a).to(tl.float64)
            top = tl.maximum(top, tl.max(tl.max(a, axis=2), axis=0))
            zero = a == 0 if ALIGNED else (a == 0) & inside
            zeros += by_lane(zero.to(tl.int32))
            non_finite += by_lane((x - x != 0).to(tl.int32))
        if SWEEP == "value" or SWEEP == "accumulate":
            sum0 += by_lane(_weighed(TERM(x, c0, c1, 0), weight, WEIGHT)).to(tl.float64)
            if SUMS > 1:
                sum1 += by_lane(_weighed(TERM(x, c0, c1, 1), weight, WEIGHT)).to(tl.float64)
        if SWEEP == "accumulate":
            new = old + scale * _weighed(GRAD(x, c0, c1), weight, WEIGHT)
            store(g, tile, narrow(new, DTYPE), inside, has_g, ALIGNED, True)
        if SWEEP == "gradient" or SWEEP == "prox":
            if SWEEP == "gradient":
                target = g
                y = scale * _weighed(GRAD(x, c0, c1), weight, WEIGHT)
            else:
                target = w
                y = _prox(own, x, origin, weight, scale, c0, c1, PROX, ORIGIN, WEIGHT)
            store(target, tile, narrow(y, DTYPE), inside, True, ALIGNED, False)
        if SWEEP == "prox_in_metric":
            d = tl.where(root, square_root(old), old)
            step = tl.where(has_g, divide(scale, factor * d + offset), scale)
            y = _prox(own, x, origin, weight, step, c0, c1, PROX, ORIGIN, WEIGHT)
            y = narrow(y, DTYPE)
            new = y.to(COMPUTE)
            store(w, tile, y, inside, True, ALIGNED, False)
            if not ALIGNED:
                new = tl.where(inside, new, 0)
            if ORIGIN is not None:
                new -= origin
            sum0 += by_lane(_weighed(TERM(new, c0, c1, 0), weight, WEIGHT)).to(tl.float64)
            if SUMS > 1:
                sum1 += by_lane(_weighed(TERM(new, c0, c1, 1), weight, WEIGHT)).to(tl.float64)
    total0 = 0.0
    total1 = 0.0
    total2 = 0.0
    total3 = 0.0
    total4 = 0.0
    if SWEEP != "gradient" and SWEEP != "prox":
        total0 = tl.sum(sum0)
        if SWEEP == "stats" or SUMS > 1:
            total1 = tl.sum(sum1)
    if SWEEP == "stats":
        total2 = tl.max(top).to(tl.float64)
        total3 = tl.sum(zeros.to(tl.float64))
        total4 = tl.sum(non_finite.to(tl.float64))
    return total0, total1, total2, total3, total4


@triton.jit
def _row_part(
    tensors,
    gradients,
    anchors,
    row,
    first,
    stop,
    strengths,
    scale,
    SWEEP: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    BESIDE: tl.constexpr,
    ORIGIN: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
    TERM: tl.constexpr,
    GRAD: tl.constexpr,
    PROX: tl.constexpr,
):
    """One sweep over chunks [first, stop) of a row: the aligned whole ones, then the rest."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    ELEMENTS: tl.constexpr = CHUNK // BYTES
    ANCHORED: tl.constexpr = ORIGIN is not None or WEIGHT is not None
    FEW: tl.constexpr = THREADS * ANCHORED_BYTES // (COMPUTE.primitive_bitwidth // 8)
    BLOCK: tl.constexpr = FEW if ANCHORED else ELEMENTS
    PART: tl.constexpr = FEW if ANCHORED else ELEMENTS // UNALIGNED_BLOCKS
    start = (first - tl.load(row + FIRST)) * CHUNK  # bytes
    n = tl.minimum(tl.load(row + NUMEL) - start // BYTES, (stop - first).to(tl.int64) * ELEMENTS)
    tensor = tl.load(row + TENSOR)
    w = tl.load(tensors + tensor) + start
    g = w
    has_g = True
    if SWEEP == "accumulate" or SWEEP == "gradient" or SWEEP == "prox_in_metric":
        g = tl.load(gradients + tensor)
        has_g = g != 0
        # Without any, w is read in its place: a mask on the loads would hold them back.
        g = tl.where(has_g, g + start // BYTES * (BESIDE.primitive_bitwidth // 8), w)
    if SWEEP == "gradient":
        n = tl.where(has_g, n, 0)
    if SWEEP == "prox" or SWEEP == "prox_in_metric":
        n = tl.where(w != start, n, 0)  # the tensor is at no address
    c0 = 0.0
    c1 = 0.0
    by = 0.0
    factor = 0.0
    offset = 0.0
    root = False
    if SWEEP != "stats":
        rule = tl.load(row + GROUP)
        c0 = tl.load(strengths + rule * 2).to(COMPUTE)
        c1 = tl.load(strengths + rule * 2 + 1).to(COMPUTE)
    if SWEEP == "accumulate" or SWEEP == "gradient" or SWEEP == "prox":
        by = tl.load(scale).to(COMPUTE)
    if SWEEP == "prox_in_metric":
        numbers = scale + tensor * METRIC
        by = tl.load(numbers).to(COMPUTE)
        factor = tl.load(numbers + 1).to(COMPUTE)
        offset = tl.load(numbers + 2).to(COMPUTE)
        root = tl.load(numbers + 3) != 0
    places = w | g
    origin = w
    weight = w
    if ORIGIN is not None:
        origin = tl.load(anchors + 2 * tensor)
        origin += start // BYTES * (ORIGIN.primitive_bitwidth // 8)
        places |= origin
    if WEIGHT is not None:
        weight = tl.load(anchors + 2 * tensor + 1)
        weight += start // BYTES * (WEIGHT.primitive_bitwidth // 8)
        places |= weight
    whole = tl.where(places % 16 == 0, n // ELEMENTS, 0).to(tl.int32)
    a0, a1, a2, a3, a4 = _visit(
        w,
        g,
        origin,
        weight,
        has_g,
        0,
        whole * (ELEMENTS // BLOCK),
        n,
        c0,
        c1,
        by,
        factor,
        offset,
        root,
        SWEEP,
        STAGES,
        True,
        BLOCK,
        DTYPE,
        BESIDE,
        ORIGIN,
        WEIGHT,
        COMPUTE,
        SUMS,
        TERM,
        GRAD,
        PROX,
    )
    begin = whole * (ELEMENTS // PART)
    end = tl.cdiv(n, PART).to(tl.int32)
    b0, b1, b2, b3, b4 = _visit(
        w,
        g,
        origin,
        weight,
        has_g,
        begin,
        end,
        n,
        c0,
        c1,
        by,
        factor,
        offset,
        root,
        SWEEP,
        1,
        False,
        PART,
        DTYPE,
        BESIDE,
        ORIGIN,
        WEIGHT,
        COMPUTE,
        SUMS,
        TERM,
        GRAD,
        PROX,
    )
    return a0 + b0, a1 + b1, tl.maximum(a2, b2), a3 + b3, a4 + b4


@triton.jit(
    do_not_specialize=["slots", "share", "run", "n_rows", "n_groups"],
    # A scalar may lie anywhere: its alignment must not compile the kernel anew.
    do_not_specialize_on_alignment=[
        "tensors",
        "gradients",
        "anchors",
        "rows",
        "groups",
        "strengths",
        "scale",
        "out",
        "value",
        "partials",
        "counters",
    ],
)
def sweep(
    tensors,  # int64 [tensors] addresses, 0 for what a prox leaves out
    gradients,  # int64 [tensors] addresses, 0 for none; for `prox_in_metric` of moments
    anchors,  # int64 [tensors, 2] addresses: of origins and weights; None if no kind has any
    rows,  # int64 [n_rows + 1, 5]
    groups,  # int64 [n_groups, 4]
    strengths,  # float64 [n_groups, 2]
    scale,  # float64: what gradients are multiplied by, or the step of `prox`; or [tensors, METRIC]
    out,  # float64 [n_groups, COLUMNS]
    value,  # float32 or float64 [1 + n_groups]: the value, and each group's
    partials,  # float64 [slots of groups that have several, COLUMNS]
    counters,  # int32 [n_groups + 1] slots done of each group, groups done; 0 between launches
    slots,
    share,  # slots of a program
    run,
    n_rows,
    n_groups,
    SWEEP: tl.constexpr,
    STAGES: tl.constexpr,  # blocks whose loads are under way at a time
    COLUMNS: tl.constexpr,
    DTYPES: tl.constexpr,  # of each kind of row
    BESIDE: tl.constexpr,  # of each kind of row, the dtype of its gradient or moment
    ORIGINS: tl.constexpr,  # of each kind of row, the dtype of what it is measured from, or None
    WEIGHTS: tl.constexpr,  # of each kind of row, the dtype of its elements' weights, or None
    PENALTY_OF: tl.constexpr,  # of each kind of row: an index into the following
    SUMS: tl.constexpr,
    TERMS: tl.constexpr,
    VALUES: tl.constexpr,
    GRADS: tl.constexpr,
    PROXES: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """One SWEEP over all rows. value, stats: reads N. gradient, prox: reads N, writes N.
    accumulate: reads 2 N, writes N. prox_in_metric: the same where moments are as wide as weights.
    Anchors are read too.

    Each program takes a contiguous share of the slots: one binary search, then increments.
    """
    TOTALS: tl.constexpr = SWEEP != "gradient" and SWEEP != "prox"
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, slots)
    row = find_row(rows, n_rows, begin * run)
    group = tl.load(rows + row * ROW + GROUP).to(tl.int32)
    for slot in range(begin, end):
        chunk = slot * run
        stop = chunk + run
        s0 = tl.full([], 0, tl.float64)
        s1 = tl.full([], 0, tl.float64)
        s2 = tl.full([], 0, tl.float64)
        s3 = tl.full([], 0, tl.float64)
        s4 = tl.full([], 0, tl.float64)
        into = out
        if TOTALS:
            into = place_of(
                out, partials, groups, tl.load(rows + row * ROW + GROUP).to(tl.int32), slot, COLUMNS
            )
        while chunk < stop:
            about = rows + row * ROW
            kind = tl.load(about + KIND).to(tl.int32)
            after = tl.load(about + ROW + FIRST).to(tl.int32)
            for k in tl.static_range(len(DTYPES)):
                if kind == k:
                    a0, a1, a2, a3, a4 = _row_part(
                        tensors,
                        gradients,
                        anchors,
                        about,
                        chunk,
                        stop,
                        strengths,
                        scale,
                        SWEEP,
                        STAGES,
                        DTYPES[k],
                        BESIDE[k],
                        ORIGINS[k],
                        WEIGHTS[k],
                        SUMS[PENALTY_OF[k]],
                        TERMS[PENALTY_OF[k]],
                        GRADS[PENALTY_OF[k]],
                        PROXES[PENALTY_OF[k]],
                    )
                    s0 += a0
                    s1 += a1
                    s2 = tl.maximum(s2, a2)
                    s3 += a3
                    s4 += a4
            # A row that goes on in the next slot stays the current one.
            row = tl.where(after <= stop, row + 1, row)
            chunk = after
        if TOTALS:
            tl.store(into, s0)
            tl.store(into + 1, s1)
        if SWEEP == "stats":
            # A maximum may lose NaN; the sum of |w| keeps it.
            tl.store(into + 2, tl.where(s0 == s0, s2, s0))
            tl.store(into + 3, s3)
            tl.store(into + 4, s4)
    if TOTALS:
        finish(
            out,
            None if SWEEP == "stats" else value,
            None,
            strengths,
            groups,
            n_groups,
            partials,
            counters,
            group,
            begin,
            end,
            COLUMNS,
            8 if COLUMNS > 2 else 2,
            len(SUMS),
            VALUES,
        )
