"""Modules on a GPU as torch.nn's users know them: which path serves a call and what `explain` says, dtypes under
autocast, GradScaler, errors, other devices, compile, gradients of gradients, cells, empty batches.
"""

import copy
import os
import subprocess
import sys

import fastrnn._C as _C
import pytest
import torch
from conftest import KINDS, SIXTEEN, dtype_name, flat, normal, pair, tensors_in
from gpu import PATHS, RESIDENT, asked_for, every_path, forced, needs_card, served, without_cudnn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

pytestmark = needs_card

THREE = ["RNN_TANH", "GRU", "LSTM"]


def on_card(kind, *sizes, seed=0, **options):
    """(fastrnn's, torch.nn's) with the same weights, on the card."""
    torch.manual_seed(seed)
    ours, theirs = pair(kind, *sizes, **options)
    return ours.cuda(), theirs.cuda()


def state(kind, *shape, dtype=torch.float32):
    h = normal(*shape, dtype=dtype, seed=3).cuda()
    return (h, normal(*shape, dtype=dtype, seed=4).cuda()) if kind == "LSTM" else h


def judge(rule, dtype, make, results, path):
    """The rule: make(seed) -> fastrnn's module, torch.nn's; results(module, dtype) -> dictionary. Where dtypes differ
    among each other, as under autocast, ours are torch's."""

    def draw(n):
        ours, theirs = make(n)
        truth = results(copy.deepcopy(theirs).double(), torch.float64)
        with asked_for("float32"):
            torchs = results(theirs, torch.float32)
            with forced(path):
                mine = results(ours, torch.float32)
        kinds = [{k: v.dtype for k, v in found.items()} for found in (mine, torchs)]
        assert kinds[0] == kinds[1]
        return *({k: v.to(dtype) for k, v in found.items()} for found in (mine, torchs)), truth

    rule.check(draw, dtype, path)


# ------------------------------------------------------------------------------------------------------ which path


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_torch_computes(kind):
    """Nothing runs by itself that was not found right on a card: the same bits as torch.nn's, and explain says why."""
    ours, theirs = on_card(kind, 9, 18)
    x = normal(7, 3, 9).cuda()
    plan = fastrnn.explain(ours, x)
    assert plan.path == "torch" and "FASTRNN_GPU_PATH" in plan.why
    assert all(a.equal(b) for a, b in zip(tensors_in(ours(x)), tensors_in(theirs(x)), strict=True))


def test_torch_can_be_forced():
    ours, theirs = on_card("LSTM", 9, 18)
    x = normal(7, 3, 9).cuda()
    with forced("torch"):
        assert fastrnn.explain(ours, x).path == "torch"
        assert ours(x)[0].equal(theirs(x)[0])


@every_path
@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_path_serves_what_it_can(kind, path):
    """A layer of 64 units and 8 rows is one that every path serves."""
    ours, _ = on_card(kind, 16, 64)
    for dtype in (torch.float32, *SIXTEEN):
        x = normal(7, 8, 16, dtype=dtype).cuda()
        with forced(path), asked_for("tf32"):
            plan = fastrnn.explain(ours.to(dtype), x)
            assert plan.path == "fastrnn cuda kernel", str(plan)
            assert served(ours, x) == path, str(plan)
            assert path in str(plan)


NOT_RESIDENT = {
    "float64": (dict(), torch.float64, 64, "float64"),
    "a projection": (dict(proj_size=16), torch.float32, 64, "proj"),
    "too wide": (dict(), torch.float32, 9000, ""),
}


@pytest.mark.parametrize("path", RESIDENT)
@pytest.mark.parametrize("what", NOT_RESIDENT)
def test_a_path_that_cannot_serve_a_call_says_so_and_hands_it_to_step(what, path):
    options, dtype, H, word = NOT_RESIDENT[what]
    with torch.device("cuda"):
        ours = fastrnn.LSTM(8, H, dtype=dtype, **options)
    x = normal(3, 4, 8, dtype=dtype).cuda()
    with forced(path):
        plan = fastrnn.explain(ours, x)
        assert served(ours, x) == "step", str(plan)
        assert path in str(plan) and word in str(plan), "it must be told which path was asked for, and why not"
        found = tensors_in(ours(x))
    with forced("step"):
        assert all(a.equal(b) for a, b in zip(found, tensors_in(ours(x)), strict=True))


