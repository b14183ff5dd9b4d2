"""What a training does with pyreg.optim: checkpoints, scalers, fall-backs, mistakes."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from trained import NET, ONE_EACH, backward, make, minimizing, net, same, tensors_of, train

import pyreg
from pyreg import optim


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_checkpoints_of_torch_and_for_torch(swept, name, options, how):
    """Tolerance as of ten steps without a penalty."""
    if name == "RMSprop" and "fused" in how:
        pytest.skip("torch has no fused RMSprop")
    options = minimizing(options)
    ours, theirs = net(), net()
    a, b = make(optim, name, ours, options), make(torch.optim, name, theirs, options, **how)
    train(b, theirs, range(5))
    ours.load_state_dict(theirs.state_dict())
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    for o, model in ((a, ours), (b, theirs)):
        train(o, model, range(5, 10))
    same(a, b, 1e-12, 1e-12)
    theirs.load_state_dict(ours.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for o, model in ((a, ours), (b, theirs)):
        train(o, model, range(10, 15))
    same(a, b, 1e-12, 1e-12)


RESUME = """
import sys, torch, pyreg
sys.path.insert(0, {tests!r})
import trained as t
model = t.net()
model.load_state_dict(torch.load({path!r})["model"])
reg = pyreg.Regularizer(model, pyreg.L1(pyreg.schedules.Linear(0.0, 0.1, 20)))
opt = t.make(pyreg.optim, "AdamW", model, {{"lr": 0.02}}, regularizer=reg, mode="prox")
saved = torch.load({path!r})
opt.load_state_dict(saved["optimizer"])
reg.load_state_dict(saved["regularizer"])
t.train(opt, model, range(5, 10))
torch.save(t.tensors_of(opt), {path!r})
"""


def test_resume_in_a_new_process(native, run_python, tmp_path):
    """The same bits as without a break."""
    path, model = str(tmp_path / "saved.pt"), net()
    reg = pyreg.Regularizer(model, pyreg.L1(pyreg.schedules.Linear(0.0, 0.1, 20)))
    opt = make(optim, "AdamW", model, {"lr": 0.02}, regularizer=reg, mode="prox")
    train(opt, model, range(5))
    saved = {"model": model, "optimizer": opt, "regularizer": reg}
    torch.save({key: value.state_dict() for key, value in saved.items()}, path)
    run_python(RESUME.format(tests=str(Path(__file__).parent), path=path))
    train(opt, model, range(5, 10))
    for p, q in zip(tensors_of(opt), torch.load(path), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(native, copied):
    model = net()
    opt = make(optim, "Adam", model, {"lr": 0.02}, regularizer=NET, mode="prox")
    train(opt, model, range(3))
    model2, opt2 = copied((model, opt))
    train(opt, model, range(3, 6))
    assert not torch.equal(model2[0].weight, model[0].weight)
    train(opt2, model2, range(3, 6))
    same(opt, opt2)
    assert (opt2.mode, opt2.last_zeros) == ("prox", opt.last_zeros)
    opt2.detach()
    assert opt2.regularizer is None
    assert opt.regularizer.step == 6


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler(backend, mode, unscale):
    """Scales are powers of two: the same bits as without, in one sweep. A skipped step is none."""
    ours, plain = net(), net()
    penalty = pyreg.L1(pyreg.schedules.Linear(0.0, 0.1, 10))
    a = make(optim, "AdamW", ours, {"lr": 0.02}, regularizer=penalty, mode=mode)
    b = make(optim, "AdamW", plain, {"lr": 0.02}, regularizer=penalty, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for k in range(8):
        backward(ours, k, scaler.get_scale() if k else float(scaler.scale(torch.ones(()))))
        backward(plain, k)
        if k == 4:
            ours[0].weight.grad[0, 0] = math.inf
            before, steps = copy.deepcopy(tensors_of(a)), a.regularizer.step
        if unscale:
            scaler.unscale_(a)
            if k != 4:
                for model in (ours, plain):
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(a)
        scaler.update()
        if k == 4:
            assert all(map(torch.equal, tensors_of(a), before))
            assert a.regularizer.step == steps == 4
        else:
            b.step()
    # 1e-13: a backward from a scaled loss rounds as one that is not, but where numbers are tiny.
    same(a, b, 1e-13, 1e-13)


def test_a_closure_hooks_and_a_compiled_step(swept):
    """Each is called once a step; the three ways give the same bits."""
    ways = []
    for way in ("plain", "closure", "compiled"):
        torch._dynamo.reset()
        model, calls = net(), []
        opt = make(optim, "Adam", model, {"lr": 0.02}, regularizer=NET)
        opt.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        opt.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        compiled = torch.compile(lambda opt=opt: opt.step())
        for k in range(5):
            if way == "closure":
                loss = opt.step(lambda model=model, k=k: backward(model, k))
                assert loss.item() > 0
            else:
                backward(model, k)
                opt.step() if way == "plain" else compiled()
        assert calls == ["before", "after"] * 5
        opt.zero_grad()
        assert model[0].weight.grad is None
        ways.append(opt)
    same(ways[0], ways[1])
    same(ways[0], ways[2])


def irregular(model):
    w = model[0].weight
    w.data = torch.zeros(w.shape[0], 2 * w.shape[1], dtype=w.dtype)[:, ::2].copy_(w.data)


def other_strides(model):
    w = model[0].weight
    w.grad = w.grad.t().contiguous().t()


def shared(model):
    model[0].bias.data = model[0].weight.data.view(-1)[:300]


def several_dtypes(model):
    model[2].float()


FALLS_BACK = {"irregular": irregular, "strides": other_strides, "shared": shared}


@pytest.mark.parametrize("why", [*FALLS_BACK, "anchor", "dtypes"])
@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_where_it_falls_back(native, monkeypatch, name, options, mode, why):
    """In the middle of a training: before and after it are sweeps, with the same states."""
    options = minimizing(options)
    fell, fall = [], optim.fused.step_by_torch
    monkeypatch.setattr(optim.fused, "step_by_torch", lambda *a: fell.append(1) or fall(*a))
    pair = []
    for module in (optim, torch.optim):
        model = net()
        rule = pyreg.L1(0.02)
        if why == "anchor":
            rule = pyreg.L1(0.02, anchor={"0.weight": torch.ones_like(model[0].weight)})
        rules = {"0.weight": rule, "*": NET}
        if why == "dtypes":
            several_dtypes(model)
        reg = pyreg.Regularizer(model, rules)
        if module is optim:
            opt = make(module, name, model, options, regularizer=reg, mode=mode)
        else:
            opt = make(module, name, model, options)
            reg.attach(opt, mode)
        for k in range(6):
            generator = torch.Generator().manual_seed(k)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if k == 3 and why in FALLS_BACK:
                FALLS_BACK[why](model)
            opt.step()
        pair.append((opt, reg))
    # The float32 weights of "dtypes": 6 steps of 16 roundings of terms of at most 4.
    tolerance = 6 * 64 * 2**-24 if why == "dtypes" else 1e-11
    same(pair[0][0], pair[1][0], tolerance, tolerance)
    expected = {"dtypes": 0, "anchor": 6, "strides": 1, "irregular": 3, "shared": 3}
    assert len(fell) == expected[why]
    zeros = sum((p == 0).sum().item() for g in pair[1][0].param_groups for p in g["params"])
    assert pair[0][0].last_zeros == zeros
    for pattern, value in pair[0][1].last_value.items():
        torch.testing.assert_close(value, pair[1][1].last_value[pattern], rtol=1e-6, atol=0)


def test_bad_arguments(native):
    model = net()
    params, reg = list(model.parameters()), pyreg.Regularizer(model, NET)
    for error, message, arguments in (
        (ValueError, "mode: expected 'grad' or 'prox', got 'proximal'", {"mode": "proximal"}),
        (TypeError, "expected a Regularizer or a penalty, got float", {"regularizer": 0.1}),
        (ValueError, "Invalid learning rate", {"lr": -1.0, "regularizer": reg}),
        (ValueError, "Invalid beta", {"betas": (1.0, 0.9), "regularizer": reg}),
        (ValueError, "differentiable=True", {"differentiable": True}),
    ):
        with pytest.raises(error, match=message):
            optim.Adam(params, **arguments)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.Adam([{"params": params}, {"params": params[:1]}])
    with pytest.raises(ValueError, match=r"does not hold '2.weight'"):
        optim.Adam(model[0].parameters(), regularizer=reg)
    first = optim.Adam(params, regularizer=reg)  # none of these held on to it
    with pytest.raises(ValueError, match="already attached to Adam"):
        optim.SGD(params, regularizer=reg)
    with pytest.raises(ValueError, match="already attached to Adam"):
        reg.attach(torch.optim.Adam(params))
    first.detach()
    optim.SGD(params, regularizer=reg)


def sparse(opt, model):
    model[2].weight.grad = model[2].weight.grad.to_sparse()


def of_another_dtype(opt, model):
    w = model[2].weight
    if not hasattr(w, "grad_dtype"):
        pytest.skip("this torch knows one dtype for a gradient")
    w.grad_dtype = None
    w.grad = w.grad.float()


def one_memory(opt, model):
    model[0].bias.grad = model[2].weight.grad[0]


def bad_state(opt, model):
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][2]["exp_avg_sq"] = torch.ones(3, dtype=torch.float64)
    opt.load_state_dict(saved)


def part_of_a_state(opt, model):
    del opt.state[model[2].weight]["exp_avg_sq"]


def bad_schedule(opt, model):
    opt.regularizer.rules["*"] = pyreg.L1(lambda step: math.nan)


def two_ways(opt, model):
    opt.param_groups[1]["maximize"] = True


def bad_anchor(opt, model):
    model.anchor.resize_(3)


BAD = {
    sparse: (TypeError, r"'2.weight'.*its gradient has layout torch.sparse_coo"),
    of_another_dtype: (ValueError, r"'2.weight'.*has a gradient float32"),
    one_memory: (ValueError, r"'0.bias'\) and params\[2\] \('2.weight'\): their gradients share"),
    bad_state: (ValueError, r"'2.weight'.*\[2, 300\].*moment is \[3\]"),
    part_of_a_state: (ValueError, r"'2.weight'\): its state in the optimizer lacks 'exp_avg_sq'"),
    bad_schedule: (ValueError, "nan"),
    two_ways: (ValueError, "with and without maximize=True"),
    bad_anchor: (ValueError, r"'0.bias'.*its anchor is float64 \[3\]"),
}


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_nothing_half_done(backend, spoil, mode, anchored):
    """A step that raises leaves weights, states and counters as they were."""
    if (spoil is bad_anchor and not anchored) or (
        spoil in (two_ways, one_memory) and mode == "prox"
    ):
        pytest.skip("nothing is spoiled")
    model = net()
    rules = {"*": NET}
    if anchored:  # and so it is torch's step, and a sweep beside it
        model.anchor = torch.zeros(300, dtype=torch.float64)
        rules = {"0.bias": pyreg.L2(0.1, anchor={"0.bias": model.anchor}), **rules}
    reg = pyreg.Regularizer(model, rules)
    opt = make(optim, "Adam", model, {"lr": 0.02}, regularizer=reg, mode=mode)
    train(opt, model, range(3))
    backward(model, 3)
    spoil(opt, model)
    before = copy.deepcopy(tensors_of(opt))
    error, message = BAD[spoil]
    with pytest.raises(error, match=message):
        opt.step()
    assert all(map(torch.equal, tensors_of(opt), before))
    assert opt.regularizer.step == 3


@pytest.mark.parametrize("mode", [None, "grad", "prox"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_a_part_of_a_state_that_is_missing(backend, name, options, mode):
    """Each part is named; weights and gradients stay as they are. Without any it begins anew."""
    model = net()
    more = {} if mode is None else {"regularizer": NET, "mode": mode}
    opt = make(optim, name, model, minimizing(options), **more)
    train(opt, model, range(2))
    w = model[2].weight
    kinds = () if name == "SGD" else tuple(opt.state[w])
    for kind in kinds:
        kept = opt.state[w].pop(kind)
        before = copy.deepcopy([*tensors_of(opt), *(p.grad for p in model.parameters())])
        with pytest.raises(ValueError, match=rf"'2.weight'\): its state .* lacks '{kind}'"):
            opt.step()
        assert all(
            map(torch.equal, [*tensors_of(opt), *(p.grad for p in model.parameters())], before)
        )
        opt.state[w][kind] = kept
    train(opt, model, range(2, 3))
    del opt.state[w]
    train(opt, model, range(3, 4))
    assert opt.state[w].keys() >= {*kinds}


@pytest.mark.parametrize("regularizer", [None, NET])
def test_gradients_in_one_memory_that_are_only_read(backend, regularizer):
    """torch's own step takes them too."""
    pair = []
    for module in (optim, torch.optim):
        model = net()
        opt = make(module, "Adam", model, {"lr": 0.02})
        if regularizer and module is optim:
            opt = make(module, "Adam", model, {"lr": 0.02}, regularizer=NET, mode="prox")
        elif regularizer:
            pyreg.Regularizer(model, NET).attach(opt, "prox")
        for k in range(3):
            backward(model, k)
            one_memory(opt, model)
            opt.step()
        pair.append(opt)
    same(*pair, 1e-11, 1e-11)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_backend_that_cannot_serve(native, mode):
    """Known before torch's own step, where it is that."""
    model = net()
    opt = make(optim, "Adam", model, {"lr": 0.02}, regularizer=NET, mode=mode)
    attached = make(torch.optim, "Adam", other := net(), {"lr": 0.02})
    pyreg.Regularizer(other, NET).attach(attached, mode)
    view = torch._neg_view(-model[0].bias.detach())
    for m, o in ((model, opt), (other, attached)):
        m[0].bias.data = view.clone() if m is model else view
        backward(m, 0)
        m[0].bias.data = view
        before = copy.deepcopy(tensors_of(o))
        with pyreg.use_backend("native"), pytest.raises(pyreg.BackendError, match=r"0\.bias"):
            o.step()
        assert all(map(torch.equal, tensors_of(o), before))


