"""Where tensors lie in memory, and whether they have any of their own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn


def has_own_dispatch(t: Tensor) -> bool:
    """Whether `t` is a wrapper (a DTensor, a fake tensor, ...) whose memory is not its own."""
    return type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__


def is_wrapper(t: Tensor) -> bool:
    """`has_own_dispatch`, quickly in the common case."""
    return type(t) not in (Tensor, nn.Parameter) and has_own_dispatch(t)


def is_freed(t: Tensor) -> bool:
    """Whether `t` has elements of its own but no memory for them."""
    if has_own_dispatch(t) or t.device.type == "meta" or t.numel() == 0:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        return False
    return not has_memory(t)


def has_memory(t: Tensor) -> bool:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.untyped_storage().nbytes() >= (t.storage_offset() + last + 1) * t.element_size()


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory once: any permutation of a contiguous tensor."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one may lie where one of the other does, as far as can be seen."""
    if not (_has_address(a) and _has_address(b)):
        return False
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    return a_begin < b_end and b_begin < a_end


def sharing(tensors: Sequence[Tensor]) -> Callable[[Tensor | None], bool]:
    """Whether a tensor shares memory with any of these."""
    extents = sorted(_extent(t) for t in tensors if _has_address(t) and t.numel() > 0)
    begins = [begin for begin, _ in extents]
    reach = list(accumulate((end for _, end in extents), max))

    def shares(t: Tensor | None) -> bool:
        if t is None or not _has_address(t):
            return False
        begin, end = _extent(t)
        before = bisect_left(begins, end)
        return before > 0 and reach[before - 1] > begin

    return shares


def overlapping(addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Rows that share memory with another row; those without an address or bytes are left out."""
    order = sorted((a, i) for i, a in enumerate(addresses) if a and sizes[i])
    found: set[int] = set()
    end = last = 0  # of the rows so far, the one that reaches farthest
    for begin, i in order:
        if begin < end:
            found |= {last, i}
        if begin + sizes[i] > end:
            end, last = begin + sizes[i], i
    return sorted(found)


def sharing_each_other(tensors: Iterable[Tensor]) -> list[int]:
    """Those of the tensors that share memory with another of them."""
    extents = [_extent(t) if _has_address(t) else (0, 0) for t in tensors]
    return overlapping([begin for begin, _ in extents], [end - begin for begin, end in extents])


def block(t: Tensor | None) -> tuple[int, int]:
    """Where its elements begin, and for how many bytes from there on all is its own.

    Between the elements of one that is not dense another's may lie.
    """
    if t is None or not _has_address(t):
        return 0, 0
    return t.data_ptr(), t.nbytes if is_dense(t) else t.element_size()


def _has_address(t: Tensor) -> bool:
    return not (
        has_own_dispatch(t)
        or t.layout != torch.strided
        or t.device.type == "meta"
        or torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def _extent(t: Tensor) -> tuple[int, int]:
    """Where its elements begin and end."""
    begin = t.data_ptr()
    if t.numel() == 0:
        return begin, begin
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (last + 1) * t.element_size()
