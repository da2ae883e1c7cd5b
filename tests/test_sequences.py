"""reset, reset_state, lengths and all_states against a per-row, per-step loop over the plain equations: values and
gradients.

Every combination of lengths, packing, resets, states, directions, layers, projection, layout and dtype, on small odd
sizes; rows past a length hold NaN on the way in. err_torch is the error of the same loop of torch operations in the
same dtype, since torch.nn has none of the three.
"""

import itertools
import random

import fastrnn._C as _C
import numpy as np
import oracle
import pytest
import torch
from conftest import DTYPES, ISAS, SIXTEEN, build, decide_relu, dtype_name, flat
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

CELLS = ["RNN_TANH", "RNN_RELU", "GRU", "LSTM", "LSTM projected"]
LAYOUTS = ["time first", "batch first", "unbatched"]


def configuration(cell, dtype, rows, reset, all_states, directions, layers, layout, number=0):
    """Sizes drawn from the combination itself."""
    r = random.Random(f"{cell}{dtype}{rows}{reset}{all_states}{directions}{layers}{layout}{number}")
    H = r.choice([5, 7, 9, 17])  # in a tensor of one or two elements, err_torch is a matter of luck
    return dict(
        kind=cell.split()[0], dtype=dtype, rows=rows, reset=reset, all_states=all_states, D=directions, L=layers,
        layout=layout, proj=r.randint(3, H - 1) if "projected" in cell else 0, bias=r.random() < 0.7 or "RELU" in cell,
        hx=r.random() < 0.6, H=H, I=r.randint(3, 6), T=r.randint(3, 6),
        B=1 if layout == "unbatched" else r.randint(2, 4),
        isa=r.choice(ISAS), seed=r.randint(0, 1 << 30),
        start=r.choice([None, "every row's", "one for all"]) if reset else None,
    )  # fmt: skip


def describe(c):
    return " ".join(f"{k}={dtype_name(v) if k == 'dtype' else v}" for k, v in c.items())


def make(c):
    torch.manual_seed(c["seed"])
    extra = {"proj_size": c["proj"]} if c["proj"] else {}
    module = build(c["kind"], c["I"], c["H"], num_layers=c["L"], bias=c["bias"], bidirectional=c["D"] == 2,
                   batch_first=c["layout"] == "batch first", dtype=c["dtype"], **extra)  # fmt: skip
    if c["kind"] == "RNN_RELU" and c["dtype"] in SIXTEEN:
        decide_relu(module)
    return module


def draw(c):
    g = torch.Generator().manual_seed(c["seed"])
    K, T, B, P = c["L"] * c["D"], c["T"], c["B"], c["proj"] or c["H"]

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(c["dtype"])

    data = {"x": normal(T, B, c["I"]), "h0": normal(K, B, P), "c0": normal(K, B, c["H"])}
    incoming = {"output": normal(T, B, c["D"] * P), "h_n": normal(K, B, P), "c_n": normal(K, B, c["H"])}
    incoming |= {"h_all": normal(K, T, B, P), "c_all": normal(K, T, B, c["H"])}
    rows = 1 if c["start"] == "one for all" else B
    data |= {"h_start": normal(K, rows, P), "c_start": normal(K, rows, c["H"])}
    if not c["hx"]:
        data["h0"], data["c0"] = data["h0"] * 0, data["c0"] * 0
    least = 1 if c["rows"] == "packed" else 0
    lengths = torch.randint(least, T + 1, (B,), generator=g)
    if c["rows"] == "packed":
        lengths[torch.randint(0, B, (1,), generator=g)] = T  # a PackedSequence is as long as its longest row
    reset = torch.rand(T, B, generator=g) < 0.4
    return data, incoming, None if c["rows"] == "dense" else lengths, reset if c["reset"] else None


def gradients(values, incoming, leaves, names):
    values = {k: v for k, v in values.items() if v is not None}
    outs = {k: v for k, v in values.items() if v.requires_grad}  # all zeros when every row is empty
    received = [incoming[k].to(v) for k, v in outs.items()]
    grads = torch.autograd.grad(list(outs.values()), list(leaves), received, allow_unused=True)
    return values | dict(zip(names, grads))


