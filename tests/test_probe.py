"""fastrnn.probe: its figures are those of autograd hooks on a loop over steps, however the model is run."""

import copy
import math
import pickle
import threading
import weakref

import fastrnn._C as _C
import pytest
import torch
from conftest import KINDS, build, shared_out
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import diagnosis, ops, recording, reference


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(2)


# ------------------------------------------------------------------------------------ by hooks, on a loop over steps


class Hooked:
    """Loops over the steps of a torch.nn module's layers, each state with a hook; the figures of a Record, by
    definition. Rows and resets by masks."""

    def __init__(self, module, x, hx=None, lengths=None, reset=None, reset_state=None):
        self.module, self.found = module, {}
        T, B = x.shape[:2]
        self.valid = torch.ones(T, B, dtype=torch.bool)
        if lengths is not None:
            self.valid = torch.arange(T)[:, None] < lengths
        self.cut = torch.zeros(T, B, dtype=torch.bool) if reset is None else reset & self.valid
        D = 2 if module.bidirectional else 1
        self.h_n, self.c_n = [], []
        for k in range(module.num_layers):
            outputs = []
            for d in range(D):
                row = k * D + d
                states = [None if t is None else t[row] for t in self.pair(hx)]
                starts = [None if t is None else t[row] for t in self.pair(reset_state)]
                outputs.append(self.direction(row, x, *states, *starts, reverse=d == 1))
            x = torch.cat(outputs, -1)
        self.output = x

    def pair(self, hx):
        return hx if isinstance(hx, tuple) else (hx, None)

    def weight(self, name, row):
        k, d = (row // 2, row % 2) if self.module.bidirectional else (row, 0)
        return getattr(self.module, f"{name}_l{k}" + ("_reverse" if d else ""), None)

    def direction(self, row, x, h, c, h_start, c_start, reverse):
        w_ih, w_hh, b_ih, b_hh, w_hr = (
            self.weight(n, row) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        )
        T, B = x.shape[:2]
        H, mode = self.module.hidden_size, self.module.mode
        lstm = mode == "LSTM"
        h = x.new_zeros(B, self.module.proj_size or H) if h is None else h
        c = x.new_zeros(B, H) if lstm and c is None else c
        names = {"LSTM": "ifgo", "GRU": "rzn"}.get(mode, "h")
        new = lambda: torch.zeros(T, dtype=torch.float64)  # noqa: E731
        f = {n: new() for n in ("rows", "h", "h_grad", "h_grad_arrived", "c", "c_grad", "c_grad_arrived")}
        f |= {(g, what): new() for g in names for what in ("mean", "low", "high")}
        self.found[row] = f
        arriving, output, before = {}, [None] * T, None

        def keep(name, t):
            def hook(g):
                f[name][t] = g.square().sum().sqrt()

            return hook

        def arrives(t, which):
            def hook(g):
                g = torch.where(self.valid[t][:, None], g, 0.0)  # else of what the row begins with
                arriving[t, which] = g
                if which == "h":
                    f["h_grad_arrived"][t] = g.square().sum().sqrt()
                if (t, "h") in arriving and (t, "c") in arriving:
                    o, c_was, projected = arriving[t, "of"]
                    through = 0 if projected else arriving[t, "h"] * o * (1 - torch.tanh(c_was).square())
                    f["c_grad_arrived"][t] = (arriving[t, "c"] + through).square().sum().sqrt()

            return hook

        for t in reversed(range(T)) if reverse else range(T):
            valid = self.valid[t][:, None]
            boundary = t + 1 if reverse else t
            h_in, c_in = h * 1, None if c is None else c * 1
            if before is not None:
                if h_in.requires_grad:
                    h_in.register_hook(arrives(before, "h"))
                if lstm and c_in.requires_grad:
                    c_in.register_hook(arrives(before, "c"))
            if boundary < T:
                cut = self.cut[boundary][:, None]
                h_in = torch.where(cut, 0.0 if h_start is None else h_start, h_in)
                c_in = None if c is None else torch.where(cut, 0.0 if c_start is None else c_start, c_in)
            gi = x[t] @ w_ih.T + (0 if b_ih is None else b_ih)
            gh = h_in @ w_hh.T + (0 if b_hh is None else b_hh)
            if lstm:
                i, fg, g, o = (gi + gh).chunk(4, 1)
                gates = i.sigmoid(), fg.sigmoid(), g.tanh(), o.sigmoid()
                c_new = gates[1] * c_in + gates[0] * gates[2]
                c_new.register_hook(keep("c_grad", t))
                h_new = gates[3] * c_new.tanh()
                h_new = h_new if w_hr is None else h_new @ w_hr.T
                arriving[t, "of"] = (torch.where(valid, gates[3], 0.0).detach(), c_new.detach(), w_hr is not None)
            elif mode == "GRU":
                r, z = (a.sigmoid() for a in (gi + gh)[:, : 2 * H].chunk(2, 1))
                n = (gi[:, 2 * H :] + r * gh[:, 2 * H :]).tanh()
                gates = r, z, n
                h_new = (1 - z) * n + z * h_in
            else:
                h_new = (gi + gh).tanh() if mode == "RNN_TANH" else (gi + gh).relu()
                gates = (h_new,)
            h_new.register_hook(keep("h_grad", t))
            with torch.no_grad():
                f["rows"][t] = valid.sum()
                f["h"][t] = torch.where(valid, h_new, 0.0).square().sum().sqrt()
                if lstm:
                    f["c"][t] = torch.where(valid, c_new, 0.0).square().sum().sqrt()
                inside = valid.expand(-1, H)
                for name, gate in zip(names, gates):
                    values = gate[inside]
                    count = max(1, values.numel())
                    low, high = (0.1, 0.9) if name in "ifrzo" else (-0.9, 0.9)
                    low, high = (0.0, math.inf) if mode == "RNN_RELU" else (low, high)
                    f[name, "mean"][t] = values.sum() / count
                    f[name, "low"][t] = (values <= low).double().sum() / count
                    f[name, "high"][t] = (values >= high).double().sum() / count
            h = torch.where(valid, h_new, h)
            c = torch.where(valid, c_new, c) if lstm else None
            output[t] = torch.where(valid, h_new, 0.0)
            before = t
        self.h_n.append(h)
        self.c_n.append(c)
        return torch.stack(output)


def agree(record, expected, bound=1e-9):
    """All figures of a Record, to a relative bound in norm."""
    for name, want in expected.items():
        if isinstance(name, tuple):
            got = getattr(record.gates[name[0]], name[1])
        else:
            got = getattr(record, name)
        if got is None:
            assert name[0] == "c" and not want.any()
            continue
        assert got.dtype == torch.float64 and got.shape == want.shape
        assert (got - want).norm() <= bound * max(want.norm().item(), 1e-12), (name, got, want)


def model_of(layer):
    model = nn.Module()
    model.rnn = layer
    return model


CASES = {
    "plain": {},
    "layers": dict(num_layers=3),
    "both directions": dict(num_layers=2, bidirectional=True),
    "no bias": dict(bias=False),
}


def compare(kind, T=7, B=3, I=5, H=18, ragged=False, resets=False, states=False, loss="all", bound=1e-9, **options):
    """A probe's figures beside those of the hooks."""
    dtype = options.pop("dtype", torch.float64)
    recompute = options.pop("recompute", False)
    layer = build(kind, I, H, **options).to(dtype)
    layer.recompute = recompute
    plain = build(kind, I, H, module=nn, **options).double()
    plain.load_state_dict(layer.state_dict())
    D, L = (2 if layer.bidirectional else 1), layer.num_layers
    x = torch.randn(T, B, I, dtype=dtype)
    lstm, P = kind == "LSTM", layer.proj_size or H
    arguments = {}
    if ragged:
        arguments["lengths"] = torch.tensor([T, 1, max(1, T - 3), 0, T][:B])
    if resets:
        arguments["reset"] = torch.rand(T, B) < 0.3
        start = torch.randn(L * D, B, P, dtype=dtype) * 0.3
        arguments["reset_state"] = (start, torch.randn(L * D, B, H, dtype=dtype)) if lstm else start
    hx = None
    if states:
        hx = torch.randn(L * D, B, P, dtype=dtype, requires_grad=True)
        hx = (hx, torch.randn(L * D, B, H, dtype=dtype, requires_grad=True)) if lstm else hx
    weights = torch.randn(3, T, B, D * P, dtype=torch.float64)
    ends = torch.randn(L * D, B, P, dtype=torch.float64)

    def backward(output, h_n):
        value = (output.double() * weights[0]).sum() if loss == "all" else (output[-1].double() * weights[0][-1]).sum()
        if states:
            value = value + (h_n.double() * ends).sum()
        value.backward()

    with fastrnn.probe(model_of(layer)) as probe:
        output, h_n = layer(x, hx, **arguments)
        backward(output, h_n[0] if lstm else h_n)

    def wide(t):
        if t is None or isinstance(t, torch.Tensor):
            return t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)
        return tuple(map(wide, t))

    hooked = Hooked(plain, x.double(), wide(hx), **{k: wide(v) for k, v in arguments.items()})
    assert (output.double() - hooked.output).norm() <= 10 * bound * hooked.output.norm()
    backward(hooked.output, torch.stack(hooked.h_n))
    layers = probe.layers()
    assert [(layer.module, layer.layer, layer.reverse) for layer in layers] == [
        ("rnn", k, d == 1) for k in range(L) for d in range(D)
    ]
    for row, layer in enumerate(layers):
        agree(layer.last, hooked.found[row], bound)
    names = [f"rnn.{n}" for n, _ in plain.named_parameters()]
    found = probe.weights()
    assert list(found) == names
    for name, p in plain.named_parameters():
        assert abs(found[f"rnn.{name}"][0] - p.grad.norm()) <= bound * p.grad.norm()
    return probe


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_figures_are_those_of_hooks(kind, options, isa):
    compare(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("layers", [1, 2], ids=["one layer", "two layers"])
def test_states_resets_lengths(kind, ragged, layers):
    compare(kind, B=5, ragged=ragged, resets=True, states=True, num_layers=layers, bidirectional=True)


@pytest.mark.parametrize("options", [{}, dict(bidirectional=True, num_layers=2)], ids=["one", "many"])
@pytest.mark.parametrize("H, P", [(18, 5), (25, 24)])
def test_projections(options, H, P, isa):
    compare("LSTM", H=H, proj_size=P, states=True, **options)
    compare("LSTM", H=H, proj_size=P, B=5, ragged=True, resets=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["serial", "batch", "hidden", "wavefront", "ahead"])
def test_however_it_is_shared_out(kind, split):
    """Longer than a chunk, so that a chunk's sums are taken while the next is worked on."""
    with shared_out(split, 3):
        compare(kind, T=150, B=5, H=25, loss="end", bidirectional=split != "wavefront", num_layers=2, bound=1e-8)
        compare(kind, T=150, B=5, H=25, ragged=True)


def test_every_step_alone(isa):
    for kind in KINDS:
        compare(kind, T=1, B=1)
        compare(kind, T=1, B=40, H=48)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_layers(kind):
    compare(kind, T=70, recompute=True, num_layers=2)
    compare(kind, T=70, recompute=True, bidirectional=True)
    compare(kind, T=70, recompute=True, bidirectional=True, ragged=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"])
def test_narrower_dtypes(kind, dtype, bound, isa):
    """The gates' ends are counted at thresholds, which rounding may cross: here no gate is near one."""
    layer = build(kind, 5, 18)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(0.3)
    x, weights = torch.randn(9, 4, 5), torch.randn(9, 4, 18)
    results = []
    for kind_of in (dtype, torch.float64):
        module = copy.deepcopy(layer).to(dtype).to(kind_of)
        with fastrnn.probe(module) as probe:
            (module(x.to(dtype).to(kind_of))[0] * weights.to(kind_of)).sum().backward()
        results.append(probe.layers()[0].last)
    ours, truth = results
    for name in ("rows", "h", "h_grad", "h_grad_arrived", "c", "c_grad", "c_grad_arrived"):
        got, want = getattr(ours, name), getattr(truth, name)
        assert (got is None) == (want is None)
        assert want is None or (got - want).norm() <= bound * want.norm(), name
    for name, gate in truth.gates.items():
        assert (ours.gates[name].mean - gate.mean).abs().max() <= bound
        if kind != "RNN_RELU":
            assert torch.equal(ours.gates[name].saturated, gate.saturated)


def test_a_gradient_that_vanishes_is_seen_to_the_end():
    """Squares of float32 numbers would be gone at 1e-23."""
    layer = fastrnn.RNN(4, 16, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.eye(16) * 0.1)
        layer.weight_ih_l0.abs_()
        for b in (layer.bias_ih_l0, layer.bias_hh_l0):
            b.zero_()
    with fastrnn.probe(layer) as probe:
        layer(torch.rand(37, 1, 4) + 0.1)[0][-1].sum().backward()
    norms = probe.layers()[0].last.h_grad
    want = 4 * torch.logspace(-36, 0, 37, dtype=torch.float64)
    assert ((norms - want).abs() <= 1e-5 * want).all()


# -------------------------------------------------------------------------------------------------- as the model runs


def train_once(model, x, **kwargs):
    loss = sum(t.square().sum() for t in [model(x, **kwargs)[0]])
    loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, dict(num_layers=3, bidirectional=True)], ids=["one", "many"])
