"""All ways on one workload: checked, timed by turns, set against the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..penalties import Penalty
from ..reference import FORMULAS
from .check import Disagreement, Expected, check
from .counters import bytes_moved
from .kernels import kernels, trace_of
from .memory import peak_extra_bytes
from .parameters import Parameters
from .peers import NotWritten
from .record import Row
from .timing import Interrupted, Timing, by_turns, host_seconds
from .ways import LIMITS, STEP, WAYS, Run, Way, on_backend

MOST_PROFILED = 1000  # tensors: the loop's launches are many times as many, and slow to read out
_LONG = 0.2  # seconds: a run that takes longer is repeated less often
_IN_A_ROW = 8  # calls between two waits for the GPU while the host's time is taken
_FEW_LAUNCHES = 16  # of a call: so many times that are far from filling the GPU's queue
_WITH_GRADIENT = ("gradient", "update + gradient")  # jobs
Tell = Callable[[str, float], None]  # what is going on, share done


def measure(
    parameters: Parameters,
    penalty: Penalty,
    ways: Sequence[str] = tuple(WAYS),
    *,
    rounds: int = 15,
    seconds: float = 10.0,
    fewest: int = 5,
    tell: Tell = lambda what, share: None,
    backends: Sequence[str] = (),
    step: Callable[[], object] | None = None,
    trace: Path | None = None,
    counters: bool = False,
) -> list[Row]:
    """A row per way, and one per limit of the machine on the same memory.

    Args:
        parameters: with gradients that exist; both are changed.
        penalty: what every way computes.
        ways: names in WAYS; the limits are always measured.
        rounds, seconds, fewest: see `by_turns`.
        tell: is told what is going on and the share done.
        backends: measure pyreg's ways on each of these; by default on the one that serves.
        step: a training step without a penalty, to be measured beside them.
        trace: where to write a Chrome trace of one run of each.
        counters: count the bytes that a GPU's memory moves, in one more run of each, the last.

    Raises:
        Interrupted: Ctrl-C; with the rows as far as they were measured.
    """
    chosen = _chosen(parameters, ways, backends)
    if step is not None:
        chosen.insert(0, Way(STEP, "step", lambda *_: lambda: discard(step()), None))
    rows = {way.name: _row(way, parameters, penalty) for way in chosen}
    try:
        runs = _prepare_all(chosen, parameters, penalty, rows, tell)
        budget = rounds, seconds, fewest
        _time_all(runs, chosen, parameters, rows, budget, tell)
        _look_at_all(runs, parameters, rows, tell)
        if trace is not None:
            tell("trace", 1.0)
            trace_of(runs, trace, parameters.device)
        if counters:
            _count_all(runs, parameters, rows, tell)
    except KeyboardInterrupt:
        raise Interrupted(list(rows.values())) from None
    tell("done", 1.0)
    return list(rows.values())


def discard(result: object) -> None:
    """So that a step returns no value to be checked."""


def _chosen(parameters: Parameters, ways: Sequence[str], backends: Sequence[str]) -> list[Way]:
    chosen = [WAYS[name] for name in WAYS if name in ways and name not in LIMITS]
    if backends:
        chosen = [
            each
            for way in chosen
            for each in (
                [on_backend(way, b) for b in backends] if way.name.startswith("pyreg") else [way]
            )
        ]
    return chosen + [WAYS[name] for name in LIMITS if WAYS[name].refuses(parameters) is None]


def _row(way: Way, parameters: Parameters, penalty: Penalty) -> Row:
    workload = parameters.workload
    return Row(
        workload=workload.name,
        dtype=" + ".join(str(dtype).removeprefix("torch.") for dtype in workload.dtypes),
        tensors=len(workload.shapes),
        elements=workload.elements,
        penalty=penalty.name,
        way=way.name,
        job=way.job,
        traffic=way.traffic_of(penalty),
    )


class _Refused(Exception):
    pass


def _prepare_all(
    chosen: list[Way], parameters: Parameters, penalty: Penalty, rows: dict[str, Row], tell: Tell
) -> dict[str, Run]:
    """Each way's run, after its result was checked; what it says of itself goes into its row."""
    runs: dict[str, Run] = {}
    expected = Expected(parameters, penalty)
    for i, way in enumerate(chosen):
        tell(f"checking {way.name}", 0.5 * i / len(chosen))
        try:
            runs[way.name], found = _prepare(way, parameters, penalty, expected)
        except (_Refused, NotWritten, Disagreement) as error:
            wrong = isinstance(error, Disagreement)
            rows[way.name] = replace(rows[way.name], wrong=wrong, note=f"not timed: {error}")
        except Exception as error:  # a peer that cannot run here is a row, not the end
            if way.name.startswith("pyreg") or way.job in ("step", "limit"):
                raise
            rows[way.name] = replace(rows[way.name], note=_reason(error))
        else:
            rows[way.name] = replace(rows[way.name], **found)
    expected.restore(parameters)
    return runs


def _prepare(
    way: Way, parameters: Parameters, penalty: Penalty, expected: Expected
) -> tuple[Run, dict[str, object]]:
    if (why := way.refuses(parameters)) is not None:
        raise _Refused(why)
    if way.job in _WITH_GRADIENT and FORMULAS[penalty.name].grad is None:
        raise _Refused(f"{type(penalty).__name__} has no gradient")
    run = way.prepare(parameters, penalty)
    errors = check(way, run, parameters, expected)
    return run, {
        "first_seconds": errors.seconds,
        "value_error": errors.value,
        "element_error": errors.elements,
        "note": errors.remark,
    }