def run_ours(module, c, data, incoming, lengths, reset, device="cpu"):
    _C.set_isa(c["isa"])
    given = (data[k].to(device, copy=True) for k in ("x", "h0", "c0", "h_start", "c_start"))
    x, h0, c0, *starts = (v.requires_grad_() for v in given)
    inside = torch.ones(c["T"], c["B"], dtype=torch.bool)
    if lengths is not None:
        inside = torch.arange(c["T"])[:, None] < lengths
    inside, reset = inside.to(device), None if reset is None else reset.to(device)
    if c["rows"] == "lengths":
        with torch.no_grad():
            x[~inside] = torch.nan
    first = c["layout"] == "batch first"
    bare = c["layout"] == "unbatched" and c["rows"] != "packed"
    shown, hidden, options = x, (h0, c0) if c["kind"] == "LSTM" else h0, {}
    if bare:
        shown = x[:, 0]
        hidden = tuple(v[:, 0] for v in hidden) if c["kind"] == "LSTM" else hidden[:, 0]
    elif first:
        shown = x.transpose(0, 1)
    if c["rows"] == "packed":
        shown = pack_padded_sequence(shown, lengths, first, enforce_sorted=False)
    elif c["rows"] == "lengths":
        dtype = torch.int32 if c["seed"] % 2 else torch.int64
        shown_lengths = lengths.to(device if c["seed"] & 2 else "cpu", dtype)
        options["lengths"] = shown_lengths[0] if bare else shown_lengths
    if reset is not None:
        options["reset"] = reset[:, 0] if bare else reset.t() if first and c["rows"] != "packed" else reset
    if c["start"]:
        shaped = [v[:, 0] for v in starts] if bare else starts
        options["reset_state"] = tuple(shaped) if c["kind"] == "LSTM" else shaped[0]
    if c["all_states"]:
        options["all_states"] = True
    output, hidden, *states = module(shown, hidden if c["hx"] else None, **options)
    assert len(states) == c["all_states"]
    if c["rows"] == "packed":
        assert isinstance(output, PackedSequence)
        output, got = pad_packed_sequence(output, total_length=c["T"])
        assert got.equal(lengths)
    elif bare:
        output = output[:, None]
    elif first:
        output = output.transpose(0, 1)
    values = {"output": output} | dict(zip(["h_n", "c_n"], flat(hidden)))
    if states:
        assert isinstance(states[0], tuple) == (c["kind"] == "LSTM")
        values |= dict(zip(["h_all", "c_all"], flat(states[0])))
    if bare:
        values |= {k: v.unsqueeze(1) if k[1:] == "_n" else v.unsqueeze(2) for k, v in values.items() if k != "output"}
    for name, v in values.items():
        if name in ("output", "h_all", "c_all"):
            rows = v if name == "output" else v.movedim((1, 2), (0, 1))
            assert bool((rows[~inside] == 0).all()), f"{name} is not zero past the length: {describe(c)}"
    names = ["dx", "dh0", "dc0", "dh_start", "dc_start"] + ["d " + n for n, _ in module.named_parameters()]
    result = gradients(values, incoming, [x, h0, c0, *starts, *module.parameters()], names)
    assert bool((result["dx"][~inside] == 0).all()), f"dx is not exactly zero past the length: {describe(c)}"
    return result


def run_oracle(module, c, data, incoming, lengths, reset, compute):
    given = ("x", "h0", "c0", "h_start", "c_start")
    x, h0, c0, *starts = (data[k].to(compute).clone().requires_grad_() for k in given)
    every = [v.expand(-1, c["B"], -1) for v in starts] if c["start"] else None
    weights = oracle.weights_of(module, lambda p: p.detach().to(compute).requires_grad_())
    values = oracle.run(
        c["kind"], x, h0, c0, weights, layers=c["L"], directions=c["D"], reset=reset, lengths=lengths, starts=every
    )
    values = dict(zip(["output", "h_n", "c_n", "h_all", "c_all"], values))
    if not c["all_states"]:
        values["h_all"] = values["c_all"] = None
    leaves = [w for ws in weights for w in ws if w is not None]
    names = ["dx", "dh0", "dc0", "dh_start", "dc_start"] + ["d " + n for n, _ in module.named_parameters()]
    result = gradients(values, incoming, [x, h0, c0, *starts, *leaves], names)
    for name, leaf in zip(names, [x, h0, c0, *starts, *leaves]):
        if result[name] is None:  # autograd saw no path: every step was reset, or every row is empty
            result[name] = torch.zeros_like(leaf)
    if not c["hx"]:
        result["dh0"] = None
    if not c["hx"] or c["kind"] != "LSTM":
        result["dc0"] = None
    if not c["start"]:
        result["dh_start"] = None
    if not c["start"] or c["kind"] != "LSTM":
        result["dc_start"] = None
    return result


