"""pyreg.optim against torch's optimizers, without a penalty and with one attached to them.

BITS: a step's arithmetic is torch's, but for roundings: of scalars to the compute type, of a - b
against a + (-b), of quotients. Some 16 of them lie between a state and the new weight.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import STRENGTHS
from torch import nn
from trained import (
    EVERY,
    MINIMIZE,
    NET,
    ONE_EACH,
    backward,
    make,
    minimizing,
    net,
    same,
    tensors_of,
)

import pyreg
from pyreg import optim
from pyreg.penalties import PENALTIES


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_without_a_penalty(swept, name, options):
    """1e-11: 100 steps of 16 roundings of 1.1e-16, in weights near 1, which training may amplify
    some fifty times, as it does differences of any origin."""
    ours, theirs = net(), net()
    a, b = make(optim, name, ours, options), make(torch.optim, name, theirs, options)
    scheduler = [torch.optim.lr_scheduler.StepLR(o, 30, 0.5) for o in (a, b)]
    sign = -1.0 if options.get("maximize") else 1.0
    for k in range(100):
        for model, o, s in ((ours, a, scheduler[0]), (theirs, b, scheduler[1])):
            backward(model, k, sign)
            o.step()
            s.step()
    same(a, b, 1e-11, 1e-11)
    assert not torch.allclose(ours[0].weight, net()[0].weight, rtol=1e-2)
    assert a.last_zeros is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("float32_states", [False, True])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_one_step_in_each_dtype(swept, name, options, dtype, float32_states):
    """One step from the same state, against torch's in float64.

    Each new number is rounded to its dtype once, by u relative, and before that in float32: 16
    roundings of 2^-24 of terms that are at most 4, the largest weights, states and moves here.
    """
    model, exact = net(dtype), net(dtype).double()
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        q.data = p.detach().double()
    a, b = make(optim, name, model, options), make(torch.optim, name, exact, options)
    for k in range(3):
        # Small numbers that any dtype holds, none of whose squares vanishes in float16.
        for i, (p, q) in enumerate(zip(model.parameters(), exact.parameters(), strict=True)):
            generator = torch.Generator().manual_seed(10 * k + i)
            p.grad = (torch.rand(p.shape, generator=generator) + 0.1).to(dtype)
            q.grad = p.grad.double()
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.data = p.detach().double()
            for kind, state in a.state[p].items():
                if kind != "step" and float32_states:
                    a.state[p][kind] = state = state.float()
                b.state[q][kind] = state.clone() if kind == "step" else state.double()
        a.step()
        b.step()
        for p, q in zip(tensors_of(a), tensors_of(b), strict=True):
            u = torch.finfo(p.dtype).eps / 2
            torch.testing.assert_close(p.double(), q.double(), rtol=u, atol=64 * 2**-24)


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(("name", "options"), MINIMIZE)
def test_with_elastic_net(backend, name, options, mode, scheduled):
    """Against torch's optimizer with the same regularizer attached; tolerance as without one."""
    ours, theirs = net(), net()
    reg, attached = (
        pyreg.Regularizer(
            model,
            {
                "0.weight": NET,
                "*": pyreg.L1(pyreg.schedules.Linear(0.0, 0.1, 10) if scheduled else 0.02),
            },
            exclude=["2.bias"],
        )
        for model in (ours, theirs)
    )
    a = make(optim, name, ours, options, regularizer=reg, mode=mode)
    b = make(torch.optim, name, theirs, options)
    attached.attach(b, mode)
    for k in range(15):
        for model in (ours, theirs):
            backward(model, k)
            if k % 4 == 3:
                model[2].weight.grad = None
            if k == 6:
                model[0].bias.requires_grad_(False)
        before = [None if p.grad is None else p.grad.clone() for p in ours.parameters()]
        a.step()
        b.step()
        if backend == "native":
            for p, g in zip(ours.parameters(), before, strict=True):
                assert p.grad is None if g is None else torch.equal(p.grad, g)
        for pattern, value in reg.last_value.items():
            torch.testing.assert_close(value, attached.last_value[pattern], rtol=1e-11, atol=1e-13)
        moved = [p for n, p in theirs.named_parameters() if n != "2.bias" and p.grad is not None]
        moved = [p for p in moved if p.requires_grad]
        assert a.last_zeros == sum((p == 0).sum().item() for p in moved)
        if mode == "prox":
            assert a.last_zeros > 0 or k == 0
    same(a, b, 1e-11, 1e-11)
    assert reg.step == attached.step == 15


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize(
    "penalty", [cls(*STRENGTHS[n][0]) for n, cls in PENALTIES.items()], ids=str
)
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_every_penalty(native, name, options, penalty, mode):
    """As above, for one step: a hard threshold may fall either way of a rounding in later ones."""
    options = minimizing(options)
    ours, theirs = net(), net()
    if mode == "grad" and penalty.name == "l0":
        reg = pyreg.Regularizer(ours, penalty)
        with pytest.raises(RuntimeError, match=r"L0.*has no gradient"):
            make(optim, name, ours, options, regularizer=reg)
        make(optim, name, ours, options, regularizer=reg, mode="prox")  # it is still free
        return
    a = make(optim, name, ours, options, regularizer=penalty, mode=mode)
    b = make(torch.optim, name, theirs, options)
    reg = pyreg.Regularizer(theirs, penalty)
    reg.attach(b, mode)
    for model, o in ((ours, a), (theirs, b)):
        backward(model, 0)
        o.step()
    same(a, b, 1e-12, 1e-13)
    torch.testing.assert_close(
        a.regularizer.last_value["*"], reg.last_value["*"], rtol=1e-12, atol=0
    )
    assert a.last_zeros == sum((p == 0).sum().item() for p in theirs.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", [NET, pyreg.MCP(0.3, 1.5)], ids=str)
def test_threads_and_instruction_sets(swept, native, dtype, penalty):
    """The same bits for any number of threads; another instruction set fuses no other products
    than those of the elastic net's gradient, one rounding of 16: BITS, and the dtype's own."""
    results = {}
    for instruction_set in native.instruction_sets():
        try:
            native.use_instruction_set(instruction_set)
        except ValueError:  # this machine lacks it
            continue
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = []
            for mode in ("grad", "prox"):
                generator = torch.Generator().manual_seed(5)
                p = nn.Parameter(torch.randn(9 * 4096 + 13, generator=generator).to(dtype))
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                opt = optim.AdamW([p], lr=0.02, regularizer=penalty, mode=mode)
                opt.step()
                opt.step()
                # float16 and bfloat16 weights that only become 0 where they are stored count too
                assert opt.last_zeros == (p == 0).sum().item()
                found += [*tensors_of(opt), opt.regularizer.last_value["*"]]
            first = results.setdefault(instruction_set, found)
            assert all(map(torch.equal, found, first))
    u = max(torch.finfo(dtype).eps, 2**-52)
    for other in results.values():
        for a, b in zip(other, found, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * u, atol=16 * u)


@pytest.mark.parametrize("rule", [pyreg.L1(0.5), pyreg.ElasticNet(0.5, 0.0)], ids=repr)
def test_the_gradient_of_l1_at_an_infinite_weight(swept, rule):
    """Is its strength: what elastic net would add has no share in it."""
    p = nn.Parameter(torch.tensor([math.inf, -math.inf, 1.0]))
    p.grad = torch.zeros(3)
    optim.SGD([p], lr=0.1, regularizer=rule).step()
    torch.testing.assert_close(p.detach(), torch.tensor([math.inf, -math.inf, 0.95]))


def test_float16_weights_that_vanish_count_as_zeros(swept):
    """2e-8 is no float16."""
    for mode in ("grad", "prox"):
        p = nn.Parameter(torch.full((5,), 0.5, dtype=torch.float16))
        p.grad = torch.full_like(p, 1.0)
        opt = optim.SGD([p], lr=0.5 - 2e-8, regularizer=pyreg.L1(0.0), mode=mode)
        opt.step()
        assert (p.tolist(), opt.last_zeros) == ([0.0] * 5, 5)


@pytest.mark.parametrize("mode", ["grad", "prox", None])
@pytest.mark.parametrize(("name", "options"), MINIMIZE)
def test_what_is_not_finite_stays_so(swept, name, options, mode):
    """Every pair of these weights and gradients, against torch's: infinite or NaN, and where not,
    the same within a float32's 16 roundings."""
    inf, nan = math.inf, math.nan
    w = torch.tensor([1.0, -2.0, 0.0, -0.0, inf, -inf, nan, 1e-30])
    g = torch.tensor([0.0, 1.0, -1.0, inf, -inf, nan, 1e-30])
    pair = []
    for module in (optim, torch.optim):
        p = nn.Parameter(w.repeat_interleave(len(g)))
        p.grad = g.repeat(len(w))
        if mode is None:
            opt = getattr(module, name)([p], **options)
        elif module is optim:
            opt = getattr(module, name)([p], **options, regularizer=NET, mode=mode)
        else:
            opt = getattr(module, name)([p], **options)
            pyreg.Regularizer({"w": p}, NET).attach(opt, mode)
        opt.step()
        pair.append(opt)
    same(*pair, 64 * 2**-24, 64 * 2**-24)
