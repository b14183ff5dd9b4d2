"""bfloat16 and float16 parameters in pyreg.optim: float32 states, master weights, stochastic
rounding. What is too small for one step is not lost."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from trained import NET, ONE_EACH, backward, make, minimizing, net, tensors_of

import pyreg
from pyreg import optim
from pyreg.optim.precision import MASTER, key_of, round_at_random

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
HOW = pytest.mark.parametrize("how", ["master_weights", "stochastic_rounding"])


def give_gradients(*models: nn.Module, k: int) -> None:
    """The same ones to all, multiples of 2^-10 that every dtype holds."""
    generator = torch.Generator().manual_seed(k)
    for own in zip(*(model.parameters() for model in models), strict=True):
        g = torch.randn(own[0].shape, generator=generator).mul(64).round().clamp(-255, 255) / 1024
        for p in own:
            p.grad = g.to(p.dtype)


@LOW
@pytest.mark.parametrize("mode", [None, "grad", "prox"])
@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_master_weights_are_those_of_a_float32_model(backend, name, options, mode, dtype):
    """Bit for bit on the native backend, and the parameter is their rounded copy.

    1e-5: torch's own kernels round elsewhere; 10 steps of 16 roundings of 2^-24 of numbers under 4.
    """
    options = minimizing(options)
    low, exact = net(dtype), net(dtype).float()
    for p, q in zip(low.parameters(), exact.parameters(), strict=True):
        q.data = p.detach().float()
    regs = [None, None]
    if mode is not None:
        regs = [pyreg.Regularizer(m, {"0.*": NET, "*": pyreg.MCP(0.01, 300)}) for m in (low, exact)]
    mode = mode or "grad"
    a = make(optim, name, low, options, regularizer=regs[0], mode=mode, master_weights=True)
    b = make(optim, name, exact, options, regularizer=regs[1], mode=mode)
    for k in range(10):
        give_gradients(low, exact, k=k)
        kept = [p.grad.clone() for p in low.parameters()]
        a.step()
        b.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(low.parameters(), kept, strict=True))
        for p, q in zip(low.parameters(), exact.parameters(), strict=True):
            state = {**a.state[p]}
            assert torch.equal(p, state[MASTER].to(dtype))
            found = [state.pop(MASTER), *(state[s] for s in b.state[q])]
            for x, y in zip(found, [q.detach(), *b.state[q].values()], strict=True):
                if backend == "native":
                    assert torch.equal(x, y)
                elif y is not None:
                    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
        if regs[0] is not None:
            last, expected = regs[0].last_value, regs[1].last_value
            for rule in last:
                torch.testing.assert_close(last[rule], expected[rule], rtol=1e-5, atol=1e-6)
            assert backend != "native" or a.last_zeros == b.last_zeros


@pytest.mark.parametrize(("name", "options"), ONE_EACH)
def test_float32_states(swept, name, options):
    """Of 16-bit parameters; float32 and float64 ones are stepped as ever."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        model, plain = net(dtype), net(dtype)
        a = make(optim, name, model, options, state_dtype=torch.float32)
        b = make(optim, name, plain, options)
        for k in range(2):
            give_gradients(model, plain, k=k)
            a.step()
            b.step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            states = [s for k, s in a.state[p].items() if k != "step"]
            assert all(s.dtype == (torch.float32 if dtype.itemsize == 2 else dtype) for s in states)
            assert dtype.itemsize == 2 or torch.equal(p, q)


@pytest.mark.parametrize("how", ["nearest", "master_weights", "stochastic_rounding"])
def test_a_decay_below_the_last_bit(backend, how):
    """A decay of 1e-4 a step, of weights that have 2^-8 between them, for 300 steps.

    Rounded to nearest nothing happens; else the mean is 0.9999^300. The stochastic one's deviation:
    each weight does at most 300 roundings of up to 2^-8, of variance 2^-18 each at most: over
    20,000 weights 2^-9 sqrt(300 / 20000) = 2.4e-4, of which five are allowed.
    """
    w = nn.Parameter(torch.ones(200, 100, dtype=torch.bfloat16))
    options = {} if how == "nearest" else {how: True}
    optimizer = optim.SGD([w], lr=1e-3, weight_decay=0.1, **options)
    w.grad = torch.zeros_like(w)
    for _ in range(300):
        optimizer.step()
    expected = 0.9999**300
    if how == "nearest":
        assert (w == 1).all()
    elif how == "master_weights":
        assert torch.equal(w, torch.full_like(w, expected))
        torch.testing.assert_close(
            optimizer.state[w][MASTER], torch.full((200, 100), expected), rtol=300 * 2**-24, atol=0
        )
    else:
        assert w.float().mean().item() == pytest.approx(expected, abs=5 * 2.4e-4)


