"""Penalties measured from an anchor, with a weight for each element: sum weight rho(w - anchor)."""

import copy
import math
import pickle

import hypothesis.strategies as st
import pytest
import torch
from cases import penalties
from hypothesis import HealthCheck, given, settings
from oracle import unit_roundoff
from torch import nn

import pyreg
from pyreg import L1, L2, MCP, ElasticNet, Regularizer, dispatch, reference
from pyreg.backend.triton import load
from pyreg.pack import Pack

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["anchor", "weight", "both"]


def named(dtype=torch.float32, seed=0):
    """Sizes around the kernels' blocks and chunks, an empty one, a transposed one."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(3,), (0,), (257,), (4096,), (5, 1000), (2, 3, 4)]
    found = {f"p{i}": torch.randn(s, generator=g).to(dtype) for i, s in enumerate(shapes)}
    found["t"] = torch.randn(30, 20, generator=g).to(dtype).t()
    return found


def beside(like, seed, dtype=None, positive=False):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, t in like.items():
        x = torch.empty_strided(t.shape, t.stride(), dtype=dtype or t.dtype)
        x.copy_(torch.randn(t.shape, generator=g))
        found[name] = x.abs() if positive else x
    return found


def anchored(penalty, like, kind, dtype=None):
    anchor = beside(like, 1, dtype) if kind != "weight" else None
    weight = beside(like, 2, dtype, positive=True) if kind != "anchor" else None
    fields = {name: getattr(penalty, name) for name in penalty.parameters}
    return type(penalty)(**fields, anchor=anchor, weight=weight)


def in_float64(rule, name, w):
    """The same penalty over the elements of one parameter, all in float64."""
    own = rule.of(name)
    fields = {n: float(torch.tensor(getattr(rule, n)).float()) for n in rule.parameters}
    if w.dtype == torch.float64:
        fields = {n: getattr(rule, n) for n in rule.parameters}
    pair = [None if t is None else t.double() for t in (own.anchor, own.weight)]
    return type(rule)(**fields, anchor=pair[0], weight=pair[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", penalties(), ids=repr)
def test_the_formulas_are_those_of_the_elements(penalty, kind):
    """Element by element, from the plain penalty: weight * rho(w - anchor)."""
    like = {"p": torch.randn(40, dtype=torch.float64)}
    w = like["p"]
    rule = anchored(penalty, like, kind).of("p")
    a = torch.zeros_like(w) if rule.anchor is None else rule.anchor
    m = torch.ones_like(w) if rule.weight is None else rule.weight
    x = w - a
    each = torch.stack([penalty.value(e) for e in x])
    torch.testing.assert_close(rule.value(w), (m * each).sum(), rtol=1e-12, atol=0)
    if reference.FORMULAS[penalty.name].grad is not None:
        torch.testing.assert_close(rule.grad(w), m * penalty.grad(x), rtol=1e-12, atol=0)
    for step in (1e-3, 0.3, 10.0):
        u = torch.stack([penalty.prox(e, step * k) for e, k in zip(x, m, strict=True)])
        torch.testing.assert_close(rule.prox(w, step), a + u, rtol=1e-12, atol=1e-12)


def test_the_prox_minimises():
    """Against a brute-force grid, for the one whose prox has branches."""
    w = torch.tensor([0.4, -1.3, 2.0], dtype=torch.float64)
    anchor = torch.tensor([0.5, 0.2, -0.3], dtype=torch.float64)
    weight = torch.tensor([0.0, 0.7, 2.5], dtype=torch.float64)
    rule = MCP(0.6, 2.0, anchor=anchor, weight=weight)
    step = 0.5
    u = rule.prox(w, step)
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    for i in range(3):
        own = MCP(0.6, 2.0)
        cost = torch.stack([own.value(g) for g in (grid[::8] - anchor[i])]) * weight[i]
        cost = cost + (grid[::8] - w[i]) ** 2 / (2 * step)
        at = own.value(u[i] - anchor[i]) * weight[i] + (u[i] - w[i]) ** 2 / (2 * step)
        assert at <= cost.min() + 1e-12
    assert u[0] == w[0]


# Against exact arithmetic, with u = 2^-24 (2^-53): the difference w - anchor and the product with
# the weight are two roundings more than the plain sweeps have; anchor and weight are rounded to the
# compute dtype too (float64 ones beside float32 weights). Those move the argument of rho by
# 2 u (|w| + |anchor|), which rho' carries on: at most 1 + |x| of scale for these penalties.
def close(found, expected, dtype, scale):
    u = unit_roundoff(reference.compute_dtype(dtype))
    last = 0.0 if dtype in (torch.float32, torch.float64) else unit_roundoff(dtype)
    bound = 64 * u * scale + 2 * last * expected.abs() + torch.finfo(dtype).tiny
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside_dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("penalty", penalties(), ids=repr)
def test_every_sweep(penalty, dtype, beside_dtype, kind, backend):
    params = named(dtype)
    rule = anchored(penalty, params, kind, beside_dtype)
    exact = {name: in_float64(rule, name, t) for name, t in params.items()}
    smooth = penalty.name in ("l1", "l2", "elastic_net", "huber", "mcp", "scad", "log_sum")
    before = {name: t.clone() for name, t in params.items()}
    reg = Regularizer(params, rule, include_frozen=True)
    value = reg().item()
    total = sum(exact[n].value(t.double()).item() for n, t in params.items())
    assert value == pytest.approx(total, rel=1e-5)
    if reference.FORMULAS[penalty.name].grad is not None:
        for t in params.values():
            t.grad = torch.full_like(t, 0.25)
        assert reg.accumulate_(0.5).item() == pytest.approx(total, rel=1e-5)
        for name, t in params.items():
            if not smooth:  # LHalf's gradient has no bound where w meets the anchor
                continue
            expected = 0.25 + 0.5 * exact[name].grad(before[name].double())
            scale = (1 + before[name].double().abs()) * (1 + expected.abs())
            m = exact[name].weight
            close(t.grad, expected, dtype, scale * (1 if m is None else 1 + m))
    reg.prox_(0.2)
    convex = penalty.name in ("l1", "l2", "elastic_net", "huber")
    for name, t in params.items():
        expected = exact[name].prox(before[name].double(), 0.2)
        if convex:  # a prox is then 1-Lipschitz; those of the others jump
            scale = 1 + before[name].double().abs() + expected.abs()
            m = exact[name].weight
            close(t, expected, dtype, scale * (1 if m is None else 1 + m))
        else:
            near = (t.double() - expected).abs() <= 0.02 * (1 + expected.abs())
            assert near.double().mean() > 0.97 if t.numel() else True


@pyreg.use_backend("auto")
@pytest.mark.parametrize("penalty", penalties(), ids=repr)
def test_an_anchor_of_nothing_changes_nothing(native, penalty):
    """origin 0 and weight 1: value, gradient and prox of the plain sweep, bit for bit."""
    results = []
    for anchored_too in (False, True):
        params = named()
        rule = penalty
        if anchored_too:
            zeros = {n: torch.zeros_like(t) for n, t in params.items()}
            ones = {n: torch.ones_like(t) for n, t in params.items()}
            fields = {n: getattr(penalty, n) for n in penalty.parameters}
            rule = type(penalty)(**fields, anchor=zeros, weight=ones)
        reg = Regularizer(params, rule, include_frozen=True)
        if reference.FORMULAS[penalty.name].grad is not None:
            for t in params.values():
                t.grad = torch.full_like(t, 0.25)
            value = reg.accumulate_(0.5)
        else:
            value = reg()
        reg.prox_(0.2)
        results.append((value, params))
    (a, plain), (b, other) = results
    assert a.item() == pytest.approx(b.item(), rel=1e-6)  # (x^2 is added by a fused product there)
    for name in plain:
        assert torch.equal(plain[name] + 0.0, other[name] + 0.0)
        if plain[name].grad is not None:
            assert torch.equal(plain[name].grad, other[name].grad)


def test_what_the_prox_does_not_move_stays_exactly(backend):
    w = torch.tensor([1.0, 0.1, 3.0])
    far = torch.full((3,), 1e8)
    frozen = {"w": torch.tensor([0.0, 0.0, 1.0])}
    reg = Regularizer({"w": w}, L2(1e-3, anchor={"w": far}, weight=frozen), include_frozen=True)
    reg.prox_(0.1)
    assert w[:2].tolist() == [1.0, torch.tensor(0.1).item()]
    assert w[2] > 1e3


def test_l1_sp_puts_weights_exactly_on_the_anchor(backend):
    params = {"w": torch.randn(1000)}
    anchor = {"w": torch.randn(1000)}
    Regularizer(params, L1(1.0, anchor=anchor), include_frozen=True).prox_(0.5)
    same = params["w"] == anchor["w"]
    assert 100 < same.sum() < 900


def test_autograd(backend):
    """Value, gradients, a learnable strength's gradient, and both again by double backward."""
    w = torch.randn(300, dtype=torch.float64, requires_grad=True)
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    anchor, weight = torch.randn(300).double(), torch.rand(300).double()
    reg = Regularizer({"w": w}, L2(lam, anchor={"w": anchor}, weight={"w": weight}))
    x = w.detach() - anchor
    value = reg()
    torch.testing.assert_close(value.detach(), 0.3 * (weight * x * x).sum())
    by_w, by_lam = torch.autograd.grad(value, (w, lam))
    torch.testing.assert_close(by_w, 0.6 * weight * x)
    torch.testing.assert_close(by_lam, (weight * x * x).sum())
    (g,) = torch.autograd.grad(reg(), w, create_graph=True)
    by_w, by_lam = torch.autograd.grad(g.square().sum() / 2, (w, lam))
    torch.testing.assert_close(by_w, 0.36 * weight**2 * x)
    torch.testing.assert_close(by_lam, (1.2 * weight**2 * x * x).sum())