def _reason(error: Exception) -> str:
    first, *_ = [*str(error).strip().splitlines(), ""]
    return f"failed: {type(error).__name__}: {first[:200]}"


def _time_all(
    runs: dict[str, Run],
    chosen: list[Way],
    parameters: Parameters,
    rows: dict[str, Row],
    budget: tuple[int, float, int],
    tell: Tell,
) -> None:
    """All runs by turns; on Ctrl-C what has samples is kept."""
    timings: dict[str, Timing] = {}
    try:
        timings = by_turns(
            runs,
            *budget,
            lambda name, share: tell(f"timing {name}", 0.5 + 0.4 * share),
            parameters.device,
        )
    except Interrupted as stopped:
        timings = stopped.measured
        raise
    finally:
        fastest = _fastest_limits(timings)
        for way in chosen:
            if way.name in timings:
                row = rows[way.name]
                rows[way.name] = _timed(row, way, timings[way.name], parameters, fastest)


def _fastest_limits(timings: dict[str, Timing]) -> dict[str, float]:
    """Seconds that the machine needs at least for a job, per N of its traffic."""
    fastest: dict[str, float] = {}
    for name in LIMITS:
        if name in timings:
            limit = WAYS[name]
            seconds = timings[name].median / limit.traffic
            fastest[limit.limit_of] = min(seconds, fastest.get(limit.limit_of, float("inf")))
    return fastest


# The least traffic of a job, in N, and the job whose limit moves bytes as it does.
_LEAST = {
    "value": (1, "value"),
    "gradient": (3, "gradient"),
    "prox": (2, "prox"),
    "update": (7, "gradient"),
    "update + gradient": (7, "gradient"),
    "update + prox": (7, "gradient"),
}


def _timed(
    row: Row, way: Way, timing: Timing, parameters: Parameters, fastest: dict[str, float]
) -> Row:
    row = replace(
        row, seconds=timing.median, p10=timing.p10, p90=timing.p90, samples=timing.samples
    )
    if row.traffic is not None:
        moved = row.traffic * _bytes(row, parameters)
        row = replace(row, gb_per_s=moved / timing.median / 1e9)
    least, limit = _LEAST.get(way.limit_of or row.job, (0, ""))
    if way.limit_of:
        least = way.traffic
    if limit in fastest:
        row = replace(row, of_limit=least * fastest[limit] / timing.median)
    return row


def _bytes(row: Row, parameters: Parameters) -> int:
    """N; a limit moves the padding between tensors too, if there is any."""
    if row.job == "limit":
        return sum(flat.weights.nbytes for flat in parameters.flats)
    return parameters.workload.bytes


def _look_at_all(
    runs: dict[str, Run], parameters: Parameters, rows: dict[str, Row], tell: Tell
) -> None:
    """Memory; on a GPU host time and kernels."""
    device = parameters.device
    for i, (name, run) in enumerate(runs.items()):
        row = rows[name]
        tell(f"memory of {name}", 0.9 + 0.1 * i / len(runs))
        tries = 1 if row.seconds > _LONG else 3
        row = replace(row, extra_bytes=peak_extra_bytes(run, tries=tries, device=device))
        if device.type == "cuda":
            if name.startswith("pyreg") or len(parameters.tensors) <= MOST_PROFILED:
                row = replace(row, kernels=len(kernels(run)))
            in_a_row = _IN_A_ROW if 0 < (row.kernels or 0) <= _FEW_LAUNCHES else 1
            samples = 3 if row.seconds > _LONG else 31 if in_a_row == 1 else 8 * in_a_row
            row = replace(row, host_seconds=host_seconds(run, samples, in_a_row))
        rows[name] = row


def _count_all(
    runs: dict[str, Run], parameters: Parameters, rows: dict[str, Row], tell: Tell
) -> None:
    """Bytes by the counters, until they refuse: that row says why."""
    for name, run in runs.items():
        row = rows[name]
        tell(f"counting bytes of {name}", 1.0)
        try:
            moved = bytes_moved(run, parameters.device)
        except RuntimeError as error:  # refused; or the run fails under the counters
            why = f"from here on no bytes were counted: {error}"
            rows[name] = replace(row, note="; ".join(filter(None, (row.note, why))))
            return
        counted, must = moved / _bytes(row, parameters), _must_move(row)
        if counted < 0.9 * must and _beyond_caches(parameters):
            why = f"bytes: the counters read {counted:.2f} N, and it moves {must} N at least"
            rows[name] = replace(row, note="; ".join(filter(None, (row.note, why))))
        else:
            rows[name] = replace(row, counted=counted)


def _must_move(row: Row) -> float:
    """N, where caches hold little of it."""
    if row.job == "limit":
        return row.traffic
    return {"value": 1, "gradient": 2, "prox": 2}.get(row.job, 0)


def _beyond_caches(parameters: Parameters) -> bool:
    cache = torch.cuda.get_device_properties(parameters.device).L2_cache_size
    return parameters.workload.bytes > 4 * cache