def test_results_are_the_same_bits(kind, options):
    layer = build(kind, 5, 20, **options)
    x = torch.randn(30, 6, 5)
    results = []
    for watched in (False, True):
        layer.zero_grad()
        if watched:
            with fastrnn.probe(layer):
                train_once(layer, x)
        else:
            train_once(layer, x)
        results.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_cell_called_in_a_loop_is_a_sequence(cell):
    """The same figures as the layer's; what comes back to an LSTM's c is estimated."""
    module = getattr(fastrnn, cell)(5, 20).double()
    layer = getattr(fastrnn, cell.removesuffix("Cell"))(5, 20).double()
    layer.load_state_dict({f"{name}_l0": p for name, p in module.state_dict().items()})
    x = torch.randn(9, 3, 5, dtype=torch.float64)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = module

        def forward(self, x):
            state = None
            for step in x:
                state = self.cell(step, state)
            return state[0] if isinstance(state, tuple) else state

    loop = Loop()
    with fastrnn.probe(loop) as probe:
        loop(x).square().sum().backward()
    with fastrnn.probe(layer) as expected:
        layer(x)[0][-1].square().sum().backward()
    (ours,), (theirs,) = probe.layers(), expected.layers()
    assert ours.name == "cell layer 0" and len(ours.last) == 9
    assert ours.last.starts.tolist() == theirs.last.starts.tolist() == [True] + [False] * 8
    for name in ("rows", "h", "h_grad", "c", "c_grad", "h_grad_arrived"):
        got, want = getattr(ours.last, name), getattr(theirs.last, name)
        assert want is None or (got - want).norm() <= 1e-12 * want.norm(), name
    left, exact = diagnosis.flow(ours.last), diagnosis.flow(theirs.last)
    assert len(left) == len(exact) == 9
    assert max(abs(a - b) for a, b in zip(left, exact)) <= (1e-9 if cell != "LSTMCell" else 1.0)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "slow"])