def test_compiled_and_transformed():
    module = nn.Linear(8, 5)
    anchor = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    reg = Regularizer(module, {"weight": L2(0.1, anchor=anchor), "bias": L1(0.2)})
    expected = (
        0.1 * (module.weight - anchor["weight"]).square().sum() + 0.2 * module.bias.abs().sum()
    )
    torch.testing.assert_close(reg(), expected)
    compiled = torch.compile(lambda x: module(x).sum() + reg(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    compiled(x).backward()
    found = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    (module(x).sum() + expected).backward()
    for a, p in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self):
            return reg()

    def of(weight):
        return torch.func.functional_call(Penalised(), {"module.weight": weight}, ())

    torch.testing.assert_close(
        torch.func.grad(of)(module.weight.detach()), 0.2 * (module.weight - anchor["weight"])
    )


def test_a_backend_asked_for_by_name_does_not_compile(native):
    """The formulas serve there: whichever came first, the request or the graph."""
    module = nn.Linear(4, 3)
    anchor = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    reg = Regularizer(module, L2(0.5, anchor=anchor))
    compiled = torch.compile(lambda: reg(), fullgraph=True, backend="aot_eager")
    compiled()
    with (
        pyreg.use_backend("native"),
        pytest.raises(pyreg.BackendError, match="'native' cannot serve anchored penalties inside"),
    ):
        compiled()
    with pyreg.use_backend("torch"):
        compiled().backward()


def test_frozen_parameters_while_compiled():
    module = nn.Linear(4, 3)
    anchor = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    reg = Regularizer(module, L2(0.5, anchor=anchor))
    module.weight.requires_grad_(False)
    compiled = torch.compile(lambda: reg(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), 0.5 * (module.bias - anchor["bias"]).square().sum())


def test_tied_weights_have_the_anchor_of_any_of_their_names(backend):
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = model[0].weight
    anchor = {"1.weight": torch.ones(3, 3)}
    expected = (model[0].weight.detach() - 1).square().sum()
    reg = Regularizer(model, L2(1.0, anchor=anchor))
    torch.testing.assert_close(reg().detach(), expected)
    norm = reg.report(gradients=True).rules[0].gradient_norm
    assert norm == pytest.approx(2 * math.sqrt(expected.item()), rel=1e-6)


def test_the_parameters_of_another_model_as_anchors(backend):
    """They require grad, which is none of the penalty's business; what becomes of them counts."""
    student, teacher = nn.Linear(4, 4), nn.Linear(4, 4)
    reg = Regularizer(student, L2(1.0, anchor=dict(teacher.named_parameters())))
    reg().backward()
    assert all(p.grad is None for p in teacher.parameters())
    for p in teacher.parameters():
        p.data = torch.full_like(p, 2.0)
    expected = sum((p.detach() - 2).square().sum() for p in student.parameters())
    torch.testing.assert_close(reg().detach(), expected)


def test_gradients_of_other_strides(backend):
    w = nn.Parameter(torch.randn(20, 30))
    w.grad = torch.zeros(30, 20).t()
    anchor = torch.randn(20, 30)
    Regularizer({"w": w}, L2(0.5, anchor={"w": anchor})).accumulate_()
    torch.testing.assert_close(w.grad, w.detach() - anchor)


def test_parameters_that_share_memory(backend):
    buffer = torch.full((30,), 3.0)
    params = {"a": buffer[:20], "b": buffer[10:]}
    ones = {name: torch.ones_like(t) for name, t in params.items()}
    Regularizer(params, L2(0.5, anchor=ones), include_frozen=True).prox_(1.0)
    assert buffer.tolist() == [2.0] * 10 + [1.5] * 10 + [2.0] * 10


def test_parameters_that_are_each_others_anchors():
    """One after the other: a sweep would read the one while it writes the other."""
    params = {"a": torch.full((30,), 1.0), "b": torch.full((30,), 5.0), "c": torch.ones(30)}
    anchor = {"a": params["b"], "b": params["a"], "c": torch.zeros(30)}
    reg = Regularizer(params, L2(0.5, anchor=anchor), include_frozen=True)
    native, formulas = reg.report().sweeps
    assert native.startswith("1 tensors on cpu:")
    assert "params[0] ('a') is measured from another parameter" in formulas
    reg.prox_(1.0)
    assert [t[7].item() for t in params.values()] == [3.0, 4.0, 0.5]


def test_a_copy_goes_on_with_its_own_anchor():
    reg = Regularizer({"w": torch.ones(5)}, L2(1.0, anchor={"w": torch.zeros(5)}), include_frozen=1)
    for other in (copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        other.rules["*"].anchor["w"].fill_(1.0)
        assert other().item() == 0.0
    assert reg().item() == 5.0


def test_a_gpus_sweeps_are_triton(monkeypatch):
    """Native serves no anchored rows there, so that Triton does."""
    cuda, triton = (dispatch.backend(name, "cuda") for name in ("native", "triton"))
    if isinstance(load(), str):
        pytest.skip(load())
    for each in (cuda, triton):
        monkeypatch.setattr(type(each), "missing", lambda self: None)
    monkeypatch.setattr("pyreg.backend.triton.interpreted", lambda: False)
    row = (torch.float32, torch.Size([3]), (1,))
    pack = Pack(torch.device("cuda"), [0], [0], ("l2",), [row], None, [(None, torch.ones(3))])
    assert dispatch.choose(pack).backend is triton
    assert "anchored" in dispatch.choose(pack).reason


def test_plain_and_anchored_rules_in_one_regularizer():
    """L2-SP: the backbone stays near where it was, the new head near 0."""
    model = nn.ModuleDict({"backbone": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    reg = Regularizer(model, {"backbone.*": L2(0.3, anchor=start), "head.*": L2(0.2)})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    elements = sum(p.numel() for p in model["backbone"].parameters())
    head = 0.2 * sum(p.detach().double().square().sum() for p in model["head"].parameters())
    assert reg().item() == pytest.approx(0.3 * elements + head.item(), rel=1e-6)
    assert "anchored" in str(reg)
    assert [line.partition(":")[0] for line in reg.report().sweeps] == ["2 tensors on cpu"] * 2
    assert reg.report(gradients=True).rules[0].gradient_norm == pytest.approx(
        0.6 * math.sqrt(elements), rel=1e-6
    )


def test_ewc_through_an_optimizer():
    """Prox mode in Adam's metric, against the step written out."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(50, dtype=torch.float64))
    anchor, fisher = torch.randn(50).double(), torch.rand(50).double()
    other = w.detach().clone().requires_grad_()
    reg = Regularizer({"w": w}, L2(0.5, anchor={"w": anchor}, weight={"w": fisher}))
    ours, plain = torch.optim.Adam([w], lr=0.1), torch.optim.Adam([other], lr=0.1)
    reg.attach(ours, mode="prox")
    for k in range(1, 6):
        for p, opt in ((w, ours), (other, plain)):
            opt.zero_grad()
            (p * torch.arange(50)).sum().backward()
            opt.step()
        v = plain.state[other]["exp_avg_sq"]
        t = 0.1 / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        with torch.no_grad():
            other.copy_(anchor + (other - anchor) / (1 + t * fisher))
    torch.testing.assert_close(w, other, rtol=1e-12, atol=1e-12)


def test_the_anchor_stays_the_callers():
    params, anchor = {"w": torch.ones(10)}, {"w": torch.zeros(10)}
    reg = Regularizer(params, L2(1.0, anchor=anchor), include_frozen=True)
    assert reg().item() == 10.0
    anchor["w"].fill_(1.0)
    assert reg().item() == 0.0
    again = copy.deepcopy(reg)
    assert again().item() == 0.0


@pyreg.use_backend("auto")
def test_an_anchor_changed_between_forward_and_backward(native):
    w, anchor = torch.ones(10, requires_grad=True), {"w": torch.zeros(10)}
    loss = Regularizer({"w": w}, L2(1.0, anchor=anchor))()
    anchor["w"].fill_(1.0)
    with pytest.raises(RuntimeError, match=r"'w'.*modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", ["strides", "expanded", "offset"])
@pyreg.use_backend("auto")
def test_anchors_of_other_layouts(native, layout):
    w = torch.randn(20, 30)
    anchor = torch.randn(30, 20).t() if layout == "strides" else torch.randn(30).expand(20, 30)
    if layout == "offset":
        anchor = torch.randn(20 * 30 + 1)[1:].view(20, 30)
    reg = Regularizer({"w": w}, L2(1.0, anchor={"w": anchor}), include_frozen=True)
    assert reg().item() == pytest.approx((w - anchor).double().square().sum().item(), rel=1e-6)
    (sweep,) = reg.report().sweeps
    if layout == "offset":
        assert sweep == "1 tensors on cpu: native"
    else:
        assert sweep.startswith("1 tensors on cpu: torch (")
        assert "'w'" in sweep


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_bits_for_any_number_of_threads(native, sizes, threads):
    params = {str(i): torch.randn(n) for i, n in enumerate(sizes)}
    rule = ElasticNet(0.1, 0.2, anchor=beside(params, 1), weight=beside(params, 2, positive=True))
    reg = Regularizer(params, rule, include_frozen=True)
    torch.set_num_threads(1)
    one = reg().item()
    torch.set_num_threads(threads)
    assert reg().item() == one