def scrambled(x: int) -> int:
    """lowbias32, with Python's integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("view", ["plain", "transposed", "negative strides of size 1"])
def test_random_roundings_bit_for_bit(backend, view):
    """w - g is exact in float32 here; its upper 16 bits plus the carry of the element's own."""
    torch.manual_seed(0)
    w = torch.randn(70, 61).bfloat16()
    g = (torch.randn(70, 61) * 2**-10).bfloat16()
    if view == "transposed":
        w, g = w.t(), g.t()
    if view.startswith("negative"):
        w, g = w[:, None], g[:, None]
    p = nn.Parameter(w.clone())
    optimizer = optim.SGD(
        [nn.Parameter(torch.ones(1)), p], lr=1.0, stochastic_rounding=True, seed=7
    )
    for step in range(2):
        p.grad = g.clone()
        exact = p.detach().float() - g.float()
        optimizer.step()
        key = key_of(7, step, 1)
        assert torch.equal(p, round_at_random(exact, key))
        flat = exact.as_strided((exact.numel(),), (1,))
        got = p.detach().as_strided((p.numel(),), (1,))
        for i in (0, 1, 17, 4095, 4096, 4269):
            bits = flat[i].view(torch.int32).item() % 2**32
            up = (bits + (scrambled(i ^ key) & 0xFFFF)) >> 16
            assert got[i].view(torch.int16).item() % 2**16 == up % 2**16


def test_random_roundings_are_unbiased(native):
    """Of 2^20 elements a quarter above a bfloat16 number, a quarter is rounded up: five deviations
    of a binomial mean, sqrt(0.1875 / 2^20) = 4.2e-4. So it is in each of 16 columns; and neither
    the next step's nor another parameter's nor another seed's go up together more than at random.
    """
    n = 2**20
    ups = []
    for seed, step, index in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (2**40, 0, 0)]:
        x = torch.full((n,), 1 + 2**-9)
        up = round_at_random(x, key_of(seed, step, index)) != 1
        ups.append(up.double())
        assert up.double().mean().item() == pytest.approx(0.25, abs=5 * 4.2e-4)
        columns = up.view(-1, 16).double().mean(0)
        assert (columns - 0.25).abs().max() < 5 * math.sqrt(0.1875 / (n / 16))
    for i, a in enumerate(ups):
        for b in ups[:i]:
            assert (a * b).mean().item() == pytest.approx(1 / 16, abs=5 * math.sqrt(1 / 16 / n))


def test_what_random_rounding_keeps(backend):
    """What bfloat16 holds stays: zeros of either sign, the largest number, infinities and NaN."""
    held = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.3895e38, 1e-40, math.inf, -math.inf, math.nan])
    w = nn.Parameter(held.bfloat16())
    before = w.detach().clone()
    optimizer = optim.SGD([w], lr=0.0, stochastic_rounding=True)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w[:-1].view(torch.int16), before[:-1].view(torch.int16))
    assert w[-1].isnan()


@HOW
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_resume(backend, how, mode):
    """From a file, in another optimizer: the same bits as without a break."""

    def begin(model):
        return make(optim, "AdamW", model, {"lr": 0.02}, regularizer=NET, mode=mode, **{how: True})

    model = net(torch.bfloat16)
    opt = begin(model)
    for k in range(4):
        backward(model, k)
        opt.step()
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file)
    again = net(torch.bfloat16)
    opt2 = begin(again)
    opt2.load_state_dict(state)
    again.load_state_dict(weights)
    model3, opt3 = copy.deepcopy((model, opt))
    for k in range(4, 8):
        for m, o in ((model, opt), (again, opt2), (model3, opt3)):
            backward(m, k)
            o.step()
    for other in (opt2, opt3):
        for x, y in zip(tensors_of(opt), tensors_of(other), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@HOW
def test_the_same_bits_for_any_number_of_threads(swept, native, how):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        model = nn.Linear(300, 400).bfloat16()
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 120_000).view(400, 300))
            model.bias.zero_()
        opt = optim.Adam(model.parameters(), lr=1e-3, regularizer=NET, mode="prox", **{how: True})
        give_gradients(model, k=0)
        opt.step()
        found.append((tensors_of(opt), opt.regularizer.last_value["*"], opt.last_zeros))
    for tensors, *rest in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(tensors, found[0][0], strict=True))
        assert rest == list(found[0][1:])