def run_exact(module, c, data, incoming, lengths, reset):
    weights = oracle.weights_of(module, lambda p: p.detach().numpy())
    d = {k: v.numpy() for k, v in {**data, **{"d" + k: v for k, v in incoming.items()}}.items()}
    values = oracle.exact(
        c["kind"], d["x"], d["h0"], d["c0"], weights, c["D"], d["doutput"], d["dh_n"], d["dc_n"],
        lengths=lengths, reset=None if reset is None else reset.numpy(),
        starts=(d["h_start"], d["c_start"]) if c["start"] else None,
        **(dict(dh_all=d["dh_all"], dc_all=d["dc_all"]) if c["all_states"] else {}),
    )  # fmt: skip
    lstm = c["kind"] == "LSTM"
    names = ["output", "h_n", "c_n", "h_all", "c_all", "dx", "dh0", "dc0", "dh_start", "dc_start"]
    result = dict(zip(names, values))
    gone = ([] if lstm else ["c_n", "c_all"]) + ([] if c["all_states"] else ["h_all", "c_all"])
    result = {k: v for k, v in result.items() if k not in gone}
    if not c["hx"] or not lstm:
        result["dc0"] = None
    if not c["hx"]:
        result["dh0"] = None
    if c["start"] == "one for all":
        result |= {k: result[k].sum(1, keepdims=True) for k in ("dh_start", "dc_start")}
    if not c["start"]:
        result["dh_start"] = None
    if not c["start"] or not lstm:
        result["dc_start"] = None
    grads = [g for ws in values[10] for g in ws if g is not None]
    return result | {"d " + n: g for (n, _), g in zip(module.named_parameters(), grads, strict=True)}


def three(c):
    """Ours, the loop's in the same dtype, and the truth."""
    module, drawn = make(c), draw(c)
    mine = run_ours(module, c, *drawn)
    theirs = run_oracle(module, c, *drawn, c["dtype"])
    exactly = c["dtype"] == torch.float64
    truth = run_exact(module, c, *drawn) if exactly else run_oracle(module, c, *drawn, torch.float64)
    return mine, theirs, truth


def check(rule, c):
    rule.check(lambda n: three(c | {"seed": c["seed"] + 1_000_003 * n}), c["dtype"], describe(c))