def test_a_sequence_in_pieces_is_one_sequence(kernels, monkeypatch):
    if not kernels:
        for module in ("functional", "recording"):
            monkeypatch.setattr(f"fastrnn.{module}.slow", lambda x: True)
    layer = fastrnn.GRU(5, 20).double()
    x = torch.randn(12, 3, 5, dtype=torch.float64)
    with fastrnn.probe(layer) as probe:
        state, total = None, 0
        for piece in x.split(5):
            output, state = layer(piece, state)
            total = total + output.square().sum()
        total.backward()
    with fastrnn.probe(layer) as whole:
        layer(x)[0].square().sum().backward()
    pieces, one = probe.layers()[0].last, whole.layers()[0].last
    for name in ("rows", "h", "h_grad", "h_grad_arrived"):
        assert (getattr(pieces, name) - getattr(one, name)).norm() <= 1e-12 * getattr(one, name).norm(), name
    assert torch.equal(pieces.starts, one.starts)


def test_two_sequences_in_a_step_stay_two():
    layer = fastrnn.GRU(5, 20)
    with fastrnn.probe(layer) as probe:
        (layer(torch.randn(4, 3, 5))[0].sum() + layer(torch.randn(6, 3, 5))[0].sum()).backward()
    record = probe.layers()[0].last
    assert record.starts.nonzero().flatten().tolist() == [0, 4]
    assert diagnosis.sequences(record) == [[3, 2, 1, 0], [9, 8, 7, 6, 5, 4]]