def test_torchs_checkpoints(backend):
    """torch's states become float32; ours go to torch, which rounds them."""
    model, theirs = net(torch.bfloat16), net(torch.bfloat16)
    a, b = make(optim, "Adam", model, {"lr": 0.02}), make(torch.optim, "Adam", theirs, {"lr": 0.02})
    c = make(optim, "Adam", model, {"lr": 0.02}, master_weights=True)
    give_gradients(model, theirs, k=0)
    b.step()
    model.load_state_dict(theirs.state_dict())
    c.load_state_dict(b.state_dict())
    assert c.param_groups[0]["master_weights"]
    c.step()
    p = model[0].weight
    assert c.state[p]["exp_avg"].dtype == c.state[p][MASTER].dtype == torch.float32
    b.load_state_dict(c.state_dict())
    assert b.state[theirs[0].weight]["exp_avg"].dtype == torch.bfloat16
    a.load_state_dict(c.state_dict())  # the groups' options come with it
    give_gradients(model, k=1)
    a.step()
    assert a.state[p][MASTER].dtype == torch.float32


def test_a_parameter_that_its_master_weights_disagree_with(backend):
    """It was changed between two steps: nothing is stepped, until one of them gives way."""
    model = net(torch.bfloat16)
    opt = make(optim, "AdamW", model, {"lr": 0.02}, master_weights=True)
    give_gradients(model, k=0)
    opt.step()
    with torch.no_grad():
        model[0].weight.mul_(1.0)  # touched, and still the same
    opt.step()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    before = [t.clone() for t in tensors_of(opt)]
    with pytest.raises(ValueError, match=r"'0.weight'\): its master weights are not what it is"):
        opt.step()
    for x, y in zip(tensors_of(opt), before, strict=True):
        assert torch.equal(x, y)
    del opt.state[model[0].weight][MASTER]
    opt.step()
    assert torch.equal(model[0].weight, opt.state[model[0].weight][MASTER].bfloat16())


def mastered() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """After a step."""
    model = net(torch.bfloat16)
    opt = make(optim, "AdamW", model, {"lr": 0.02}, master_weights=True)
    give_gradients(model, k=0)
    opt.step()
    return model, opt


def other_memory(model, opt):
    model[0].weight.data = model[0].weight.detach() + 1


def loaded(model, opt):
    state = copy.deepcopy(opt.state_dict())
    state["state"][0][MASTER] += 1
    opt.load_state_dict(state)


def not_a_number(model, opt):
    opt.state[model[0].weight][MASTER].fill_(math.nan)
    model[0].weight.detach().add_(0)


@pytest.mark.parametrize("spoil", [other_memory, loaded, not_a_number], ids=lambda f: f.__name__)
def test_more_disagreements(backend, spoil):
    model, opt = mastered()
    spoil(model, opt)
    before = [t.clone() for t in tensors_of(opt)]
    with pytest.raises(ValueError, match=r"'0.weight'\): its master weights are not what it is"):
        opt.step()
    for x, y in zip(tensors_of(opt), before, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


def test_numbers_that_are_none_agree(backend):
    model, opt = mastered()
    with torch.no_grad():
        opt.state[model[0].weight][MASTER].fill_(math.nan)
        model[0].weight.fill_(math.nan)
    opt.step()
    assert model[0].weight.isnan().all()


def test_master_weights_given_up(backend):
    """A group that has none any more: later ones begin with what the parameter is by then."""
    model, opt = mastered()
    p = model[0].weight
    for options, has, dtype in (
        ({"master_weights": False, "state_dtype": torch.float32}, False, torch.float32),
        ({"state_dtype": None}, False, torch.bfloat16),
        ({"master_weights": True}, True, torch.float32),
    ):
        opt.param_groups[0].update(options)
        opt.step()
        assert (MASTER in opt.state[p]) == has
        assert opt.state[p]["exp_avg"].dtype == dtype
    assert torch.equal(p, opt.state[p][MASTER].bfloat16())


def test_a_step_of_torch_that_fails_half_way(monkeypatch):
    """The weights that moved and their masters still agree, so that the next step can be taken."""
    model, opt = mastered()
    step = torch.optim.AdamW.step

    def fails(self):
        step(self)
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    before = model[0].weight.detach().clone()
    with pyreg.use_backend("torch"), pytest.raises(MemoryError):
        opt.step()
    monkeypatch.undo()
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight, opt.state[model[0].weight][MASTER].bfloat16())
    opt.step()


