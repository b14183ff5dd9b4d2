"""Bytes that a GPU's memory reads and writes during a run, by its hardware counters.

CUPTI's Range Profiling API (CUDA 12.6 and later), through the library that torch has loaded: one
range, one pass, nothing replayed. (`profiler_metrics` of torch.profiler ends with CUDA 12.6.) The
fields are those of cupti_profiler_host.h and cupti_range_profiler.h, in their
order, without those that later versions have added behind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from ctypes import c_char_p, c_double, c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_void_p
from functools import partial
from typing import Any

import torch

_METRICS = (b"dram__bytes_read.sum", b"dram__bytes_write.sum")
_RANGE_PROFILER, _USER_RANGE, _USER_REPLAY = c_int(0), c_int(1), c_int(1)  # CUPTI's enums
_ONE_LEVEL = {"levels": c_uint16(1), "lowest": c_uint16(1), "at_pass": c_size_t(0)}


class Uncounted(RuntimeError):
    """The counters cannot be read, for this reason."""


def bytes_moved(run: Callable[[], object], device: torch.device) -> int:
    """Bytes read and written by the memory of this GPU, the current one, during one run.

    Raises:
        Uncounted: with the reason.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        raise Uncounted(f"{device.type} is no GPU of NVIDIA's")
    try:
        cupti = ctypes.CDLL(f"libcupti.so.{torch.version.cuda.partition('.')[0]}")
        context = c_void_p()
        ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context))
    except OSError as error:
        raise Uncounted(str(error)) from error
    return sum(_count(run, cupti, context, torch.cuda.current_device()))


def _count(run: Callable[[], object], cupti: Any, context: c_void_p, index: int) -> list[int]:
    """The metrics of one run, each a number of bytes."""
    call = partial(_call, cupti)
    with ExitStack() as after:
        call("ProfilerInitialize")
        after.callback(call, "ProfilerDeInitialize")
        chip = call("DeviceGetChipName", index=c_size_t(index), chip=c_char_p()).chip
        asked = {"kind": _RANGE_PROFILER, "chip": c_char_p(chip), "available": c_void_p()}
        host = c_void_p(call("ProfilerHostInitialize", **asked, host=c_void_p()).host)
        after.callback(call, "ProfilerHostDeinitialize", host=host)
        names = (c_char_p * len(_METRICS))(*_METRICS)
        metrics = {"names": _address(names), "metrics": c_size_t(len(names))}
        call("ProfilerHostConfigAddMetrics", host=host, **metrics)
        config = _buffer(call("ProfilerHostGetConfigImageSize", host=host, size=c_size_t()).size)
        configured = {"size": c_size_t(len(config)), "config": _address(config)}
        call("ProfilerHostGetConfigImage", host=host, **configured)

        ranges = c_void_p(call("RangeProfilerEnable", context=context, ranges=c_void_p()).ranges)
        after.callback(call, "RangeProfilerDisable", ranges=ranges)
        most = {"most": c_size_t(1), "nodes": c_uint32(1), "size": c_size_t()}
        found = call("RangeProfilerGetCounterDataSize", ranges=ranges, **metrics, **most)
        data = _buffer(found.size)
        size, at = c_size_t(len(data)), _address(data)
        call("RangeProfilerCounterDataImageInitialize", ranges=ranges, size=size, data=at)
        call(
            "RangeProfilerSetConfig",
            ranges=ranges, **configured, data_size=size, data=at, range=_USER_RANGE,
            replay=_USER_REPLAY, most=c_size_t(1), **_ONE_LEVEL, level=c_uint16(1),
        )  # fmt: skip

        torch.cuda.synchronize()
        call("RangeProfilerStart", ranges=ranges)
        call("RangeProfilerPushRange", ranges=ranges, name=c_char_p(b"run"))
        try:
            run()
            torch.cuda.synchronize()
        finally:
            call("RangeProfilerPopRange", ranges=ranges)
            outcome = {"at_pass": c_size_t(), "level": c_size_t(), "all": c_uint8()}
            stopped = call("RangeProfilerStop", ranges=ranges, **outcome)
        if not stopped.all:
            raise Uncounted("one pass is not enough for these metrics")
        if call("RangeProfilerDecodeData", ranges=ranges, dropped=c_size_t()).dropped:
            raise Uncounted("the range was dropped")
        values = (c_double * len(names))(*[-1.0] * len(names))
        call(
            "ProfilerHostEvaluateToGpuValues",
            host=host, data=at, size=size, range=c_size_t(0), **metrics, values=_address(values),
        )  # fmt: skip
    if not all(0 <= value < 2**63 for value in values):
        raise Uncounted(f"the counters read {list(values)}")
    return [round(value) for value in values]


def _call(cupti: Any, function: str, /, **given: Any) -> ctypes.Structure:
    """One function of CUPTI: all take one struct of its size, a null and these fields."""
    fields = [("struct_size", c_size_t), ("private", c_void_p)]
    fields += [(field, type(value)) for field, value in given.items()]
    kind = type("Parameters", (ctypes.Structure,), {"_fields_": fields})
    last = getattr(kind, fields[-1][0])
    parameters = kind(last.offset + last.size, None, *given.values())
    try:
        called = getattr(cupti, f"cupti{function}")
    except AttributeError as error:
        raise Uncounted(f"this CUPTI has no cupti{function}; CUDA 12.6 or later has") from error
    if status := called(ctypes.byref(parameters)):
        text = c_char_p()
        cupti.cuptiGetResultString(status, ctypes.byref(text))
        raise Uncounted(f"cupti{function}: {(text.value or b'error %d' % status).decode()}")
    return parameters


def _buffer(size: int) -> Any:
    return (c_uint8 * size)()


def _address(buffer: Any) -> c_void_p:
    return c_void_p(ctypes.addressof(buffer))