def test_only_a_state_that_was_handed_on_makes_calls_one_sequence():
    """Not a state of zeros or one that is learned, nor what was detached."""
    layer, cell = fastrnn.LSTM(5, 20), fastrnn.GRUCell(5, 20)
    learned = torch.zeros(1, 1, 20, requires_grad=True)
    for states in ([torch.zeros(1, 3, 20)] * 2, [learned.expand(1, 3, 20)] * 2):
        with fastrnn.probe(layer) as probe:
            sum(layer(torch.randn(6, 3, 5), states)[0].sum() for _ in range(2)).backward()
        assert probe.layers()[0].last.starts.nonzero().flatten().tolist() == [0, 6]
        assert probe.findings() == []
    with fastrnn.probe(cell) as probe:
        state, total = torch.zeros(2, 20), 0
        for _ in range(9):
            state = cell(torch.randn(2, 5), state.detach())
            total = total + state.sum()
        total.backward()
    assert probe.layers()[0].last.starts.all() and probe.findings() == []


def test_sequences_that_take_turns_are_told_apart():
    """Two that a cell goes through step by step, whose states pass through a mask."""
    cell, x = fastrnn.GRUCell(5, 20).double(), torch.randn(2, 7, 3, 5, dtype=torch.float64)

    def run(which):
        states = dict.fromkeys(which)
        with fastrnn.probe(cell) as probe:
            for t in range(7):
                for s in which:
                    h = states[s]
                    states[s] = cell(x[s, t], None if h is None else torch.ones(3, 1) * (h * 1.0).unsqueeze(0)[0])
            sum(h.square().sum() for h in states.values()).backward()
        return probe.layers()[0].last

    both, alone = run((0, 1)), [run((s,)) for s in (0, 1)]
    assert both.starts.nonzero().flatten().tolist() == [0, 7]
    for name in ("h", "h_grad", "h_grad_arrived"):
        want = torch.cat([getattr(one, name) for one in alone])
        assert (getattr(both, name) - want).norm() <= 1e-12 * want.norm()


