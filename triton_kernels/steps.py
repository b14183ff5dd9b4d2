"""An optimizer's step: one kernel visits every element of every tensor, and its states.

Rows, slots (sweeps.py) and totals are those of the sweeps, so the bits depend on neither the grid
nor the order of events. The elements of a chunk are taken in smaller blocks, as more lies beside
each: weight, gradient, up to three states, and perhaps a float32 master of the weight, all in
flight together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .penalties import at_least, divide
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

TOTALS = tl.constexpr(3)  # of a group: two sums, zeros
BYTES = tl.constexpr(32)  # of a thread in a block, in the compute dtype
NUMBERS = tl.constexpr(12)  # of a set: the 9 of updates.py, the metric's numerator, factor, offset

# The rows of the table of places, int64 [7, tensors]; the states are three. A master's address is 0
# for none.
WEIGHTS = tl.constexpr(0)
GRADIENTS = tl.constexpr(1)
STATES = tl.constexpr(2)
MASTERS = tl.constexpr(5)
SETS = tl.constexpr(6)  # index into the numbers


@triton.jit
def _hash(x):
    """lowbias32, a mixing of 32 bits (Wellons, 2018)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, element, tile, key):
    """float32 x as bfloat16, up with the probability of its distance from the one below.

    16 bits from a hash of the element's index in its row and the row's key join those that
    truncation drops. `element` is the index of the tile's first: a multiple of the tile's size.
    """
    seed = key ^ ((element >> 32).to(tl.uint32) * 0x9E3779B9) ^ element.to(tl.uint32)
    noise = _hash(tile.to(tl.uint32) ^ seed) & 0xFFFF
    bits = (x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return narrow(tl.where(x - x == 0, bits.to(tl.float32, bitcast=True), x), tl.bfloat16)


@triton.jit
def _shrunk(w, q, p, l1, l2):
    """The elastic net's prox at step p / q, in one division: csrc/penalties.h tells how."""
    a = tl.abs(w)
    k = 2 * p * l2
    near = k < q
    cut = divide(tl.where(near, k, -q) * a + p * l1, q + k)
    u = tl.where(a < float("inf"), tl.where(near, a, 0) - cut, a)
    return tl.where(u > 0, tl.where(w < 0, -u, u), cut - cut)


@triton.jit
def _moved_and_shrunk(w, move, q, p, l1, l2):
    """The same of w - move / q, and of both one division: csrc/updates.h tells how."""
    k = 2 * p * l2
    t = p * l1
    scaled = q * w - move
    side = tl.where(scaled < 0, -t, t)
    finite = tl.abs(w) < float("inf")
    near = k < q
    start = tl.where(near | ~finite, w, 0)
    top = tl.where(near, k * w + move, -scaled) + side
    gone = divide(tl.where(finite, top, move), tl.where(finite, q + k, q))
    return tl.where(tl.abs(scaled) <= t, 0, start - gone)


@triton.jit
def _visit(
    w_address,
    g_address,
    a_address,
    b_address,
    c_address,
    master_address,
    key,
    element,
    begin,
    end,
    n,
    numbers,
    by,
    unscaled,
    keep,
    c0,
    c1,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MAYBE: tl.constexpr,
    WITH: tl.constexpr,
    KEPT: tl.constexpr,
    RATIO: tl.constexpr,
    UPDATE: tl.constexpr,
    VARIANT: tl.constexpr,
    VARIANT_TOO: tl.constexpr,
    ELEMENTARY: tl.constexpr,
    SUMS: tl.constexpr,
    TERM: tl.constexpr,
    GRAD: tl.constexpr,
    PROX: tl.constexpr,
):
    """The step in blocks [begin, end) of n elements, of which the first is `element` of its row;
    returns two sums and the zeros. KEPT is the number of states.

    What counts is the weight as it goes on: the master, or what is stored; before it is rounded
    stochastically, as chance makes no zeros.
    """
    WIDTH: tl.constexpr = 16 // (DTYPE.primitive_bitwidth // 8) if ALIGNED else 1
    DEPTH: tl.constexpr = BLOCK // (THREADS * WIDTH)
    OWN: tl.constexpr = tl.float32 if MASTER else DTYPE
    # A metric is positive: a state and an offset of 0 give the largest step. (A tensor, as a
    # comparison rounds its constant to float32.)
    SMALLEST: tl.constexpr = 2.2250738585072014e-308 if COMPUTE == tl.float64 else 2.0**-126
    smallest = tl.full([], SMALLEST, COMPUTE)
    l1 = c0 if ELEMENTARY != 2 else tl.zeros_like(c0)
    l2 = c1 if ELEMENTARY == 3 else c0 if ELEMENTARY == 2 else tl.zeros_like(c0)
    tile = (
        tl.arange(0, DEPTH)[:, None, None] * (THREADS * WIDTH)
        + tl.arange(0, THREADS)[None, :, None] * WIDTH
        + tl.arange(0, WIDTH)[None, None, :]
    )
    sum0 = tl.zeros([THREADS], tl.float64)
    sum1 = tl.zeros([THREADS], tl.float64)
    zeros = tl.zeros([THREADS], tl.int32)
    for block in range(begin, end):
        at = block * tl.full([], BLOCK, tl.int64)
        w = pointer_to(w_address, at, DTYPE, ALIGNED)
        master = pointer_to(master_address, at, OWN, ALIGNED)
        inside = tile < (n - at).to(tl.int32)
        # All here, so that all loads are in flight together.
        own = load(master if MASTER else w, tile, inside, ALIGNED, COMPUTE)
        g = load(pointer_to(g_address, at, DTYPE, ALIGNED), tile, inside, ALIGNED, COMPUTE)
        a = g
        b = g
        c = g
        if KEPT > 0:
            a_at = pointer_to(a_address, at, STATE, ALIGNED)
            a = load(a_at, tile, inside, ALIGNED, COMPUTE)
        if KEPT > 1:
            b_at = pointer_to(b_address, at, STATE, ALIGNED)
            b = load(b_at, tile, inside, ALIGNED, COMPUTE)
        if KEPT > 2:
            c_at = pointer_to(c_address, at, STATE, ALIGNED)
            c = load(c_at, tile, inside, ALIGNED, COMPUTE)
        g = unscaled * g
        if WITH == "grad":
            sum0 += by_lane(TERM(own, c0, c1, 0)).to(tl.float64)
            if SUMS > 1:
                sum1 += by_lane(TERM(own, c0, c1, 1)).to(tl.float64)
            g = g + by * GRAD(own, c0, c1)
        x = own * numbers[1]
        move, q, a, b, c = UPDATE(x, g, a, b, c, numbers, VARIANT, VARIANT_TOO)
        if WITH == "prox" and ELEMENTARY and RATIO:
            new = _moved_and_shrunk(x, move, at_least(q, smallest), by, l1, l2)
        else:
            new = x - divide(move, q) if RATIO else x - move
        if WITH == "prox" and ELEMENTARY and not RATIO:
            new = _shrunk(new, at_least(q, smallest), by, l1, l2)
        if WITH == "prox" and not ELEMENTARY:
            new = PROX(new, divide(by, at_least(q, smallest)), c0, c1)
        if MAYBE:
            new = tl.where(keep, new, x)  # which is the old weight then: see `_row_part`
        if STOCHASTIC:
            stored = _rounded(new, element + at, tile, key)
        else:
            stored = narrow(new, DTYPE)
        store(w, tile, stored, inside, keep, ALIGNED, MAYBE)
        if MASTER:
            store(master, tile, new, inside, keep, ALIGNED, MAYBE)
        if KEPT > 0:
            store(a_at, tile, narrow(a, STATE), inside, keep, ALIGNED, MAYBE)
        if KEPT > 1:
            store(b_at, tile, narrow(b, STATE), inside, keep, ALIGNED, MAYBE)
        if KEPT > 2:
            store(c_at, tile, narrow(c, STATE), inside, keep, ALIGNED, MAYBE)
        if WITH is not None:
            counted = new if MASTER or STOCHASTIC else stored.to(COMPUTE)
            if not ALIGNED:
                counted = tl.where(inside, counted, 0)
            zero = counted == 0 if ALIGNED else (counted == 0) & inside
            zeros += by_lane(zero.to(tl.int32))
            if WITH == "prox":
                sum0 += by_lane(TERM(counted, c0, c1, 0)).to(tl.float64)
                if SUMS > 1:
                    sum1 += by_lane(TERM(counted, c0, c1, 1)).to(tl.float64)
    total0 = 0.0
    total1 = 0.0
    total2 = 0.0
    if WITH is not None:
        total0 = tl.sum(sum0)
        total2 = tl.sum(zeros.to(tl.float64))
        if SUMS > 1:
            total1 = tl.sum(sum1)
    return total0, total1, total2


@triton.jit
def _row_part(
    places,
    n_tensors,
    keys,
    numbers,
    row,
    first,
    stop,
    strengths,
    scale,
    grad_scale,
    found_inf,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WITH: tl.constexpr,
    KEPT: tl.constexpr,
    RATIO: tl.constexpr,
    UPDATE: tl.constexpr,
    VARIANT: tl.constexpr,
    VARIANT_TOO: tl.constexpr,
    ELEMENTARY: tl.constexpr,
    SUMS: tl.constexpr,
    TERM: tl.constexpr,
    GRAD: tl.constexpr,
    PROX: tl.constexpr,
):
    """The step in chunks [first, stop) of a row: the aligned whole ones, then the rest."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    ITEM: tl.constexpr = DTYPE.primitive_bitwidth // 8
    STATE_ITEM: tl.constexpr = STATE.primitive_bitwidth // 8
    WHOLE: tl.constexpr = CHUNK // ITEM
    BLOCK: tl.constexpr = THREADS * BYTES // (COMPUTE.primitive_bitwidth // 8)
    element = (first - tl.load(row + FIRST)) * WHOLE
    n = tl.minimum(tl.load(row + NUMEL) - element, (stop - first).to(tl.int64) * WHOLE)
    tensor = tl.load(row + TENSOR)
    place = places + tensor
    w = tl.load(place + WEIGHTS * n_tensors) + element * ITEM
    g = tl.load(place + GRADIENTS * n_tensors) + element * ITEM
    touched = w | g
    a = w
    b = w
    c = w
    if KEPT > 0:
        a = tl.load(place + STATES * n_tensors) + element * STATE_ITEM
        touched |= a
    if KEPT > 1:
        b = tl.load(place + (STATES + 1) * n_tensors) + element * STATE_ITEM
        touched |= b
    if KEPT > 2:
        c = tl.load(place + (STATES + 2) * n_tensors) + element * STATE_ITEM
        touched |= c
    master = w
    if MASTER:
        master = tl.load(place + MASTERS * n_tensors) + element * 4
        touched |= master
    key = tl.full([], 0, tl.uint32)
    if STOCHASTIC:
        key = tl.load(keys + tensor).to(tl.uint32)
    own = numbers + tl.load(place + SETS * n_tensors) * NUMBERS
    c0 = tl.full([], 0, COMPUTE)
    c1 = tl.full([], 0, COMPUTE)
    by = tl.full([], 0, COMPUTE)
    if WITH is not None:
        rule = tl.load(row + GROUP)
        c0 = tl.load(strengths + rule * 2).to(COMPUTE)
        c1 = tl.load(strengths + rule * 2 + 1).to(COMPUTE)
        by = tl.load(own + 9 if WITH == "prox" else scale).to(COMPUTE)
    unscaled = tl.full([], 1, COMPUTE)
    if grad_scale is not None:
        unscaled = (1 / tl.load(grad_scale).to(tl.float64)).to(COMPUTE)
    keep = True
    if found_inf is not None:
        keep = tl.load(found_inf) == 0
    n0 = tl.load(own).to(COMPUTE)
    n1 = tl.where(keep, tl.load(own + 1), 1).to(COMPUTE)
    n2 = tl.load(own + 2).to(COMPUTE)
    n3 = tl.load(own + 3).to(COMPUTE)
    n4 = tl.load(own + 4).to(COMPUTE)
    n5 = tl.load(own + 5).to(COMPUTE)
    n6 = tl.load(own + 6).to(COMPUTE)
    n7 = tl.load(own + 7).to(COMPUTE)
    n8 = tl.load(own + 8).to(COMPUTE)
    PART: tl.constexpr = BLOCK // UNALIGNED_BLOCKS
    whole = tl.where(touched % 16 == 0, n // WHOLE, 0).to(tl.int32)
    s0 = tl.full([], 0, tl.float64)
    s1 = tl.full([], 0, tl.float64)
    s2 = tl.full([], 0, tl.float64)
    for ALIGNED in tl.static_range(2):
        t0, t1, t2 = _visit(
            w,
            g,
            a,
            b,
            c,
            master,
            key,
            element,
            0 if ALIGNED else whole * (WHOLE // PART),
            whole * (WHOLE // BLOCK) if ALIGNED else tl.cdiv(n, PART).to(tl.int32),
            n,
            (n0, n1, n2, n3, n4, n5, n6, n7, n8),
            by,
            unscaled,
            keep,
            c0,
            c1,
            ALIGNED,
            BLOCK if ALIGNED else PART,
            DTYPE,
            STATE,
            COMPUTE,
            MASTER,
            STOCHASTIC,
            found_inf is not None,
            WITH,
            KEPT,
            RATIO,
            UPDATE,
            VARIANT,
            VARIANT_TOO,
            ELEMENTARY,
            SUMS,
            TERM,
            GRAD,
            PROX,
        )
        s0 += t0
        s1 += t1
        s2 += t2
    return s0, s1, s2


@triton.jit(
    do_not_specialize=["slots", "share", "run", "n_rows", "n_groups", "n_tensors"],
    # A scalar may lie anywhere: its alignment must not compile the kernel anew.
    do_not_specialize_on_alignment=[
        "places",
        "keys",
        "numbers",
        "rows",
        "groups",
        "strengths",
        "scale",
        "grad_scale",
        "found_inf",
        "out",
        "value",
        "zeros",
        "partials",
        "counters",
    ],
)
def step(
    places,  # int64 [7, n_tensors]
    keys,  # int64 [n_tensors], of stochastic rounding; None if no kind asks for it
    numbers,  # float64 [sets, NUMBERS]
    rows,  # int64 [n_rows + 1, 5]
    groups,  # int64 [n_groups, 4]
    strengths,  # float64 [n_groups, 2]
    scale,  # float64: what the penalty's gradient is multiplied by
    grad_scale,  # what gradients are divided by; or None
    found_inf,  # where it is not 0, nothing is stored; or None
    out,  # float64 [n_groups, TOTALS]
    value,  # float32 or float64 [1 + n_groups]: the value, and each group's
    zeros,  # int64: penalised weights that are 0
    partials,  # float64 [slots of groups that have several, TOTALS]
    counters,  # int32 [n_groups + 1] slots done of each group, groups done; 0 between launches
    slots,
    share,  # slots of a program
    run,
    n_rows,
    n_groups,
    n_tensors,
    DTYPES: tl.constexpr,  # of each kind of row: of its weights and gradients
    STATE_DTYPES: tl.constexpr,
    MASTERED: tl.constexpr,  # whether the weights are those of a float32 master
    STOCHASTIC: tl.constexpr,  # whether what is stored is rounded stochastically
    PENALISED: tl.constexpr,
    PENALTY_OF: tl.constexpr,  # an index into SUMS and what follows
    KEPT: tl.constexpr,  # states
    RATIOS: tl.constexpr,
    UPDATES: tl.constexpr,
    VARIANTS: tl.constexpr,
    VARIANTS_TOO: tl.constexpr,
    WITH: tl.constexpr,  # "grad" or "prox"
    ELEMENTARY: tl.constexpr,  # of each penalty: 1 for l1, 2 for l2, 3 for both, 0 for another
    SUMS: tl.constexpr,
    TERMS: tl.constexpr,
    VALUES: tl.constexpr,
    GRADS: tl.constexpr,
    PROXES: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """The step of all rows: reads weights, gradients and states, writes weights and states.

    Each program takes a contiguous share of the slots: one binary search, then increments.
    """
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
        own_group = tl.load(rows + row * ROW + GROUP).to(tl.int32)
        into = place_of(out, partials, groups, own_group, slot, TOTALS)
        while chunk < stop:
            about = rows + row * ROW
            kind = tl.load(about + KIND).to(tl.int32)
            after = tl.load(about + ROW + FIRST).to(tl.int32)
            for k in tl.static_range(len(DTYPES)):
                if kind == k:
                    t0, t1, t2 = _row_part(
                        places,
                        n_tensors,
                        keys,
                        numbers,
                        about,
                        chunk,
                        stop,
                        strengths,
                        scale,
                        grad_scale,
                        found_inf,
                        DTYPES[k],
                        STATE_DTYPES[k],
                        MASTERED[k],
                        STOCHASTIC[k],
                        WITH if PENALISED[k] else None,
                        KEPT[k],
                        RATIOS[k],
                        UPDATES[k],
                        VARIANTS[k],
                        VARIANTS_TOO[k],
                        ELEMENTARY[PENALTY_OF[k]],
                        SUMS[PENALTY_OF[k]],
                        TERMS[PENALTY_OF[k]],
                        GRADS[PENALTY_OF[k]],
                        PROXES[PENALTY_OF[k]],
                    )
                    s0 += t0
                    s1 += t1
                    s2 += t2
            # A row that goes on in the next slot stays the current one.
            row = tl.where(after <= stop, row + 1, row)
            chunk = after
        tl.store(into, s0)
        tl.store(into + 1, s1)
        tl.store(into + 2, s2)
    finish(
        out,
        value,
        zeros,
        strengths,
        groups,
        n_groups,
        partials,
        counters,
        group,
        begin,
        end,
        TOTALS,
        4,
        len(SUMS),
        VALUES,
    )
