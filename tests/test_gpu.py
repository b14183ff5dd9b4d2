"""What only a GPU can show: launches, races, streams, graphs, memory. Marker `gpu`.

With TRITON_INTERPRET=1 the same bodies are rehearsed on CPU tensors, at small sizes, as far as they
can be (device.py says how); that shows that they run, and nothing about a GPU.
"""

from __future__ import annotations

import math

import device
import oracle
import pytest
import torch
from cases import fill
from swept import ON_CPU, ON_GPU, Place, Sweeps, each, flat, mixed, moments
from torch import Tensor, nn

import pyreg
from pyreg import look
from pyreg.backend.torch import taken
from pyreg.backend.triton import interpreted
from pyreg.metric import Metric
from pyreg.penalties import Penalty
from pyreg.profiling import WORKLOADS, allocate

BOTH = pyreg.ElasticNet(0.3, 0.07)


@pytest.fixture(params=each([*([ON_CPU] if interpreted() else []), *ON_GPU]), autouse=True)
def place(request):
    """A GPU and the backend that sweeps it, which is asked for by name."""
    if (why := request.param.missing()) is not None:
        pytest.skip(why)
    with pyreg.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def gpu(place):
    """torch's device; skips the rehearsal."""
    if place.device == "cpu":
        pytest.skip("cannot be rehearsed on the CPU")
    return torch.device(place.device)


def on(place: Place) -> torch.device:
    return torch.device(place.device)


def size(place: Place, real: int, rehearsed: int) -> int:
    return real if place.device == "cuda" else rehearsed


def everything(place: Place) -> tuple[list[Tensor], list[Penalty], list[int]]:
    """Every dtype under every penalty; for Triton, which compiles for minutes then, under three."""
    compiled = place.backend == "triton" and place.device == "cuda"
    few = [pyreg.L1(0.3), pyreg.L2(0.07), BOTH] if compiled else None
    return mixed(place=place, elements=size(place, 12_288, 100), rules=few)


def parameters(place: Place, count: int = 3, dtype: torch.dtype = torch.float32) -> list:
    """Parameters of 1,000 to a few thousand elements with gradients of zeros, named."""
    named = []
    for i in range(count):
        p = nn.Parameter(fill((1000 + 37 * i,), dtype, place.device, f"gpu{i}"))
        p.grad = torch.zeros_like(p)
        named.append((f"p{i}", p))
    return named


def zero(named: list) -> None:
    for _, p in named:
        p.grad.zero_()


def tensors_of(named: list) -> list[Tensor]:
    return [p.detach() for _, p in named]


def same_gradients(named: list, penalty: pyreg.L1 | pyreg.L2, scale: float = 1.0) -> bool:
    """Whether every .grad, from nothing, is the oracle's to the bit, but for the sign of 0."""
    return all(torch.equal(p.grad, oracle.gradient(penalty, p, scale)) for _, p in named)


def close_value(got: Tensor, penalty: Penalty, tensors: list[Tensor]) -> bool:
    tolerance = oracle.value_tolerance(tensors)
    return oracle.close(got.item(), oracle.value(penalty, [flat(tensors)]), tolerance)


@pytest.mark.parametrize(
    "sweep", ["value", "gradient", "accumulate", "prox", "prox_in_metric", "stats"]
)
def test_a_sweep_is_one_launch(place, sweep):
    """For every dtype and penalty at once, with no copy or fill beside it."""
    tensors, rules, rule_of = everything(place)
    sweeps = place.sweeps(tensors, rules, rule_of)
    backend, pack, grads = sweeps.backend, sweeps.pack, [torch.zeros_like(t) for t in tensors]
    for t, g in zip(tensors, grads, strict=True):
        t.grad = g
    metrics = [Metric(m, 0.3, 1.0, 0.1) for m in moments(tensors)]
    run = {
        "value": lambda: backend.value(pack, tensors, rules),
        "gradient": lambda: backend.gradient(pack, tensors, grads, rules, 0.5),
        "accumulate": lambda: backend.accumulate(pack, tensors, rules, 0.5),
        "prox": lambda: backend.prox(pack, tensors, rules, 0.5),
        "prox_in_metric": lambda: backend.prox_in_metric(pack, tensors, metrics, rules),
        "stats": lambda: backend.stats(pack, tensors),
    }[sweep]
    run()
    assert len(device.launches(on(place), run)) == 1