@pytest.mark.parametrize("rows", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("cell", CELLS)
def test_every_combination(cell, dtype, rows, rule):
    layouts = LAYOUTS[:2] if rows == "packed" else LAYOUTS
    for number, options in enumerate(itertools.product([False, True], [False, True], [1, 2], [1, 2])):
        if rows == "dense" and not options[0] and not options[1]:
            continue  # plain torch.nn: test_accuracy.py
        # The layout is Python's business, the same for every dtype: all for float32, one in turn for the others.
        for layout in layouts if dtype == torch.float32 else [layouts[number % len(layouts)]]:
            check(rule, configuration(cell, dtype, rows, *options, layout))
    assert rule.configurations >= (24 if dtype == torch.float32 else 12)


@pytest.mark.parametrize("cell", CELLS)
def test_larger_sizes_on_every_tier(cell, rule, isa):
    """Sizes that fill vectors, tiles and several slices, with everything on at once."""
    for rows, (H, sizes) in itertools.product(
        ["dense", "lengths", "packed"], [(18, (9, 3)), (65, (4, 9)), (128, (3, 2))]
    ):
        c = configuration(cell, torch.float32, rows, True, True, 2, 2, "time first")
        c |= dict(H=H, I=H // 2 + 1, T=sizes[0], B=sizes[1], proj=H // 3 if c["proj"] else 0, isa=isa)
        check(rule, c)


def test_the_two_oracles_agree(rule):
    """The truth of float64 tests has hand-written gradients: they are autograd's, to float64 rounding."""
    for number, cell in itertools.product(range(4), CELLS):
        c = configuration(cell, torch.float64, "lengths", True, True, 2, 2, "time first", number) | {"isa": ISAS[0]}
        module, drawn = make(c), draw(c)
        loop = run_oracle(module, c, *drawn, torch.float64)
        hand = run_exact(module, c, *drawn)
        assert loop.keys() == hand.keys()
        for name, want in hand.items():
            if want is not None:
                difference = np.sqrt(((loop[name].detach().numpy() - want) ** 2).sum())
                assert difference <= 1e-14 * max(1, np.sqrt((want**2).sum())), (name, describe(c))


# What the options mean, in terms of each other.


def small(kind="LSTM", **kwargs):
    return build(kind, 3, 5, **kwargs), torch.randn(6, 4, 3)


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.parametrize("directions", [1, 2])
def test_lengths_is_packing(kind, directions):
    """Bit for bit what pack_padded_sequence and total_length give on our own module."""
    rnn, x = small(kind, num_layers=2, bidirectional=directions == 2)
    lengths = torch.tensor([2, 6, 1, 4])
    output, hidden = rnn(x, lengths=lengths)
    packed, packed_hidden = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert output.equal(pad_packed_sequence(packed, total_length=6)[0])
    assert all(a.equal(b) for a, b in zip(flat(hidden), flat(packed_hidden)))


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
def test_reset_is_separate_calls(kind):
    rnn, x = small(kind, num_layers=2)
    reset = torch.zeros(6, 4, dtype=torch.bool)
    reset[3] = True
    output, hidden = rnn(x, reset=reset)
    first, _ = rnn(x[:3])
    second, second_hidden = rnn(x[3:])
    assert output.equal(torch.cat([first, second]))
    assert all(a.equal(b) for a, b in zip(flat(hidden), flat(second_hidden)))


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
def test_reset_cuts_both_directions_between_the_same_two_steps(kind):
    rnn, x = small(kind, num_layers=2, bidirectional=True)
    reset = torch.zeros(6, 4, dtype=torch.bool)
    reset[4] = True
    whole, _ = rnn(x, reset=reset)
    assert whole.equal(torch.cat([rnn(x[:4])[0], rnn(x[4:])[0]]))


def test_reset_at_zero_discards_hx_of_the_forward_direction_only():
    rnn, x = small("GRU", bidirectional=True)
    h0 = torch.randn(2, 4, 5)
    reset = torch.zeros(6, 4, dtype=torch.bool)
    reset[0] = True
    with_reset, h_n = rnn(x, h0, reset=reset)
    half = torch.stack([torch.zeros(4, 5), h0[1]])
    expected, expected_h = rnn(x, half)
    assert with_reset.equal(expected) and h_n.equal(expected_h)


def test_no_reset_and_full_lengths_change_nothing():
    rnn, x = small("LSTM", num_layers=2, bidirectional=True)
    plain, (h, c) = rnn(x)
    for options in (
        {"reset": torch.zeros(6, 4, dtype=torch.bool)},
        {"lengths": torch.full((4,), 6)},
        {"reset": torch.zeros(6, 4, dtype=torch.bool), "lengths": torch.full((4,), 6, dtype=torch.int32)},
        {"all_states": True},
        {"reset": None, "lengths": None, "all_states": False},
    ):
        output, (h2, c2) = rnn(x, **options)[:2]
        assert output.equal(plain) and h2.equal(h) and c2.equal(c)


def test_all_states_hold_the_output_and_the_final_states():
    rnn, x = small("LSTM", num_layers=3, bidirectional=True)
    rnn.dropout = 0.5  # states are taken before dropout
    output, (h_n, c_n), (h_all, c_all) = rnn(x, all_states=True)
    assert h_all.shape == c_all.shape == (6, 6, 4, 5)
    assert output.equal(torch.cat([h_all[4], h_all[5]], -1))
    for k in range(6):
        last = 5 if k % 2 == 0 else 0
        assert h_n[k].equal(h_all[k, last]) and c_n[k].equal(c_all[k, last])


def test_a_row_of_length_zero_returns_its_hx_and_its_gradient():
    for kind in ("RNN_TANH", "GRU", "LSTM"):
        rnn, x = small(kind, bidirectional=True, num_layers=2)
        h0, c0 = (torch.randn(4, 4, 5, requires_grad=True) for _ in range(2))
        reset = torch.ones(6, 4, dtype=torch.bool)  # entries at or past a length are ignored, the first one too
        hx = (h0, c0) if kind == "LSTM" else h0
        output, hidden = rnn(x, hx, lengths=torch.tensor([0, 6, 3, 0]), reset=reset)
        assert (output[:, [0, 3]] == 0).all()
        for given, got in zip((h0, c0), flat(hidden)):
            assert got[:, [0, 3]].equal(given[:, [0, 3]])
            incoming = torch.randn_like(got)
            (grad,) = torch.autograd.grad(got, given, incoming, retain_graph=True)
            assert grad[:, [0, 3]].equal(incoming[:, [0, 3]])


def test_all_rows_of_length_zero():
    rnn, x = small("GRU")
    x = torch.full_like(x, torch.nan).requires_grad_()
    h0 = torch.randn(1, 4, 5, requires_grad=True)
    output, h_n, states = rnn(x, h0, lengths=torch.zeros(4, dtype=torch.int64), all_states=True)
    assert (output == 0).all() and (states == 0).all() and h_n.equal(h0)
    (output.sum() + h_n.sum() + states.sum()).backward()
    assert (x.grad == 0).all() and (h0.grad == 1).all()
    assert all(p.grad is None or (p.grad == 0).all() for p in rnn.parameters())


@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_nan_past_the_length_does_no_harm(kind, dtype, isa):
    """Same bits as with zeros there: nothing past a length is read, forward or backward."""
    rnn = build(kind, 3, 5, num_layers=2, bidirectional=True, dtype=dtype)
    x, lengths = torch.randn(6, 4, 3, dtype=dtype), torch.tensor([6, 2, 0, 5])
    outside = torch.arange(6)[:, None] >= lengths
    results = []
    for filling in (0.0, torch.nan, torch.inf):
        given = x.clone()
        given[outside] = filling
        given.requires_grad_()
        output, hidden, states = rnn(given, lengths=lengths, all_states=True)
        loss = sum(v.float().square().sum() for v in [output, *flat(hidden), *flat(states)])
        grads = torch.autograd.grad(loss, [given, *rnn.parameters()])
        assert (grads[0][outside] == 0).all()
        results.append([output, *flat(hidden), *flat(states), *grads])
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other))