def test_a_momentum_without_a_steady_step(native):
    model = net()
    with pytest.raises(ValueError, match=r"momentum=1, .*no steady step"):
        optim.SGD(model.parameters(), lr=0.1, momentum=1.0, regularizer=NET, mode="prox")
    opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, regularizer=NET, mode="prox")
    opt.param_groups[0]["momentum"] = 1.0
    backward(model, 0)
    before = copy.deepcopy(tensors_of(opt))
    for name in ("native", "torch"):
        with pyreg.use_backend(name), pytest.raises(ValueError, match="no steady step"):
            opt.step()
    assert all(map(torch.equal, tensors_of(opt), before))


def test_a_penalty_without_a_gradient_is_noticed_when_its_parameter_thaws(backend):
    model = net()
    model[0].weight.requires_grad_(False)
    reg = pyreg.Regularizer(model, {"0.weight": pyreg.L0(0.1), "*": NET})
    opt = optim.SGD(model.parameters(), lr=0.1, regularizer=reg)
    model[0].weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"L0.*has no gradient"):
        opt.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_counters_that_are_no_floats_and_a_step_without_gradients(native):
    """An old checkpoint's: torch counts in any dtype. And a step that has nothing to do."""
    model = net()
    opt = make(optim, "Adam", model, {"lr": 0.02}, regularizer=NET)
    opt.step()
    assert opt.regularizer.last_value["*"] > 0
    assert opt.last_zeros == 0
    train(opt, model, range(2))
    for state in opt.state.values():
        state["step"] = state["step"].long()
    train(opt, model, range(2, 4))
    assert [int(state["step"]) for state in opt.state.values()] == [4] * 4


def test_complex_parameters_are_torchs(native):
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    optim.SGD([p], lr=0.5).step()
    assert p.tolist() == [0.5] * 3


def test_a_step_by_torch_does_not_gather_all_names_for_each(monkeypatch):
    """The parameters' names are for errors: as often for many parameters as for few."""
    gathered = []
    own = optim.SGD._named
    monkeypatch.setattr(optim.SGD, "_named", lambda self: gathered.append(1) or own(self))
    often = []
    for n in (3, 30):
        params = {str(i): nn.Parameter(torch.ones(4)) for i in range(n)}
        rule = pyreg.L1(0.02, anchor={name: torch.zeros(4) for name in params})
        optimizer = optim.SGD(params.values(), lr=0.1, regularizer=pyreg.Regularizer(params, rule))
        for p in params.values():
            p.grad = torch.ones(4)
        gathered.clear()
        optimizer.step()
        often.append(len(gathered))
    assert often[0] == often[1]