def test_all_states_dropout_packed_batch_first():
    """Layers one by one, in another layout, and packed."""
    layer = fastrnn.LSTM(5, 12, num_layers=2, dropout=0.5, batch_first=True, bidirectional=True)
    x, lengths = torch.randn(4, 9, 5), torch.tensor([9, 2, 5, 7])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    layer.eval()
    calls = (x, {"lengths": lengths}), (packed, {}), (x, {"lengths": lengths, "all_states": True})
    records = []
    for argument, options in calls:
        with fastrnn.probe(layer) as probe:
            output = layer(argument, **options)[0]
            (output.data if argument is packed else output).square().sum().backward()
        records.append([each.last for each in probe.layers()])
    assert [len(r) for r in records] == [4, 4, 4]
    for others in records[1:]:
        for a, b in zip(records[0], others):
            assert torch.equal(a.rows, b.rows) and a.rows.tolist()[0] == 4 and a.rows.tolist()[-1] == 1
            assert (a.h_grad - b.h_grad).norm() <= 1e-5 * a.h_grad.norm()
    layer.train()
    with fastrnn.probe(layer) as probe:
        layer(x)[0].square().sum().backward()
    assert len(probe.layers()) == 4


def test_training_steps_and_history():
    layer = fastrnn.GRU(3, 4)
    with fastrnn.probe(layer, history=8) as probe:
        for _ in range(50):
            train_once(layer, torch.randn(5, 2, 3))
            with torch.no_grad():
                layer(torch.randn(5, 2, 3))  # validation is no training step
    assert probe.trained == 50
    assert probe.steps[0] == 0 and probe.steps[-1] == 49 and 4 <= len(probe.steps) <= 9
    gaps = {b - a for a, b in zip(probe.steps[:-1], probe.steps[1:-1])}
    assert len(gaps) == 1
    assert list(probe.layers()[0].history) == probe.steps
    assert list(probe.weights()["weight_ih_l0"]) == probe.steps
    train_once(layer, torch.randn(5, 2, 3))  # it is closed
    assert probe.trained == 50