@pytest.mark.parametrize("verb", ["value", "accumulate_", "prox_"])
def test_a_call_of_a_regularizer_is_one_launch(place, verb):
    """The value comes out of the kernel in the dtype that is asked for."""
    reg = pyreg.Regularizer(parameters(place), BOTH)
    run = {
        "value": torch.no_grad()(reg.__call__),
        "accumulate_": reg.accumulate_,
        "prox_": lambda: reg.prox_(0.1),
    }[verb]
    run()
    assert len(device.launches(on(place), run)) == 1


def test_twenty_thousand_tensors(place):
    """One launch, right in each of them, empty ones between."""
    sizes = [(64, 0, 1, 200, 3, 17)[i % 6] for i in range(size(place, 20_000, 60))]
    storage = fill((sum(sizes),), torch.float32, place.device, "many")
    into = torch.zeros_like(storage)
    named = [(f"{i}", nn.Parameter(t)) for i, t in enumerate(storage.split(sizes))]
    for (_, p), g in zip(named, into.split(sizes), strict=True):
        p.grad = g
    reg = pyreg.Regularizer(named, pyreg.L1(0.3))
    assert close_value(reg.accumulate_(), pyreg.L1(0.3), [storage])
    assert oracle.same(into, oracle.gradient(pyreg.L1(0.3), storage))
    assert len(device.launches(on(place), reg.accumulate_)) == 1
    table = reg.stats().table
    assert oracle.close(table[:, 0].sum().item(), storage.double().abs().sum().item(), 1e-6)
    assert table[:, 3].sum().item() == (storage == 0).sum().item()


def test_a_captured_prox_in_a_metric_sees_new_numbers(place):
    """CUDA graph: numbers on the device are read anew by every replay; nothing waits for them."""
    tensors = [fill((300 + i,), torch.float32, place.device, f"metric{i}") for i in range(3)]
    before, beside = [t.clone() for t in tensors], moments(tensors)
    numerator = torch.tensor(0.1, device=on(place))
    sweeps = place.sweeps(tensors, [pyreg.L1(0.5)])

    def step() -> None:
        metrics = [Metric(m, numerator, 1.5, 0.1) for m in beside]
        sweeps.backend.prox_in_metric(sweeps.pack, tensors, metrics, sweeps.rules)

    step()
    with device.no_waiting(on(place)):
        step()
    replay = device.capture(on(place), step)
    for number in (0.2, 0.7):
        numerator.fill_(number)
        torch._foreach_copy_(tensors, before)
        replay()
        steps = torch.cat([numerator / (1.5 * m.sqrt() + 0.1) for m in beside])
        expected = pyreg.L1(0.5).prox(flat(before), steps)
        torch.testing.assert_close(flat(tensors), expected, rtol=2**-20, atol=2**-20)


def adam(sweeps: Sweeps, states: list[list[Tensor]], numbers: object, prox: bool) -> list[Tensor]:
    """A step of Adam with elastic net: the value, each rule's, and the zeros."""
    n, tensors = len(sweeps.tensors), sweeps.tensors
    args = tensors, states, ["adam"] * n, [0] * n, numbers, bytes([1] * n), prox, [BOTH], 1.0
    value, of_rules, zeros = sweeps.backend.step(sweeps.pack, *args)
    return [torch.as_tensor(value), taken(of_rules), torch.as_tensor(zeros)]