def test_the_switch_refuses_nonsense():
    with pytest.raises(ValueError, match="expected one of .*step.*got 'warp'"):
        _C.set_gpu_path("warp")
    assert set(PATHS) <= set(_C.gpu_paths())


@pytest.mark.parametrize("asked", [*PATHS, "auto", "torch", "nonsense", ""])
def test_the_environment_variable(asked):
    code = (
        "import torch, fastrnn; m = fastrnn.LSTM(8, 16).cuda(); x = torch.randn(3, 2, 8, device='cuda')\n"
        "print(fastrnn.explain(m, x).path); print(m(x)[0].isfinite().all().item())"
    )
    environment = {**os.environ, "FASTRNN_GPU_PATH": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["fastrnn cuda kernel" if asked in (*PATHS, "auto") else "torch", "True"]
    assert ("FASTRNN_GPU_PATH: expected one of" in done.stderr) == (asked == "nonsense")


# ----------------------------------------------------------------------------------------------------------- autocast


@every_path
@pytest.mark.parametrize("low", SIXTEEN, ids=dtype_name)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("kind", [*THREE, "LSTM projected"])
def test_autocast(kind, packed, low, path, rule):
    """dtypes are torch.nn's, numbers as near to float64 as torch.nn's."""
    kind, *projected = kind.split()
    options = {"proj_size": 20} if projected else {}
    lengths = torch.tensor([9, 4, 7, 9, 1, 3, 2, 5])

    def results(module, dtype):
        x = normal(9, 8, 24).to(dtype).cuda().requires_grad_()
        given = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
        with torch.autocast("cuda", dtype=low, enabled=dtype == torch.float32):
            outputs = module(given)
        return with_gradients_on_card(outputs, [x, *module.parameters()])

    judge(rule, low, lambda n: on_card(kind, 24, 64, seed=n, num_layers=2, **options), results, path)


def with_gradients_on_card(outputs, wanted):
    outs = tensors_in(outputs)
    incoming = [normal(*o.shape, seed=7 + i).to(o) for i, o in enumerate(outs)]
    grads = torch.autograd.grad(outs, wanted, incoming, allow_unused=True)
    named = {f"output {i}": o for i, o in enumerate(outs)}
    return named | {f"gradient {i}": g for i, g in enumerate(grads) if g is not None}


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_a_step_with_a_gradient_scaler(kind, path, rule):
    """One step of SGD under autocast: the change of every weight is as near to float64's as torch.nn's; a step with an
    infinity in it is left out."""
    x = normal(9, 8, 24).cuda()

    def change(module, dtype, filling=None):
        scaled = dtype == torch.float32
        before = [p.detach().clone() for p in module.parameters()]
        given = x.to(before[0].dtype)
        if filling is not None:
            given = given.clone()
            given[0, 0, 0] = filling
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cuda", enabled=scaled, init_scale=2.0**10)
        with torch.autocast("cuda", dtype=torch.float16, enabled=scaled):
            loss = module(given)[0].float().square().mean() if scaled else module(given)[0].square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return {str(i): p.detach() - b for i, (p, b) in enumerate(zip(module.parameters(), before, strict=True))}

    judge(rule, torch.float16, lambda n: on_card(kind, 24, 64, seed=n), change, path)
    with forced(path):
        assert all(not d.any() for d in change(on_card(kind, 24, 64)[0], torch.float32, torch.nan).values())


# ------------------------------------------------------------------------------------------------------------- errors


def raised(call):
    try:
        call()
    except Exception as error:  # what is compared is which one
        return type(error), str(error).splitlines()[0]
    return None


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_tensors_on_different_devices(kind, path):
    """The error is torch.nn's own, type and text."""
    ours, theirs = on_card(kind, 9, 18)
    x = normal(7, 3, 9)
    cpu_state = tuple(t.cpu() for t in state(kind, 1, 3, 18)) if kind == "LSTM" else state(kind, 1, 3, 18).cpu()
    with forced(path):
        for call in (
            lambda module: module(x),
            lambda module: module(x.cuda(), cpu_state),
            lambda module: copy.deepcopy(module).cpu()(x.cuda()),
            lambda module: module(x.cuda().half()),
            lambda module: module(x.cuda()[:, :, :5]),
        ):
            expected = raised(lambda call=call: call(theirs))
            assert expected is not None
            assert raised(lambda call=call: call(ours)) == expected


@every_path
def test_options_on_another_device(path):
    """lengths and reset may be anywhere; reset_state may not, and the error names it."""
    ours, _ = on_card("GRU", 9, 18)
    x, lengths, reset = normal(7, 3, 9).cuda(), torch.tensor([3, 7, 0]), torch.rand(7, 3) < 0.4
    with forced(path):
        on_gpu, _ = ours(x, lengths=lengths.cuda(), reset=reset.cuda())
        assert ours(x, lengths=lengths, reset=reset)[0].equal(on_gpu)
        with pytest.raises(ValueError, match="reset_state: expected device cuda"):
            ours(x, reset=reset, reset_state=torch.zeros(1, 3, 18))


def test_the_operators_name_the_tensor_that_is_elsewhere():
    weights = [p.detach() for p in fastrnn.GRU(4, 5).cuda().parameters()]
    x, h0 = torch.zeros(3, 2, 4, device="cuda"), torch.zeros(1, 2, 5)
    options = (None, None, None, False, False, False, False)
    with pytest.raises(RuntimeError, match="h0: expected"):
        torch.ops.fastrnn.layer("gru", x, h0, None, weights, *options)
    with pytest.raises(RuntimeError, match=r"weights\[1\].*: expected"):
        torch.ops.fastrnn.layer("gru", x, None, None, [weights[0], weights[1].cpu(), *weights[2:]], *options)


@every_path
def test_empty_batches(path):
    for kind in THREE:
        ours, _ = on_card(kind, 9, 18, bidirectional=True)
        x = torch.zeros(5, 0, 9, device="cuda", requires_grad=True)
        with forced(path):
            output, *states = tensors_in(ours(x))
            assert output.shape == (5, 0, 36) and all(h.shape == (2, 0, 18) for h in states)
            output.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


# ----------------------------------------------------------------------------------------------- everything around it


@every_path
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_cells(kind, path, rule):
    def make(n):
        torch.manual_seed(n)
        theirs = getattr(torch.nn, f"{kind}Cell")(9, 33)
        return fastrnn.accelerate(copy.deepcopy(theirs)).cuda(), theirs.cuda()

    def results(module, dtype):
        x = normal(5, 9, dtype=dtype).cuda().requires_grad_()
        h = state(kind, 5, 33, dtype=dtype)
        return with_gradients_on_card(flat(module(x, h)), [x, *module.parameters()])

    judge(rule, torch.float32, make, results, path)


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_step_and_freeze(kind, path):
    """step() does on a GPU what it does anywhere; freeze() says that it packs CPU weights alone."""
    ours, _ = on_card(kind, 9, 33)
    x, before = normal(6, 5, 9).cuda(), state(kind, 1, 5, 33)
    with forced(path), torch.no_grad(), asked_for("float32"):
        expected, expected_state = ours(x, before)
        with pytest.raises(ValueError, match="expected a CPU tensor"):
            ours.eval().freeze()
        hx, outputs = tuple(t.clone() for t in before) if kind == "LSTM" else before.clone(), []
        for t in range(6):
            output, hx = ours.step(x[t], hx)
            outputs.append(output.clone())
    torch.testing.assert_close(torch.stack(outputs), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(flat(hx), flat(expected_state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_recompute(kind, path):
    """The same numbers from less memory."""
    ours, _ = on_card(kind, 9, 33, num_layers=2)
    x = normal(64, 5, 9).cuda().requires_grad_()
    with forced(path), asked_for("float32"):
        expected = with_gradients_on_card(ours(x), [x, *ours.parameters()])
        ours.recompute = True
        found = with_gradients_on_card(ours(x), [x, *ours.parameters()])
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-5)


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_compiled(kind, path):
    ours, _ = on_card(kind, 9, 33)
    cell, weights = {"RNN_TANH": "rnn"}.get(kind, kind.lower()), list(ours.parameters())
    x = normal(6, 5, 9).cuda().requires_grad_()

    def call(v):
        return getattr(fastrnn.functional, cell)(v, None, weights)[0]

    with forced(path):
        expected = with_gradients_on_card(call(x), [x, *weights])
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found = with_gradients_on_card(compiled(x), [x, *weights])
    assert all(found[name].equal(want) for name, want in expected.items())


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_gradients_of_gradients(kind, path, rule):
    def penalty(module, dtype):
        x = normal(6, 3, 5, dtype=dtype).cuda().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        found = torch.autograd.grad(gradient.square().sum(), [x, *module.parameters()], allow_unused=True)
        return {"gradient": gradient} | {str(i): g for i, g in enumerate(found) if g is not None}

    with without_cudnn():  # its RNNs have no second derivative
        judge(rule, torch.float32, lambda n: on_card(kind, 5, 11, seed=n), penalty, path)


@every_path
@pytest.mark.parametrize("kind", THREE)
def test_per_sample_gradients(kind, path):
    ours, _ = on_card(kind, 5, 33)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    x = normal(4, 7, 1, 5).cuda()

    def loss(weights, v):
        return torch.func.functional_call(ours, weights, (v,))[0].square().sum()

    with forced(path), asked_for("float32"):
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        for i in range(4):
            alone = torch.autograd.grad(ours(x[i])[0].square().sum(), list(ours.parameters()))
            for (name, _), want in zip(ours.named_parameters(), alone, strict=True):
                torch.testing.assert_close(found[name][i], want, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_path
def test_another_card_than_the_current_one(path):
    ours, _ = on_card("LSTM", 9, 64)
    x = normal(7, 8, 9).cuda().requires_grad_()
    with forced(path):
        expected = with_gradients_on_card(ours(x), [x, *ours.parameters()])
        second, there = copy.deepcopy(ours).to("cuda:1"), x.detach().to("cuda:1").requires_grad_()
        assert torch.cuda.current_device() == 0
        found = with_gradients_on_card(second(there), [there, *second.parameters()])
        assert torch.cuda.current_device() == 0
    for name, want in expected.items():
        assert found[name].device == torch.device("cuda:1")
        assert found[name].cpu().equal(want.cpu())


# ----------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["torch", "step"])
def test_a_probe_on_a_card(kind, path):
    """By a loop over steps: the figures that the CPU's kernels give."""
    ours, _ = on_card(kind, 9, 18, num_layers=2)
    ours, x = ours.double(), normal(12, 5, 9, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        here = copy.deepcopy(ours).to(device)
        with forced(path), fastrnn.probe(here) as probe:
            here(x.to(device))[0][-1].square().sum().backward()
        found.append(probe)
    for on_cpu, on_gpu in zip(*(probe.layers() for probe in found)):
        for name in ("rows", "h", "h_grad", "h_grad_arrived"):
            torch.testing.assert_close(
                getattr(on_gpu.last, name), getattr(on_cpu.last, name), rtol=1e-9, atol=1e-12, msg=name
            )
    first, second = (probe.weights() for probe in found)
    assert first.keys() == second.keys()
    assert all(abs(first[name][0] - second[name][0]) <= 1e-9 * first[name][0] for name in first)
