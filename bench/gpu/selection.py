"""Every sweep over a few odd tensors, on each backend of the device: for a memory checker.

    python -m bench.gpu.selection               # all dtypes in one pack, under L1, L2, elastic net;
                                                # natively also under every penalty, and stepped
    python -m bench.gpu.selection --share 2 16  # part 2 of 16 of all kinds: compiles their kernels

The results are looked at only for being finite: whether they are right, the tests say.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor, nn

import pyreg
from bench.penalties import EXAMPLES
from pyreg.penalties import Penalty
from pyreg.profiling.ways import serving
from pyreg.reference import FORMULAS

# (In the order of tests/cases.py: a kernel of several is one of that order.)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PENALTIES = (pyreg.L1(0.3), pyreg.L2(0.07), pyreg.ElasticNet(0.3, 0.07))
DIFFERENTIABLE = tuple(p for p in EXAMPLES if FORMULAS[p.name].grad is not None)
SIZES = (0, 1, 1025, 5000)


def odd(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Aligned and unaligned tensors, each in memory of its own or right behind an element."""
    aligned = [torch.randn(n, device=device).to(dtype) for n in SIZES]
    return [*aligned, *(torch.randn(n + 1, device=device).to(dtype)[1:] for n in SIZES[1::2])]


def sweep(named: list[tuple[str, nn.Parameter]], rules: dict[str, Penalty]) -> None:
    """All sweeps but the prox in a metric."""
    reg = pyreg.Regularizer(named, rules)
    differentiable = all(FORMULAS[rule.name].grad is not None for rule in rules.values())
    with torch.set_grad_enabled(differentiable):
        values = [reg(), reg.stats().l1.sum()]
    if differentiable:
        values[0].backward()
        values.append(reg.accumulate_(0.5))
    reg.prox_(0.1)
    assert all(value.isfinite() for value in values)
    assert all(p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()) for _, p in named)


def sweep_in_metric(named: list[tuple[str, nn.Parameter]], rules: dict[str, Penalty]) -> None:
    """The prox in Adam's metric, after a step of it."""
    optimizer = torch.optim.Adam([p for _, p in named], lr=1e-3)
    pyreg.Regularizer(named, rules).attach(optimizer, mode="prox")
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for _, p in named)


def step(named: list[tuple[str, nn.Parameter]], rules: dict[str, Penalty], mode: str) -> None:
    """An optimizer's, with the penalty's gradient or prox in it, or without any."""
    of = {} if mode == "none" else {"regularizer": pyreg.Regularizer(named, rules), "mode": mode}
    for _, p in named:
        p.grad = torch.ones_like(p)
    pyreg.optim.AdamW(named, lr=1e-3, **of).step()
    assert all(p.isfinite().all() for _, p in named)


def kinds(
    device: torch.device, penalties: tuple[Penalty, ...] = PENALTIES
) -> list[tuple[list, dict]]:
    """(parameters, rules): every dtype with every penalty, alone; then all of them together."""
    pairs = list(itertools.product(enumerate(penalties), DTYPES))
    single = [
        ([(f"{r}.{i}", nn.Parameter(t)) for i, t in enumerate(odd(dtype, device))], {"*": penalty})
        for (r, penalty), dtype in pairs
    ]
    rules = {f"{r}.*": penalty for r, penalty in enumerate(penalties)}
    together = [
        (f"{r}.{k}.{i}", nn.Parameter(t))
        for k, ((r, _), dtype) in enumerate(pairs)
        for i, t in enumerate(odd(dtype, device))
    ]
    return [*single, (together, rules)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=int, nargs=2, metavar=("PART", "OF"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend in serving(device):
        with pyreg.use_backend(backend):
            done = share(device, *options.share) if options.share else all_together(device, backend)
        print(f"{backend} on {device}: {done} packs swept")


def share(device: torch.device, part: int, parts: int) -> int:
    """Part of all kinds; of steps, those that `bench.optim` takes."""
    adamw = [
        (named, rules, mode)
        for (named, rules), mode in itertools.product(kinds(device)[:-1], ("none", "grad", "prox"))
        if rules == {"*": PENALTIES[-1]} and named[0][1].dtype in (torch.float32, torch.bfloat16)
    ]
    chosen = [*kinds(device, EXAMPLES)[:-1], *kinds(device)[-1:], *adamw][part::parts]
    for named, rules, *mode in chosen:
        if mode:
            step(named, rules, *mode)
        else:
            sweep(named, rules)
            sweep_in_metric(named, rules)
    return len(chosen)


def all_together(device: torch.device, backend: str) -> int:
    """Every dtype in one pack; natively in one for each family of kernels, which is stepped too."""
    packs = (PENALTIES, DIFFERENTIABLE) if backend == "native" else (PENALTIES,)
    for penalties in packs:
        named, rules = kinds(device, penalties)[-1]
        sweep(named, rules)
        sweep_in_metric(named, rules)
        for mode in ("grad", "prox") if backend == "native" else ():
            step(named, rules, mode)
    return len(packs)


if __name__ == "__main__":
    main()