ADAM = (1.0, 0.999, 0.01, 0.1, 0.98, 0.02, 0.05, 1.3, 1e-3)


@pytest.mark.parametrize("prox", [False, True])
def test_a_step_is_the_native_one(place, prox):
    """16 roundings on either side, of terms that are at most 4; of 16 bits, one more, either way. A
    weight or two may lie at the threshold. Rows of several chunks, and one that is not aligned."""
    n, native = size(place, 100_003, 2503), Place("native", "cpu")
    dtypes = [
        (torch.float32, torch.float32),
        *[(torch.bfloat16, t) for t in (torch.bfloat16, None)],
    ]
    tensors, states = [], [[], []]
    for i, (dtype, own) in enumerate(dtypes):
        w, g, m, v = (
            fill((n + 1,), torch.float32, "cpu", f"step{i}{k}").clamp(-2, 2) for k in range(4)
        )
        tensors.append(w.to(dtype)[i % 2 :])
        tensors[-1].grad = g.to(dtype)[i % 2 :]
        for kind, s in zip(states, (m, v.square() + 1), strict=True):
            kind.append(s.to(own or torch.float32)[i % 2 :])
    there = [t.to(on(place), copy=True) for t in tensors]
    for t, own in zip(there, tensors, strict=True):
        t.grad = own.grad.to(on(place), copy=True)
    beside = [[s.to(on(place), copy=True) for s in kind] for kind in states]
    numbers = [(ADAM, Metric(None, 0.1, 1.3, 1e-3))]
    value, of_rules, zeros = adam(place.sweeps(there, [BOTH]), beside, numbers, prox)
    expected = adam(native.sweeps(tensors, [BOTH]), states, numbers, prox)
    assert oracle.close(value.item(), expected[0].item(), 2**-18)
    assert of_rules.to(value.dtype).tolist() == [value.item()]  # (the value may be float32)
    assert abs(zeros.item() - expected[2].item()) <= 2
    assert expected[2] > 1000 or not prox
    for a, b in zip(
        [*there, *beside[0], *beside[1]], [*tensors, *states[0], *states[1]], strict=True
    ):
        eps = torch.finfo(a.dtype).eps if a.element_size() == 2 else 0.0
        torch.testing.assert_close(a.cpu(), b, rtol=eps, atol=128 * 2**-24)


def test_a_captured_step_reads_new_numbers(place):
    """Numbers on the device are read anew by every replay; nothing waits for them."""
    tensors = [fill((300 + i,), torch.float32, place.device, f"captured{i}") for i in range(3)]
    states = [[torch.zeros_like(t) for t in tensors] for _ in range(2)]
    for t in tensors:
        t.grad = torch.ones_like(t)
    numbers = torch.tensor([[*ADAM, 0.0, 1.3, 1e-3]], dtype=torch.float64, device=on(place))
    sweeps = place.sweeps(tensors, [BOTH])

    def step() -> None:
        adam(sweeps, states, numbers, False)

    step()
    with device.no_waiting(on(place)):
        step()
    replay = device.capture(on(place), step)
    numbers[0, 0], numbers[0, 1], numbers[0, 6] = 0.0, 0.5, 0.0  # no gradient, no move: w / 2
    before = flat(tensors)
    replay()
    assert torch.equal(flat(tensors), before / 2)


def test_a_division_of_what_is_not_ordinary(place):
    """0 of either sign, which is not divided; and what divides in its own way."""
    w = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 2**-149, -(2**-127), 3.0])
    expected, there = w / 1.5, w.to(on(place), copy=True)
    place.sweeps([there], [pyreg.L2(0.5)]).prox(0.5)
    assert oracle.same(there.cpu(), expected)
    assert torch.equal(there.cpu().signbit()[:4], expected.signbit()[:4])