def test_a_checkpoint_of_options_that_cannot_be(backend):
    _, opt = mastered()
    for bad in ({"stochastic_rounding": True}, {"state_dtype": torch.float16}):
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][1].update(bad)
        saved["state"][0]["exp_avg"].fill_(7.0)
        before = [t.clone() for t in tensors_of(opt)]
        with pytest.raises(ValueError, match=r"take one of them|expected torch.float32 or None"):
            opt.load_state_dict(saved)
        assert all(map(torch.equal, tensors_of(opt), before))
        assert "stochastic_rounding" not in opt.param_groups[1]


def test_a_checkpoint_that_lacks_options(backend):
    """They stay each group's own, not what the optimizer was made with."""
    _, opt = mastered()
    opt.param_groups[1]["master_weights"] = False
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        del group["master_weights"]
    opt.load_state_dict(saved)
    assert [group["master_weights"] for group in opt.param_groups] == [True, False]


def test_hooks_of_loading(backend):
    """Those before it change what is loaded, also what stays float32; those after it come last."""
    model, opt = mastered()
    w, b = model[0].weight, model[0].bias

    def before(_, given):
        own = {i: {**s, "exp_avg": s["exp_avg"] + 2**-12} for i, s in given["state"].items()}
        return {**given, "state": own}

    def after(opt):
        opt.state[b]["exp_avg"].fill_(3.0)

    expected = opt.state[w]["exp_avg"] + 2**-12
    opt.register_load_state_dict_pre_hook(before)
    opt.register_load_state_dict_post_hook(after)
    saved = copy.deepcopy(opt.state_dict())
    for _ in range(2):
        opt.load_state_dict(saved)
        assert torch.equal(opt.state[w]["exp_avg"], expected)
        assert (opt.state[b]["exp_avg"] == 3).all()


def test_a_group_that_cannot_be_added():
    opt = optim.SGD([nn.Parameter(torch.ones(3).bfloat16())], lr=0.1, stochastic_rounding=True)
    for bad, error, message in (
        ({"params": [nn.Parameter(torch.ones(3).half())]}, ValueError, r"params\[1\]: stochastic"),
        ({"params": [nn.Parameter(torch.ones(3))], "seed": 0.5}, TypeError, "expected an integer"),
    ):
        with pytest.raises(error, match=message):
            opt.add_param_group(bad)
        assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(opt.param_groups) == 2


def test_masters_of_parameters_that_share_memory():
    flat = torch.zeros(10).bfloat16()
    apart = [nn.Parameter(flat[:5]), nn.Parameter(flat[5:])]
    optim.SGD(apart, lr=0.1, master_weights=True)
    with pytest.raises(ValueError, match=r"params\[0\]: shares memory with another parameter"):
        optim.SGD([apart[0], nn.Parameter(flat[4:])], lr=0.1, master_weights=True)


def test_adagrads_first_sum_is_not_rounded(backend):
    p = nn.Parameter(torch.ones(3).bfloat16())
    opt = optim.Adagrad([p], initial_accumulator_value=0.1, state_dtype=torch.float32)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert torch.equal(opt.state[p]["sum"], torch.full((3,), 0.1))


def test_options_that_cannot_be():
    p = [nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    half = [("w", nn.Parameter(torch.ones(3).half()))]
    with pytest.raises(ValueError, match="take one of them"):
        optim.SGD(p, stochastic_rounding=True, master_weights=True)
    with pytest.raises(ValueError, match=r"w: stochastic_rounding=True is for bfloat16"):
        optim.SGD(half, stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"state_dtype: expected torch.float32 or None, got torch"):
        optim.SGD(p, state_dtype=torch.float64)
    with pytest.raises(TypeError, match=r"seed: expected an integer, got 0\.5"):
        optim.SGD(p, stochastic_rounding=True, seed=0.5)