def test_no_gradient_crosses_a_reset():
    for kind in ("RNN_TANH", "GRU", "LSTM"):
        rnn, x = small(kind, bidirectional=True)
        x.requires_grad_()
        reset = torch.zeros(6, 4, dtype=torch.bool)
        reset[3, 1] = True
        output, _ = rnn(x, reset=reset)
        (grad,) = torch.autograd.grad(output[:3, 1].sum(), x)
        assert (grad[3:] == 0).all() and (grad[:, [0, 2, 3]] == 0).all() and (grad[:3, 1] != 0).any()
        (grad,) = torch.autograd.grad(rnn(x, reset=reset)[0][3:, 1].sum(), x)
        assert (grad[:3] == 0).all() and (grad[3:, 1] != 0).any()


def test_strides_of_the_options_do_not_matter():
    rnn, x = small("LSTM", bidirectional=True)
    reset, lengths = torch.rand(6, 4) < 0.3, torch.tensor([5, 6, 0, 2])
    plain, _ = rnn(x, reset=reset, lengths=lengths)
    strided = torch.zeros(8, 12, dtype=torch.bool)
    strided[::2, ::2][:, :6] = reset.t()
    wide = torch.zeros(8, dtype=torch.int64)
    wide[::2] = lengths
    other, _ = rnn(x, reset=strided[::2, ::2][:, :6].t(), lengths=wide[::2])
    assert other.equal(plain)
    row = torch.tensor([[False], [True], [False], [False], [True], [False]])
    assert rnn(x, reset=row.expand(6, 4))[0].equal(rnn(x, reset=row.repeat(1, 4))[0])


def test_lengths_are_not_remembered():
    """Changing the caller's tensors after the call does not change backward."""
    rnn, x = small("GRU")
    x.requires_grad_()
    reset, lengths = torch.rand(6, 4) < 0.3, torch.tensor([5, 6, 1, 2])
    expected = torch.autograd.grad(rnn(x, reset=reset, lengths=lengths)[0].sum(), x)[0]
    output, _ = rnn(x, reset=reset.clone(), lengths=lengths)
    assert torch.autograd.grad(output.sum(), x)[0].equal(expected)


