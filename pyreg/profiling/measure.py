"""All ways on one workload: checked, timed by turns, set against the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..penalties import Penalty
from .check import Disagreement, Errors, Expected, check
from .kernels import kernels
from .memory import peak_extra_bytes
from .record import Row
from .timing import Timing, by_turns, host_seconds
from .ways import LIMITS, WAYS, Run, Way, on_backend
from .workloads import Parameters

MOST_PROFILED = 1000  # tensors: the loop's launches are many times as many, and slow to read out
_LONG = 0.2  # seconds: a run that takes longer is repeated less often
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
) -> list[Row]:
    """A row per way, and one per limit of the machine on the same memory.

    Args:
        parameters: with gradients that exist; both come back as they were, apart from gradients,
            which end as sums of penalties.
        penalty: what every way computes.
        ways: names in WAYS; the limits are always measured.
        rounds, seconds, fewest: see `by_turns`.
        tell: is told what is going on and the share done.
        backends: measure pyreg's ways on each of these; by default on the one that serves.
    """
    device = parameters.device
    chosen = [WAYS[name] for name in WAYS if name in ways and name not in LIMITS]
    if backends:
        chosen = [
            each
            for way in chosen
            for each in (
                [on_backend(way, b) for b in backends] if way.name.startswith("pyreg") else [way]
            )
        ]
    chosen += [WAYS[name] for name in LIMITS if WAYS[name].refuses(parameters) is None]
    rows = {way.name: _row(way, parameters, penalty) for way in chosen}
    of_name = {way.name: way for way in chosen}
    runs: dict[str, Run] = {}
    expected = Expected(parameters, penalty)
    for i, way in enumerate(chosen):
        tell(f"checking {way.name}", 0.5 * i / len(chosen))
        try:
            runs[way.name], found = _prepare(way, parameters, penalty, expected)
        except Exception as error:  # a peer that cannot run here is a row, not the end
            if way.name.startswith("pyreg"):
                raise
            rows[way.name] = replace(rows[way.name], note=_reason(error))
        else:
            rows[way.name] = replace(rows[way.name], **found)
    timings = by_turns(
        runs,
        rounds,
        seconds,
        fewest,
        lambda name, share: tell(f"timing {name}", 0.5 + 0.4 * share),
        device,
    )
    fastest = _fastest_limits(timings)
    for i, (name, run) in enumerate(runs.items()):
        tell(f"memory of {name}", 0.9 + 0.1 * i / len(runs))
        rows[name] = replace(
            _timed(rows[name], of_name[name], timings[name], parameters, fastest),
            extra_bytes=peak_extra_bytes(
                run, tries=1 if timings[name].median > _LONG else 3, device=device
            ),
        )
        if device.type == "cuda":
            samples = 3 if timings[name].median > _LONG else 31
            rows[name] = replace(rows[name], host_seconds=host_seconds(run, samples))
            if of_name[name].name.startswith("pyreg") or len(parameters.tensors) <= MOST_PROFILED:
                rows[name] = replace(rows[name], kernels=len(kernels(run)))
    expected.restore(parameters)
    tell("done", 1.0)
    return list(rows.values())


def _row(way: Way, parameters: Parameters, penalty: Penalty) -> Row:
    workload = parameters.workload
    return Row(
        workload=workload.name,
        dtype=str(workload.dtype).removeprefix("torch."),
        tensors=len(workload.shapes),
        elements=workload.elements,
        penalty=penalty.name,
        way=way.name,
        job=way.job,
        traffic=way.traffic_of(penalty),
    )


class _Refused(Exception):
    pass


def _prepare(
    way: Way, parameters: Parameters, penalty: Penalty, expected: Expected
) -> tuple[Run, dict[str, object]]:
    if (why := way.refuses(parameters)) is not None:
        raise _Refused(why)
    run = way.prepare(parameters, penalty)
    errors: Errors = check(way, run, parameters, expected)
    return run, {
        "first_seconds": errors.seconds,
        "value_error": errors.value,
        "element_error": errors.elements,
        "note": errors.remark,
    }


def _reason(error: Exception) -> str:
    if isinstance(error, _Refused | Disagreement):
        return f"not timed: {error}"
    return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def _fastest_limits(timings: dict[str, Timing]) -> dict[str, float]:
    """Seconds that the machine needs at least for a job's traffic, by job."""
    fastest: dict[str, float] = {}
    for name in LIMITS:
        if name in timings:
            job = WAYS[name].limit_of
            fastest[job] = min(timings[name].median, fastest.get(job, float("inf")))
    return fastest


def _timed(
    row: Row, way: Way, timing: Timing, parameters: Parameters, fastest: dict[str, float]
) -> Row:
    job = way.limit_of or row.job
    # A limit moves the padding between tensors too, if there is any.
    size = parameters.weights if row.job == "limit" else None
    moved = parameters.workload.bytes if size is None else size.nbytes
    return replace(
        row,
        seconds=timing.median,
        p10=timing.p10,
        p90=timing.p90,
        samples=timing.samples,
        gb_per_s=row.traffic and row.traffic * moved / timing.median / 1e9,
        of_limit=fastest[job] / timing.median,
    )
