"""The way from programs to rows to elements: the table of rows; reading and writing any dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from .penalties import sign

INTERPRETED = tl.constexpr(not isinstance(sign, triton.JITFunction))
CHUNK = tl.constexpr(4096)  # bytes
THREADS = tl.constexpr(128)  # of a program
UNALIGNED_BLOCKS = tl.constexpr(2)  # that a chunk is visited in when it is not whole and aligned

# The fields of the row table, int64 [rows + 1, 5]. A row's chunks are numbered FIRST, FIRST + 1,
# ...; every group starts at a multiple of `run`: slot s holds the numbers [s * run, (s + 1) * run).
FIRST = tl.constexpr(0)
NUMEL = tl.constexpr(1)
KIND = tl.constexpr(2)  # index into DTYPES and PENALTY_OF
GROUP = tl.constexpr(3)
TENSOR = tl.constexpr(4)  # index into the pointer tables
ROW = tl.constexpr(5)


@triton.jit
def find_row(rows, n_rows, chunk):
    """The last row with FIRST <= chunk."""
    low = 0
    high = n_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(rows + middle * ROW + FIRST) <= chunk:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def by_lane(x):
    """[depth, lanes, width] -> [lanes], within a thread."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to nearest even. The interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def pointer_to(address, element, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to an element of the tensor at an address."""
    place = (address + element * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(place, 16) if ALIGNED else place


@triton.jit
def load(place, tile, inside, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr):
    if ALIGNED:
        x = tl.load(place + tile)
    else:
        x = tl.load(place + tile, mask=inside, other=0.0)
    return x.to(COMPUTE)


@triton.jit
def store(place, tile, x, inside, keep, ALIGNED: tl.constexpr, MAYBE: tl.constexpr):
    """Of what is inside; with MAYBE, only if `keep`.

    That is the same for every element of a whole chunk, so that its stores stay whole.
    """
    if MAYBE:
        written = tl.zeros_like(tile) + keep.to(tl.int32) != 0
        if not ALIGNED:
            written = written & inside
        tl.store(place + tile, x, mask=written)
    elif ALIGNED:
        tl.store(place + tile, x)
    else:
        tl.store(place + tile, x, mask=inside)