def test_memory_of_long_sequences_is_bounded(monkeypatch):
    monkeypatch.setattr(recording, "_MOST_BYTES", 500_000)
    layer = fastrnn.RNN(1, 2)
    with fastrnn.probe(layer, history=1000) as probe:
        for _ in range(40):
            train_once(layer, torch.randn(500, 1, 1))
    assert probe._recording.bytes <= 500_000 and len(probe.steps) >= 3
    assert probe.steps[0] == 0 and probe.steps[-1] == 39
    with fastrnn.probe(layer, history=1000) as probe:  # of lengths that differ
        for step in range(40):
            train_once(layer, torch.randn(1 if step % 2 else 500, 1, 1))
            held = sum(sums.nbytes for s in probe._recording.steps for c in s.calls for sums, _ in c.parts.values())
            assert held <= probe._recording.bytes <= 500_000
    with fastrnn.probe(layer, history=1000) as probe:  # one long one
        for step in range(40):
            train_once(layer, torch.randn(500 if step == 20 else 1, 1, 1))
    assert probe.steps == list(range(40))


def test_the_weights_gradients_are_what_grad_holds():
    model = nn.Sequential(fastrnn.GRU(3, 4))
    with fastrnn.probe(model) as probe:
        for accumulated in (1, 2):
            train_once(model[0], torch.ones(5, 2, 3))
            grad = model[0].weight_hh_l0.grad
            assert probe.weights()["0.weight_hh_l0"][accumulated - 1] == pytest.approx(grad.norm().item(), rel=1e-6)
    first, second = probe.weights()["0.weight_hh_l0"].values()
    assert second == pytest.approx(2 * first, rel=1e-6)


def test_norms_beyond_float32s_squares():
    layer = fastrnn.RNN(1, 2, bias=False)
    with fastrnn.probe(layer) as probe:
        (layer(torch.ones(1, 1, 1))[0].sum() * 1e-30).backward()
        layer.zero_grad()
        (layer(torch.ones(1, 1, 1))[0].sum() * 1e30).backward()
    low, high = probe.weights()["weight_ih_l0"].values()
    assert high / low == pytest.approx(1e60, rel=1e-5)


def test_frozen_and_shared_layers():
    """A layer of which no gradient is wanted is told nothing; a module in two places is one."""
    model = nn.Module()
    model.a, model.b = fastrnn.GRU(3, 4, num_layers=2), fastrnn.GRU(4, 4)
    model.again = model.b
    for name, p in model.a.named_parameters():
        p.requires_grad_(name.endswith("l1"))
    with fastrnn.probe(model) as probe:
        model.again(model.b(model.a(torch.randn(6, 2, 3))[0])[0])[0].sum().backward()
    assert [layer.name for layer in probe.layers()] == ["a layer 1", "b layer 0"]
    assert len(probe.layers()[1].last) == 12


def test_checkpointing_is_one_training_step():
    layer = fastrnn.GRU(3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    with fastrnn.probe(layer) as probe:
        for _ in range(3):
            checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).sum().backward()
    assert probe.trained == 3 and [len(r) for r in probe.layers()[0].history.values()] == [5, 5, 5]


def test_checkpointing_by_a_backward_pass_of_its_own():
    """use_reentrant: the forward pass runs without gradients, and again in the middle of the backward pass."""
    layer = fastrnn.GRU(3, 3)
    with fastrnn.probe(layer) as probe:
        for _ in range(3):
            x = torch.randn(5, 2, 3, requires_grad=True)
            for _ in range(2):
                x = checkpoint(lambda x: layer(x)[0], x, use_reentrant=True)
            x.sum().backward()
    assert probe.trained == 3 and [len(r) for r in probe.layers()[0].history.values()] == [10, 10, 10]


