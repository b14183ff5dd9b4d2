"""A regularizer's sweeps in place, its statistics, and the memory that they take."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import CASES, DTYPES, differentiable
from penalised import NET, model, with_gradients
from torch import nn

import pyreg


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("penalty", differentiable(), ids=repr)
def test_accumulate_is_the_autograd_path(backend, penalty, dtype):
    """The same value and, into zeroed gradients, the same bits."""
    ours, theirs = model(dtype), model(dtype)
    for net in (ours, theirs):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
    expected = pyreg.Regularizer(theirs, penalty)()
    expected.backward()
    value = pyreg.Regularizer(ours, penalty).accumulate_()
    assert not value.requires_grad
    assert value.dtype == expected.dtype
    if backend == "native":
        assert torch.equal(value, expected)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert oracle.same(p.grad, q.grad)
    else:  # autograd of the formulas adds l1 and l2's parts one after the other: 4 roundings
        u = (4 if penalty.name in ("l1", "l2", "elastic_net") else 8) * oracle.unit_roundoff(dtype)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-7, atol=0)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            bound = u * (max(penalty.strengths) * (1 + 2 * p.abs().max()) + p.grad.abs().max())
            assert (p.grad - q.grad).abs().max().item() <= bound + oracle.smallest(dtype)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_case_in_place(case):
    """accumulate_, prox_ and stats, over irregular layouts too (prox_ not over an expanded one)."""
    tensors = [t.detach() for t in case.build(torch.float64)]
    named = [(f"t{i}", t.requires_grad_()) for i, t in enumerate(tensors)]
    reg = pyreg.Regularizer(named, NET)
    before = [t.detach().clone() for t in tensors]
    for t in tensors:
        t.grad = torch.ones_like(t, memory_format=torch.contiguous_format)
    value = reg.accumulate_(2.0)
    assert oracle.close(value.item(), oracle.value(NET, before), 1e-14 * (1 + len(tensors)))
    for t, w in zip(tensors, before, strict=True):
        torch.testing.assert_close(t.grad, 1 + 2 * NET.grad(w), rtol=1e-15, atol=1e-15)
    table = torch.stack([pyreg.reference.stats(w) for w in before])
    torch.testing.assert_close(reg.stats().table, table, rtol=1e-13, atol=0)
    if case.name == "expanded":
        return
    reg.prox_(0.5)
    for t, w in zip(tensors, before, strict=True):
        torch.testing.assert_close(t.detach(), NET.prox(w, 0.5), rtol=1e-15, atol=1e-16)


def test_frozen_parameters(backend):
    """Left out by value, accumulate_ and prox_; counted by stats; include_frozen takes them in."""
    net = with_gradients(model())
    net[3].weight.requires_grad_(False)
    reg = pyreg.Regularizer(net, NET)
    active = [p for p in net.parameters() if p.requires_grad]
    assert reg().item() == pytest.approx(sum(NET.value(p).item() for p in active), rel=1e-6)
    frozen, grad = net[3].weight.clone(), net[3].weight.grad.clone()
    assert reg.accumulate_().item() == pytest.approx(reg().item())
    reg.prox_(0.1)
    assert torch.equal(net[3].weight, frozen)
    assert torch.equal(net[3].weight.grad, grad)
    assert len(reg.stats().names) == 6
    everything = pyreg.Regularizer(net, NET, include_frozen=True)
    whole = sum(NET.value(p).item() for p in net.parameters())
    assert everything().item() == pytest.approx(whole, rel=1e-6)
    everything.prox_(0.1)
    assert not torch.equal(net[3].weight, frozen)
    net[3].weight.requires_grad_(True)  # thawed: seen by the next call
    assert reg().item() == pytest.approx(everything().item())
    net.requires_grad_(False)
    before = [p.clone() for p in net.parameters()]
    assert (reg().item(), reg.accumulate_().item()) == (0, 0)
    reg.prox_(0.1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_parameters_without_a_gradient(backend):
    """They keep none, and count in the value; create_grads gives them one; none at all raises."""
    net = model()
    reg = pyreg.Regularizer(net, NET)
    with pytest.raises(RuntimeError, match="no penalised parameter has a gradient"):
        reg.accumulate_()
    net[0].weight.grad = torch.zeros_like(net[0].weight)
    assert reg.accumulate_().item() == pytest.approx(reg().item())
    assert [p.grad is None for p in net.parameters()] == [False] + [True] * 5
    reg.accumulate_(create_grads=True)
    gradient = NET.grad(net[3].weight.detach())
    torch.testing.assert_close(net[3].weight.grad, gradient)
    torch.testing.assert_close(net[0].weight.grad, 2 * NET.grad(net[0].weight.detach()))


def test_scale(backend):
    """A factor on the gradient, not on the value; a number or a 0-dim tensor."""
    for scale in (8.0, torch.tensor(8.0), 0, -1.0):
        net = model()
        value = pyreg.Regularizer(net, pyreg.L1(0.25)).accumulate_(scale, create_grads=True)
        assert value.item() == pytest.approx(pyreg.l1(net, 0.25).item())
        for p in net.parameters():
            assert torch.equal(p.grad, float(scale) * 0.25 * p.detach().sign())


@pytest.mark.filterwarnings("error")
def test_numbers_that_require_gradients_warn_of_nothing(backend):
    """Strength, scale, step and learning rate: a sweep takes their numbers."""

    def learnable(x: float) -> torch.Tensor:
        return torch.tensor(x, requires_grad=True)

    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(learnable(0.25)))
    torch.set_warn_always(True)
    try:
        reg().backward()
        reg.accumulate_(learnable(2.0))
        reg.prox_(learnable(1.0))
        optimizer = torch.optim.SGD([w], lr=learnable(1.0))
        pyreg.Regularizer({"w": w}, pyreg.L1(0.25)).attach(optimizer, "prox", "identity")
        w.grad.zero_()
        optimizer.step()
    finally:
        torch.set_warn_always(False)
    assert w.tolist() == [0.5] * 3


def test_accumulate_once_per_step_equals_a_penalty_in_the_loss(backend):
    """loss.backward(); accumulate_() gives the gradients of (loss + penalty).backward()."""
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    ours, theirs = model(torch.float64), model(torch.float64)
    (theirs(x).square().mean() + pyreg.penalty(theirs, NET)).backward()
    ours(x).square().mean().backward()
    pyreg.Regularizer(ours, NET).accumulate_()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-15)


def test_prox_makes_exact_zeros(backend):
    """Everything within step * lam becomes 0, the rest moves by it; a step may be a tensor."""
    for step in (0.5, torch.tensor(0.5)):
        w = torch.tensor([-0.125, 0.125, 0.0, -0.25, 0.5, -1.0], requires_grad=True)
        assert pyreg.Regularizer([("w", w)], pyreg.L1(0.5)).prox_(step) is None
        assert w.tolist() == [0, 0, 0, 0, 0.25, -0.75]


def test_prox_bumps_the_version(backend):
    """A graph that saved the parameter before prox_ raises, as after any in-place change."""
    w = torch.ones(3, requires_grad=True)
    reg = pyreg.Regularizer([("w", w)], pyreg.L1(0.5))
    version, loss, penalty = w._version, w.square().sum(), reg()
    reg.prox_(0.1)
    assert w._version > version
    for stale in (loss, penalty):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()


def test_proximal_gradient_descent_finds_the_closed_form(backend):
    """SGD on a diagonal quadratic, prox_ with its learning rate: sign(w*) max(|w*| - a / H, 0)."""
    h = torch.tensor([4.0, 1.0, 0.25, 10.0], dtype=torch.float64)
    target = torch.tensor([1.0, -0.5, 0.3, -0.05], dtype=torch.float64)
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1)
    reg = pyreg.Regularizer([("w", w)], pyreg.L1(0.2))
    for _ in range(700):  # contracts by at least 1 - 0.1 * 0.25 a step: 0.975^700 = 2e-8
        optimizer.zero_grad()
        (0.5 * (h * (w - target).square()).sum()).backward()
        optimizer.step()
        reg.prox_(0.1)
    expected = torch.tensor([0.95, -0.3, 0.0, -0.03], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-7)
    assert w[2] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats(backend, dtype):
    """Each column against torch in float64; totals; NaN and infinity are counted, not lost."""
    net = model(dtype)
    with torch.no_grad():
        net[0].weight[:2] = 0
        net[3].bias[0], net[3].bias[1] = math.nan, -math.inf
    stats = pyreg.Regularizer(net, NET).stats()
    params = list(net.named_parameters())
    assert stats.names == [name for name, _ in params]
    assert stats.elements == [p.numel() for _, p in params]
    for i, (_, p) in enumerate(params[:-1]):
        w = p.detach().double()
        assert stats.l1[i].item() == pytest.approx(w.abs().sum().item(), rel=1e-6)
        assert stats.l2_squared[i].item() == pytest.approx(w.square().sum().item(), rel=1e-6)
        assert stats.max_abs[i].item() == w.abs().max().item()
        assert stats.zeros[i].item() == (w == 0).sum().item()
        assert stats.non_finite[i].item() == 0
    assert stats.non_finite[-1].item() == 2
    assert stats.max_abs[-1].isnan()
    assert stats.l1[-1].isnan()
    total = stats.total()
    assert total["elements"] == 239
    assert total["zeros"] == stats.zeros.sum().item() >= 54
    assert total["non_finite"] == 2
    assert total["sparsity"] == total["zeros"] / 239


def test_printed_stats():
    net = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0, -4.0]]))
        net[0].bias.zero_()
    head, _, *rows = str(pyreg.Regularizer(net, NET).stats()).splitlines()
    assert head.split("  ")[0] == "parameter"
    assert [row.split() for row in rows] == [
        ["0.weight", "2", "7", "5", "4", "0.0", "%", "0"],
        ["0.bias", "1", "0", "0", "0", "100.0", "%", "0"],
        ["total", "3", "7", "5", "4", "33.3", "%", "0"],
    ]


def test_sweeps_do_not_change_what_they_read(backend):
    """Values, stats and gradients leave the parameters (and versions) as they were."""
    net = with_gradients(model())
    before = [(p.detach().clone(), p._version) for p in net.parameters()]
    reg = pyreg.Regularizer(net, NET)
    reg(), reg.stats(), reg.accumulate_(), str(reg)
    for p, (data, version) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, data)
        assert p._version == version


def test_several_penalties_and_dtypes():
    """One pack, per-parameter strengths, mixed dtypes: the sum of what each gives alone."""
    net = model()
    net[0].to(torch.bfloat16)
    net[3].to(torch.float64)
    rules = {"0.*": pyreg.L1(0.25), "1.*": pyreg.L2(0.5), "*": NET}
    reg = pyreg.Regularizer(net, rules)
    value = reg.accumulate_(create_grads=True)
    assert value.dtype == torch.float64
    of = {"0": rules["0.*"], "1": rules["1.*"], "3": NET}
    named = list(net.named_parameters())
    expected = sum(of[name[0]].value(p.detach()).double() for name, p in named)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    for name, p in named:
        torch.testing.assert_close(p.grad, of[name[0]].grad(p.detach()))


# Memory.

SIZES = [(1024, 1024), (1000,), (512, 999), (0,), (300, 1000)]  # 7.5 MB of float32


def allocated(call) -> int:
    """Bytes that torch allocates during a call on the CPU, in all."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_allocations(dtype):
    """accumulate_, prox_, stats and a value without a graph: at most 1 MiB (the contract's number;
    a copy of the largest parameter alone would be twice that). With a graph: one flat buffer."""
    pytest.importorskip("pyreg._native")
    tensors = [torch.randn(*size).to(dtype).requires_grad_() for size in SIZES]
    reg = pyreg.Regularizer([(f"t{i}", t) for i, t in enumerate(tensors)], NET)
    for t in tensors:
        t.grad = torch.zeros_like(t)
    assert allocated(lambda: torch.ones(2**20)) >= 2**22  # the measure itself
    for call in (reg.accumulate_, lambda: reg.prox_(0.1), reg.stats, lambda: reg().detach()):
        assert allocated(call) <= 2**20
    buffer = sum(-(-t.numel() * t.element_size() // 64) * 64 for t in tensors)
    value = reg()
    assert buffer <= allocated(lambda: torch.autograd.grad(value, tensors)) <= buffer + 2**20


def test_resident_memory(run_python):
    """What the native code allocates itself counts too: the peak of a process whose parameters are
    64 MB rises by at most 1 MiB over all in-place sweeps, after a warm-up on a small model (which
    loads code and starts threads)."""
    pytest.importorskip("pyreg._native")
    rise = run_python(
        "import resource, torch, pyreg\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "def sweeps(tensors):\n"
        "    reg = pyreg.Regularizer([(f't{i}', t) for i, t in enumerate(tensors)],"
        " pyreg.ElasticNet(0.1, 0.1))\n"
        "    for _ in range(3):\n"
        "        reg.accumulate_(), reg.prox_(0.1), reg.stats()\n"
        "def tensors(n, m):\n"
        "    made = [torch.ones(m, requires_grad=True) for _ in range(n)]\n"
        "    for t in made: t.grad = torch.zeros(m)\n"
        "    return made\n"
        "sweeps(tensors(16, 10_000))\n"
        "large = tensors(16, 2**20)\n"
        "before = peak()\n"
        "sweeps(large)\n"
        "print(peak() - before)"
    )
    assert int(rise) <= 1024  # KiB


def test_the_default_device_is_not_the_parameters():
    """Values and stats lie where the parameters do."""
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.zeros(3)
    reg = pyreg.Regularizer({"w": w}, pyreg.L1(1.0))
    with torch.device("meta"):
        results = [pyreg.l1([w], 1.0), reg(), reg.accumulate_()]
        assert reg.stats().total()["l1"] == 3.0
    assert [r.item() for r in results] == [3.0] * 3


def test_inside_functional_call():
    """The module holds other tensors there, wrapped ones under torch.func.grad."""
    net = nn.Linear(2, 2)
    reg = pyreg.Regularizer(net, pyreg.L2(0.5))
    net.forward = lambda: reg()
    params = {name: p.detach() for name, p in net.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(net, p, ()))(params)
    for name, p in params.items():
        torch.testing.assert_close(grads[name], p)