def test_nothing_over_nothing_in_a_step(place):
    """eps = 0 and a gradient of 0: NaN, as of torch's Adam."""
    p = nn.Parameter(torch.ones(3, device=on(place)))
    p.grad = torch.tensor([0.0, 1.0, -1.0], device=on(place))
    pyreg.optim.Adam([p], lr=0.1, eps=0.0).step()
    assert p.isnan().tolist() == [True, False, False]


def test_counters_on_the_device(place):
    if place.device == "cpu":
        pytest.skip("cannot be rehearsed on the CPU")
    counters = [torch.full((), float(k), device=on(place)) for k in range(3)]
    with device.no_waiting(on(place)):
        found = look.count(counters)
    assert found.tolist() == [1.0, 2.0, 3.0] == [c.item() for c in counters]


def test_more_than_2_to_31_elements(gpu, place):
    """Elements past any 32-bit index are read and written."""
    n = 2**31 + 2_000_000
    if torch.cuda.mem_get_info(gpu)[0] < 5 * 2 * n:
        pytest.skip("needs 22 GB of free device memory")
    w = torch.zeros(n, dtype=torch.bfloat16, device=gpu)
    w[-4000:] = -2.0
    w[2**31 - 1] = 1.0
    w.grad = torch.zeros_like(w)
    sweeps = place.sweeps([w], [pyreg.ElasticNet(1.0, 1.0)])
    value = 4000 * (2 + 4) + 2
    assert sweeps.value() == sweeps.accumulate([w.grad]) == value
    assert sweeps.stats().tolist() == [[8001.0, 16001.0, 2.0, n - 4001, 0.0]]
    assert w.grad[-4000:].eq(-1 - 4).all()
    assert w.grad[2**31 - 1] == 1 + 2
    assert w.grad.count_nonzero() == 4001
    sweeps.prox(0.5)
    assert w[-4000:].eq(-1.5 / 2).all()
    assert w.count_nonzero() == 4001


def test_the_same_bits_on_every_run(place):
    """100 runs of all sweeps over several dtypes, penalties and slots at once."""
    tensors, rules, rule_of = everything(place)
    tensors.append(fill((size(place, 3_000_000, 5000),), torch.float32, place.device, "runs"))
    sweeps, before = place.sweeps(tensors, rules, [*rule_of, 0]), [t.clone() for t in tensors]
    first = [t.clone() for t in sweeps.everything()]
    for _ in range(size(place, 100, 1)):
        torch._foreach_copy_(tensors, before)
        assert all(oracle.same(a, b) for a, b in zip(first, sweeps.everything(), strict=True))