def test_a_backward_pass_that_breaks_off_leaves_nothing():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError

    model = nn.ModuleList([fastrnn.GRU(3, 4), fastrnn.GRU(4, 4)])
    with fastrnn.probe(model) as probe:
        with pytest.raises(ArithmeticError):
            model[1](Fails.apply(model[0](torch.randn(5, 2, 3))[0]))[0].sum().backward()
        for _ in range(2):
            model[1](model[0](torch.randn(5, 2, 3))[0])[0].sum().backward()
    assert probe.trained == 2 and probe.steps == [0, 1]
    assert [[len(r) for r in layer.history.values()] for layer in probe.layers()] == [[5, 5], [5, 5]]


def test_an_evaluation_in_grad_mode_keeps_nothing():
    cell = fastrnn.GRUCell(3, 4)
    with fastrnn.probe(cell) as probe:
        calls = [weakref.ref(cell(torch.randn(2, 3)).grad_fn.watcher.call) for _ in range(5)]
        cell(torch.randn(2, 3)).sum().backward()
    assert all(call() is None for call in calls)
    assert [len(r) for r in probe.layers()[0].history.values()] == [1]


def test_gradients_of_gradients():
    layer = fastrnn.LSTM(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with fastrnn.probe(layer) as probe:
        (g,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        first = probe.layers()[0].last
        g.square().sum().backward()
    with fastrnn.probe(layer) as expected:
        layer(x)[0].square().sum().backward()
    assert torch.equal(first.h_grad, expected.layers()[0].last.h_grad)
    assert probe.trained == 1


def test_torch_func_and_inference_leave_nothing():
    layer = fastrnn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    with fastrnn.probe(layer) as probe:
        torch.func.grad(lambda x: layer(x)[0].sum())(x)
        layer(x)
        with torch.inference_mode():
            layer(x)
    assert probe.trained == 0 and probe.layers() == [] and probe.weights() == {}
    assert "no backward pass" in probe.summary()


def test_patched_and_accelerated_models():
    model = nn.Sequential(nn.GRU(3, 4))
    with pytest.raises(ValueError, match=r"expected one with layers .* of fastrnn, got Sequential, but 0 \(.*GRU"):
        fastrnn.probe(model)
    with fastrnn.patch(), fastrnn.probe(model) as probe:
        train_once(model[0], torch.randn(5, 2, 3))
    assert probe.trained == 1 and len(probe.layers()) == 1
    mixed = nn.ModuleDict({"ours": fastrnn.GRU(3, 4), "theirs": nn.GRU(3, 4)})
    with fastrnn.probe(mixed) as probe:
        train_once(mixed["ours"], torch.randn(5, 2, 3))
    assert "Not watched, since not fastrnn's: theirs (torch.nn.modules.rnn.GRU)" in probe.summary()


def test_compiled_code_runs_eagerly_while_it_is_watched():
    layer, ran = fastrnn.GRU(3, 4), []

    def counting(graph, example_inputs):
        return lambda *inputs: ran.append(1) or graph(*inputs)

    compiled = torch.compile(lambda x: layer(x)[0].sum(), backend=counting)
    x = torch.randn(5, 2, 3)
    compiled(x).backward()
    before = len(ran)
    assert before
    with fastrnn.probe(layer) as probe:
        compiled(x).backward()
    assert probe.trained == 1 and len(ran) == before
    compiled(x).backward()
    assert probe.trained == 1 and len(ran) > before


def test_threads_train_models_of_their_own():
    models = [fastrnn.GRU(3, 4) for _ in range(4)]
    probes = [fastrnn.probe(m) for m in models]

    def work(model, probe):
        torch.set_num_threads(1)
        with probe:
            for _ in range(20):
                train_once(model, torch.randn(5, 2, 3))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, probes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [probe.trained for probe in probes] == [20] * 4
    assert recording._recorders == {}


def test_a_watched_model_is_copied_and_saved_as_ever(tmp_path):
    layer = fastrnn.GRU(3, 4)
    with fastrnn.probe(layer) as probe:
        train_once(layer, torch.randn(5, 2, 3))
        copied = copy.deepcopy(layer)
        torch.save(layer, tmp_path / "model.pt")
        train_once(copied, torch.randn(5, 2, 3))
    assert probe.trained == 1
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False).weight_hh_l0, layer.weight_hh_l0)
    for other in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        assert other.to_dict() == probe.to_dict()


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        fastrnn.probe([])
    with pytest.raises(ValueError, match=r"model: expected one with layers or cells of fastrnn, got Linear"):
        fastrnn.probe(nn.Linear(2, 2))
    for history in (1, 2.5, True, "all"):
        with pytest.raises(ValueError, match=r"history: expected a whole number of at least 2, got"):
            fastrnn.probe(fastrnn.GRU(1, 1), history=history)
    layer = fastrnn.GRU(1, 2)
    with fastrnn.probe(layer):
        with pytest.raises(RuntimeError, match=r"model: expected modules that no other open probe watches"):
            with fastrnn.probe(nn.Sequential(layer)):
                pass
        assert len(recording._recorders) == 1
    assert recording._recorders == {}