BAD = [
    ("GRU", dict(lengths=[1, 2, 3, 4]), TypeError, "lengths"),
    ("GRU", dict(lengths=torch.tensor([1.0, 2, 3, 4])), (TypeError, ValueError), "lengths"),
    ("GRU", dict(lengths=torch.tensor([True] * 4)), (TypeError, ValueError), "lengths"),
    ("GRU", dict(lengths=torch.tensor([1, 2, 3])), ValueError, "lengths"),
    ("GRU", dict(lengths=torch.tensor([[1, 2, 3, 4]])), ValueError, "lengths"),
    ("GRU", dict(lengths=torch.tensor(3)), ValueError, "lengths"),
    ("GRU", dict(lengths=torch.tensor([1, 2, 3, 7])), ValueError, "lengths"),
    ("GRU", dict(lengths=torch.tensor([1, -1, 3, 6])), ValueError, "lengths"),
    ("LSTM", dict(reset=[[True] * 4] * 6), TypeError, "reset"),
    ("LSTM", dict(reset=torch.zeros(6, 4)), (TypeError, ValueError), "reset"),
    ("LSTM", dict(reset=torch.zeros(6, 4, dtype=torch.int64)), (TypeError, ValueError), "reset"),
    ("LSTM", dict(reset=torch.zeros(4, 6, dtype=torch.bool)), ValueError, "reset"),
    ("LSTM", dict(reset=torch.zeros(6, dtype=torch.bool)), ValueError, "reset"),
    ("LSTM", dict(reset=torch.zeros(6, 4, 1, dtype=torch.bool)), ValueError, "reset"),
]


@pytest.mark.parametrize("kind, options, error, name", BAD)
def test_bad_options_name_the_argument(kind, options, error, name):
    rnn, x = small(kind)
    with pytest.raises(error, match=name) as caught:
        rnn(x, **options)
    assert "xpected" in str(caught.value) and "got" in str(caught.value), str(caught.value)


def test_lengths_with_a_packed_sequence_is_an_error():
    rnn, x = small("GRU")
    packed = pack_padded_sequence(x, [6, 4, 2, 1])
    with pytest.raises((ValueError, TypeError), match="lengths"):
        rnn(packed, lengths=torch.tensor([6, 4, 2, 1]))


def test_options_are_keyword_only():
    rnn, x = small("GRU")
    with pytest.raises(TypeError):
        rnn(x, None, torch.zeros(6, 4, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_packed_reset_is_in_the_callers_row_order(shape):
    rnn, x = small("GRU")
    packed = pack_padded_sequence(x, [2, 6, 1, 4], enforce_sorted=False)
    if shape == (4, 6):
        with pytest.raises(ValueError, match="reset"):
            rnn(packed, reset=torch.zeros(shape, dtype=torch.bool))
        return
    reset = torch.rand(shape) < 0.4
    output, h_n = rnn(packed, reset=reset)
    expected, expected_h = rnn(x, lengths=torch.tensor([2, 6, 1, 4]), reset=reset)
    assert pad_packed_sequence(output)[0].equal(expected) and h_n.equal(expected_h)


def test_a_hand_built_packed_sequence_has_no_permutation():
    rnn, x = small("LSTM", bidirectional=True)
    packed = pack_padded_sequence(x, [6, 4, 4, 1])
    bare = PackedSequence(packed.data, packed.batch_sizes)
    assert bare.sorted_indices is None
    reset = torch.rand(6, 4) < 0.4
    output, hidden, states = rnn(bare, reset=reset, all_states=True)
    expected, expected_hidden, expected_states = rnn(
        x, lengths=torch.tensor([6, 4, 4, 1]), reset=reset, all_states=True
    )
    assert pad_packed_sequence(output)[0].equal(expected)
    assert all(a.equal(b) for a, b in zip(hidden + states, expected_hidden + expected_states))


def test_masked_dropout_between_layers_keeps_the_cut():
    """With dropout on, a reset still separates: the second half does not depend on the first half's input."""
    rnn = fastrnn.GRU(3, 5, num_layers=2, dropout=0.5)
    x, reset = torch.randn(6, 4, 3), torch.zeros(6, 4, dtype=torch.bool)
    reset[3] = True
    other = torch.cat([torch.randn(3, 4, 3), x[3:]])
    torch.manual_seed(3)
    a, _ = rnn(x, reset=reset)
    torch.manual_seed(3)
    b, _ = rnn(other, reset=reset)
    assert a[3:].equal(b[3:]) and not a[:3].equal(b[:3])