def test_the_same_bits_for_any_grid(place, monkeypatch):
    if place.backend != "triton":
        pytest.skip("only Triton's grid can be set from here")
    from pyreg.triton_kernels import launch

    first = None
    for programs in size(place, (1, 7, 64, 1000), (1, 3)):
        monkeypatch.setattr(launch, "share_of", lambda *of, n=programs: -(-of[-1].slots // n))
        tensors, rules, rule_of = everything(place)
        tensors.append(fill((size(place, 3_000_000, 5000),), torch.float32, place.device, "grid"))
        results = place.sweeps(tensors, rules, [*rule_of, 0]).everything()
        first = first or results
        assert all(oracle.same(a, b) for a, b in zip(first, results, strict=True))


def test_a_captured_accumulate_sees_new_strengths(place):
    """CUDA graph: strength and scale are read anew by every replay."""
    named = parameters(place)
    lam = torch.tensor(0.5, device=on(place))
    scale = torch.tensor(1.0, dtype=torch.float64, device=on(place))
    reg = pyreg.Regularizer(named, pyreg.L1(lam))
    results = {}

    def step() -> None:
        results["value"] = reg.accumulate_(scale)

    step()
    replay = device.capture(on(place), step)
    for strength, factor in ((0.25, 1.0), (2.0, -3.0)):
        lam.fill_(strength)
        scale.fill_(factor)
        zero(named)
        replay()
        assert same_gradients(named, pyreg.L1(strength), factor)
        assert close_value(results["value"], pyreg.L1(strength), tensors_of(named))


def test_a_captured_prox_sees_new_strengths_and_steps(place):
    named = parameters(place)
    lam = torch.tensor(0.5, device=on(place))
    step = torch.tensor(0.1, dtype=torch.float64, device=on(place))
    reg = pyreg.Regularizer(named, pyreg.L1(lam))
    reg.prox_(step)
    replay = device.capture(on(place), lambda: reg.prox_(step))
    for strength, s in ((0.25, 0.5), (1.0, 0.25)):
        lam.fill_(strength)
        step.fill_(s)
        before = flat(tensors_of(named))
        replay()
        exact, tolerance = oracle.prox(pyreg.L1(strength), before, s)
        assert ((flat(tensors_of(named)).double() - exact).abs() <= tolerance).all()


def test_a_graph_captures_several_sweeps_of_a_training_step(place):
    """accumulate_, an SGD step, prox_: as the same steps without a graph."""
    graphed, plain = parameters(place), parameters(place)
    lam = torch.tensor(0.5, device=on(place))
    rate = torch.tensor(0.1, dtype=torch.float64, device=on(place))

    def step_of(named: list):
        reg = pyreg.Regularizer(named, pyreg.L1(lam))

        def step() -> None:
            for _, p in named:
                p.grad.copy_(p.detach())
            reg.accumulate_()
            for _, p in named:
                p.detach().sub_(p.grad, alpha=0.1)
            reg.prox_(rate)

        return step

    first, second = step_of(graphed), step_of(plain)
    first()
    second()
    replay = device.capture(on(place), first)
    for strength in (0.25, 0.75):
        lam.fill_(strength)
        replay()
        second()
    for (_, p), (_, q) in zip(graphed, plain, strict=True):
        assert oracle.same(p, q)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_graph_captures_the_step_of_an_attached_optimizer(place, mode):
    """Adam with capturable=True, whose step count the metric reads on the device."""
    graphed, plain = parameters(place), parameters(place)
    on_gpu = torch.device(on(place)).type == "cuda"  # (elsewhere Adam refuses to be capturable)

    def step_of(named: list):
        optimizer = torch.optim.Adam([p for _, p in named], lr=0.01, capturable=on_gpu)
        pyreg.Regularizer(named, pyreg.ElasticNet(0.3, 0.1)).attach(optimizer, mode)

        def step() -> None:
            for _, p in named:
                p.grad.copy_(p.detach())
            optimizer.step()

        return step

    first, second = step_of(graphed), step_of(plain)
    first()
    second()
    # (The count of a step on the CPU is a number, which a capture refuses.)
    replay = device.capture(on(place), first) if on_gpu or mode == "grad" else first
    for _ in range(3):
        replay()
        second()
    for (_, p), (_, q) in zip(graphed, plain, strict=True):
        assert oracle.same(p, q)


def test_capture_without_warm_up(gpu, place):
    """A clear error, or for a backend that needs no table in device memory the right result."""
    named = parameters(place)
    reg = pyreg.Regularizer(named, pyreg.L1(torch.tensor(0.5, device=gpu)))
    scale = torch.ones((), dtype=torch.float64, device=gpu)
    try:
        replay = device.capture(gpu, lambda: reg.accumulate_(scale))
    except RuntimeError as error:
        replay, message = lambda: reg.accumulate_(scale), str(error)
    else:
        message = ""
    assert "run this sweep once" in message or place.backend == "native"
    torch.cuda.synchronize()
    replay()
    assert same_gradients(named, pyreg.L1(0.5))


def test_two_streams_at_once(place):
    """One regularizer on both, and one of its own on each: nobody's scratch is another's."""
    own = [parameters(place, count=5) for _ in range(2)]
    shared = pyreg.Regularizer(parameters(place, count=7), BOTH)
    with torch.no_grad():
        expected = shared()
    regs = [pyreg.Regularizer(named, pyreg.L1(0.5)) for named in own]
    streams = [device.stream(on(place)) for _ in own]
    values = []
    for _ in range(size(place, 50, 2)):
        for stream, reg, named in zip(streams, regs, own, strict=True):
            with stream, torch.no_grad():
                values.append(shared())
                zero(named)
                reg.accumulate_()
    if place.device == "cuda":
        torch.cuda.synchronize()
    assert all(oracle.same(v, expected) for v in values)
    assert all(same_gradients(named, pyreg.L1(0.5)) for named in own)


def test_memory_that_another_tensor_took_over(place):
    """A freed parameter's address, with other numbers, another dtype and another size in it."""
    memory = torch.empty(4096, dtype=torch.uint8, device=on(place))
    with torch.no_grad():
        for dtype, number in ((torch.float32, 2.0), (torch.float32, 5.0), (torch.bfloat16, 3.0)):
            p = nn.Parameter(memory.view(dtype))
            p.fill_(number)
            assert pyreg.l1([p], 1.0) == number * p.numel()
            del p


def test_replaced_data(place):
    """Another address, then another dtype, strides and size."""
    named = parameters(place)
    reg = pyreg.Regularizer(named, pyreg.L1(0.5))
    reg.accumulate_()
    for data in (
        fill((1000,), torch.float32, place.device, "moved"),
        fill((64, 65), torch.float16, place.device, "replaced").t(),
    ):
        p = named[0][1]
        p.grad = None
        p.data = data
        p.grad = torch.zeros_like(p)
        zero(named)
        assert close_value(reg.accumulate_(), pyreg.L1(0.5), tensors_of(named))
        assert same_gradients(named, pyreg.L1(0.5))


def test_changed_strengths_take_effect(place):
    """Numbers of a new penalty, and a tensor that changes in place."""
    named = parameters(place)
    lam = torch.tensor(1.0, device=on(place))
    reg = pyreg.Regularizer(named, pyreg.L1(lam))
    for strength in (1.0, 0.25, 4.0):
        lam.fill_(strength)
        expected = pyreg.L1(strength)
        with torch.no_grad():
            assert close_value(reg(), expected, tensors_of(named))
            assert close_value(pyreg.l1(tensors_of(named), strength), expected, tensors_of(named))


@pytest.mark.parametrize("penalty", [pyreg.L1(0.3), pyreg.L2(0.07)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autograd(place, dtype, penalty):
    """loss = 3 * penalty: the value and the oracle's gradients, also with .grad None."""
    named = parameters(place, dtype=dtype)
    named[1][1].grad = None
    value = pyreg.penalty(named, penalty)
    (3 * value).backward()
    assert close_value(value.detach(), penalty, tensors_of(named))
    assert same_gradients(named, penalty, 3.0)


def test_compiled_with_the_penalty(place):
    """torch.compile(fullgraph=True): the eager loss and gradients to float32 rounding."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).to(on(place))
    x = torch.randn(16, 64, device=on(place))

    def loss() -> Tensor:
        return module(x).square().mean() + pyreg.elastic_net(module, 1e-2, 1e-3)

    eager = loss()
    expected = torch.autograd.grad(eager, list(module.parameters()))
    compiler = "inductor" if place.device == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)()
    torch.testing.assert_close(compiled, eager)
    got = torch.autograd.grad(compiled, list(module.parameters()))
    torch.testing.assert_close(got, expected)


def test_a_gradient_left_behind_is_named(place):
    """On another device than its tensor, in the rehearsal of another dtype; nothing is written."""
    named = parameters(Place("torch", "cpu"), count=1)
    p = named[0][1]
    p.data = p.data.to(on(place)) if place.device == "cuda" else p.data.double()
    reg = pyreg.Regularizer(named, pyreg.L1(1.0))
    with pytest.raises(ValueError, match=r"'p0'.* has a gradient float32 \[1000\] on cpu"):
        reg.accumulate_()
    assert not p.grad.any()


def test_nothing_waits_for_the_device(place):
    """Value, backward, accumulate_ and prox_, with tensors that moved since the last call too."""
    named = parameters(place)
    learned = torch.tensor(0.5, device=on(place))
    for penalty in (BOTH, pyreg.L1(learned)):
        reg = pyreg.Regularizer(named, penalty)

        def step(reg: pyreg.Regularizer = reg) -> None:
            reg().backward()
            reg.accumulate_()
            reg.prox_(0.1)

        step()
        with device.no_waiting(on(place)):
            step()
            for _, p in named:
                p.grad = torch.zeros_like(p)
            step()
    assert all(p.grad.isfinite().all() for _, p in named)


def test_memory_of_sweeps_in_place(place):
    """At most 1 MiB on GPT-2 small, 498 MB."""
    workload = WORKLOADS["gpt2"] if place.device == "cuda" else WORKLOADS["tiny"]
    reg = pyreg.Regularizer(allocate(workload, device=on(place)).named, BOTH)
    for run in (reg.accumulate_, lambda: reg.prox_(0.1), reg.stats):
        assert device.peak(on(place), run) <= 1 << 20


def test_parity(place):
    """Every backend of this device: gradients within an ulp of each other, totals within 2e-6."""
    places = [p for p in (*ON_GPU, ON_CPU, Place("native", "cpu")) if p.device == place.device]
    places = [p for p in dict.fromkeys(places) if p != place and p.missing() is None]
    if not places:
        pytest.skip("one backend only")

    def run(of: Place) -> list[Tensor]:
        w = fill((size(place, 1_000_003, 5003),), torch.float32, place.device, "parity")
        with pyreg.use_backend(of.backend):
            return of.sweeps([w], [BOTH]).everything()

    for a, b in zip(run(place), run(places[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.fixture
def mesh(place):
    """Of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    backend = "nccl" if place.device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(place.device, (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_dtensors(place, mesh, mode):
    """Sweeps and steps have the bits that they have on what the rank holds, and wait for nobody."""
    from torch.distributed.tensor import Shard, distribute_tensor

    named, found = parameters(place), []
    sharded = [(n, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))) for n, p in named]
    for params in (named, sharded):
        for _, p in params:
            p.grad = torch.full_like(p, 0.01)
        reg = pyreg.Regularizer(params, BOTH)
        opt = pyreg.optim.AdamW([p for _, p in params], lr=0.1, regularizer=reg, mode=mode)

        def step(reg: pyreg.Regularizer = reg, opt: torch.optim.Optimizer = opt) -> Tensor:
            opt.step()
            reg.prox_(0.01)
            return reg.accumulate_()

        step()
        with device.no_waiting(on(place)):
            value = step()
        found.append((value, reg().detach(), opt.last_zeros, reg.stats().table))
    (own, *numbers, table), (other, *others, same_table) = found
    assert type(other) is Tensor
    assert own == other
    assert numbers == others
    assert torch.equal(table, same_table)
    for (_, p), (_, s) in zip(named, sharded, strict=True):
        assert torch.equal(p.detach(), s.detach().to_local())
        assert torch.equal(p.grad, s.grad.to_local())


def test_several_devices(gpu, place):
    """One sweep on each; the value is their sum, on the first parameter's device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    named = parameters(place)
    for i, (_, p) in enumerate(named):
        p.grad = None
        p.data = p.data.to(f"cuda:{i % 2}")
        p.grad = torch.zeros_like(p)
    value = pyreg.Regularizer(named, pyreg.L1(0.5)).accumulate_()
    assert value.device == named[0][1].device
    expected = math.fsum(oracle.value(pyreg.L1(0.5), [p]) for _, p in named)
    assert oracle.close(value.item(), expected, 2e-6)
    assert same_gradients(named, pyreg.L1(0.5))
