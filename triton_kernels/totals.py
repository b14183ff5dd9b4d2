"""From slots' partials to totals: the table of groups, and whoever finishes one last."""

from __future__ import annotations

import triton
import triton.language as tl

# The fields of the group table, int64 [groups, 4].
BEGIN = tl.constexpr(0)  # slot
END = tl.constexpr(1)  # slot
PARTIALS = tl.constexpr(2)  # where its partials begin; only groups of several slots have any
PENALTY = tl.constexpr(3)
GROUP_ROW = tl.constexpr(4)


@triton.jit
def _finish_group(
    out, partials, count, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TOP: tl.constexpr
):
    """out = the totals over `count` partials of COLUMNS each, in a fixed order.

    With TOP, column 2 is a maximum, which has lost its NaN; the sum of |w| in column 0 has kept it.
    """
    BLOCK: tl.constexpr = 1024 // WIDTH
    slot = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)
    sums = tl.zeros([BLOCK, WIDTH], tl.float64)
    tops = tl.zeros([BLOCK, WIDTH], tl.float64)
    for i in range(0, count, BLOCK):
        # From the second-level cache: other multiprocessors wrote them.
        part = tl.load(
            partials + (i + slot) * COLUMNS + column[None, :],
            mask=(i + slot < count) & (column[None, :] < COLUMNS),
            other=0.0,
            cache_modifier=".cg",
        )
        sums += part
        if TOP:
            tops = tl.maximum(tops, part)
    total = tl.sum(sums, axis=0)
    if TOP:
        l1 = tl.sum(tl.where(column == 0, total, 0.0))
        top = tl.where(l1 == l1, tl.max(tops, axis=0), l1)
        total = tl.where(column == 2, top, total)
    tl.store(out + column, total, mask=column < COLUMNS)


@triton.jit
def _finish_value(
    value,
    zeros,
    sums,
    strengths,
    groups,
    n_groups,
    COLUMNS: tl.constexpr,
    PENALTIES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """value = the groups' values added up, in a fixed order; then each of them.

    zeros, unless it is None: column 2 added up.
    """
    BLOCK: tl.constexpr = 128
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int64)
    for i in range(0, n_groups, BLOCK):
        group = i + lane
        known = group < n_groups
        penalty = tl.load(groups + group * GROUP_ROW + PENALTY, mask=known, other=0)
        about = sums + group * COLUMNS
        s0 = tl.load(about, mask=known, other=0.0, cache_modifier=".cg")
        s1 = tl.load(about + 1, mask=known, other=0.0, cache_modifier=".cg")
        c0 = tl.load(strengths + group * 2, mask=known, other=0.0)
        c1 = tl.load(strengths + group * 2 + 1, mask=known, other=0.0)
        own = tl.zeros([BLOCK], tl.float64)
        for p in tl.static_range(PENALTIES):
            own = tl.where(penalty == p, VALUES[p](s0, s1, c0, c1), own)
        tl.store(value + 1 + group, own, mask=known)
        total += tl.where(known, own, 0.0)
        if zeros is not None:
            s2 = tl.load(about + 2, mask=known, other=0.0, cache_modifier=".cg")
            count += s2.to(tl.int64)
    tl.store(value, tl.sum(total))
    if zeros is not None:
        tl.store(zeros, tl.sum(count))


@triton.jit
def place_of(out, partials, groups, group, slot, COLUMNS: tl.constexpr):
    """Where a slot's totals go: to its partial, or straight out when it is all of its group."""
    about = groups + group * GROUP_ROW
    first = tl.load(about + BEGIN)
    partial = partials + (tl.load(about + PARTIALS) + slot - first) * COLUMNS
    return tl.where(tl.load(about + END) - first == 1, out + group * COLUMNS, partial)


@triton.jit
def _count(counter, done, of):
    """Whether this call brings the counter to `of`; then resets it, for the next launch.

    Everything that the callers stored before their calls is visible to the one that gets True.
    """
    tl.debug_barrier()
    complete = tl.atomic_add(counter, done, sem="acq_rel", scope="gpu") + done == of
    if complete:
        tl.store(counter, 0)
    return complete


@triton.jit
def finish(
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
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PENALTIES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Finish the groups, of which slots [begin, end), from `group` on, were the last to be done;
    and after the last group the value, unless it is None."""
    finished = 0
    slot = begin
    while slot < end:
        about = groups + group * GROUP_ROW
        first = tl.load(about + BEGIN).to(tl.int32)
        last = tl.load(about + END).to(tl.int32)
        count = last - first
        complete = count == 1
        if count > 1:
            mine = tl.minimum(end, last) - slot
            complete = _count(counters + group, mine, count)
            if complete:
                _finish_group(
                    out + group * COLUMNS,
                    partials + tl.load(about + PARTIALS) * COLUMNS,
                    count,
                    COLUMNS,
                    WIDTH,
                    value is None,
                )
        finished += complete.to(tl.int32)
        slot = last
        group += 1
    if value is not None:
        if finished > 0:
            if _count(counters + n_groups, finished, n_groups):
                _finish_value(
                    value, zeros, out, strengths, groups, n_groups, COLUMNS, PENALTIES, VALUES
                )