def test_an_error_inside_closes_it():
    layer = fastrnn.GRU(1, 2)
    with pytest.raises(KeyError), fastrnn.probe(layer):
        raise KeyError
    assert recording._recorders == {}


# ------------------------------------------------------------------------------------------------------ the slow way


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, dict(num_layers=2, bidirectional=True)], ids=["one", "many"])
def test_devices_without_sums_get_the_same_figures(kind, options, monkeypatch):
    monkeypatch.setattr("fastrnn.functional.slow", lambda x: True)
    kernels = []
    monkeypatch.setattr("fastrnn.autograd.ops.layer_backward", lambda *a: kernels.append(a))
    compare(kind, **options)
    compare(kind, B=5, ragged=True, resets=True, states=True, **options)
    if kind == "LSTM":
        compare(kind, proj_size=7, **options)
    assert not kernels


def test_gate_ends_are_the_kernels():
    """The slow way's thresholds and names are those of csrc/cells.h."""
    assert {name for cell in ops.CELLS.values() for name in cell["watched"]} == {*recording._SQUASH, "h"}
    for cell, gates in (("lstm", "ifgo"), ("gru", "rzn"), ("rnn_tanh", "h"), ("rnn_relu", "h")):
        assert "".join(ops.CELLS[cell]["watched"]) == gates
        x, a = torch.randn(2, 3, reference.GATES[cell] * 4)
        assert len(reference.gates(cell, x, a)) == len(gates)


# -------------------------------------------------------------------------------------------------------- operators


def test_the_operators_say_what_they_return():
    """opcheck of the fake kernels with what is watched."""
    checks = ["test_schema", "test_faketensor"]
    weights = [p.detach() for p in fastrnn.LSTM(3, 4, num_layers=2).parameters()]
    x = torch.randn(5, 2, 3)
    output, _, _, saved = ops.stack("lstm", x, None, None, weights, None, None, None, False, False, 2, 0)
    needs = [True, False, False] + [True] * 8
    arguments = ("lstm", x, None, None, weights, None, None, None, saved, torch.ones_like(output), None, None,
                 False, False, 2, needs, 0, None, None, True)  # fmt: skip
    torch.library.opcheck(torch.ops.fastrnn.stack_backward.default, arguments, test_utils=checks)
    assert ops.stack_backward(*arguments)[-1].shape == (2, 5, ops.watched_width("lstm"))
    one = weights[:4]
    output, *_, tape = ops.layer("lstm", x, None, None, one, None, None, None, False, False, False, True)
    arguments = ("lstm", x, None, None, one, None, None, None, tape, torch.ones_like(output), None, None, None, None,
                 False, False, needs[:7], 0, None, None, True)  # fmt: skip
    torch.library.opcheck(torch.ops.fastrnn.layer_backward.default, arguments, test_utils=checks)
    assert not _C.build_info()["rejected_environment"]


def test_an_empty_batch_has_no_rows():
    layer = fastrnn.GRU(3, 4)
    with fastrnn.probe(layer) as probe:
        layer(torch.randn(5, 0, 3))[0].sum().backward()
    assert probe.trained == 1 and probe.layers() == [] and "no backward pass" in probe.summary()
