"""The operators as operators: schema, fake kernels, strides, errors, and the count of their products."""

import itertools

import pytest
import torch
from conftest import DTYPES, dtype_name, normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import ops

LAYER, BACKWARD = torch.ops.fastrnn.layer.default, torch.ops.fastrnn.layer_backward.default
STEP, STACK = torch.ops.fastrnn.step.default, torch.ops.fastrnn.stack.default
STACK_BACKWARD = torch.ops.fastrnn.stack_backward.default
OPERANDS = torch.ops.fastrnn.layer_operands.default
CELLS = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
OPTIONS = ["plain", "everything", "packed", "batch major", "empty batch", "no bias"]
FIELDS = ["cell", "input", "h0", "c0", "weights", "batch_sizes", "lengths", "reset"]
FIELDS += ["bidirectional", "batch_major", "all_states", "save"]


def arguments(cell, dtype=torch.float32, option="plain", T=4, B=3, I=2, H=5, proj=0, D=2):
    """The arguments of `layer`, by name."""
    G, P = CELLS[cell], proj or H
    B = 0 if option == "empty batch" else B
    shapes = [(G * H, I), (G * H, P)] + ([] if option == "no bias" else [(G * H,), (G * H,)])
    shapes += [(P, H)] if proj else []
    weights = [0.3 * normal(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes * D)]
    a = dict.fromkeys(FIELDS) | dict(cell=cell, weights=weights, bidirectional=D == 2, save=True)
    a |= dict(batch_major=option == "batch major", all_states=option in ("everything", "packed"))
    a["input"] = normal(T, B, I, dtype=dtype, seed=20)
    a["h0"] = normal(D, B, P, dtype=dtype, seed=21)
    a["c0"] = normal(D, B, H, dtype=dtype, seed=22) if cell == "lstm" else None
    if option == "everything":
        a["lengths"] = torch.tensor([4, 0, 2])
        a["reset"] = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    if option == "packed":
        a["batch_sizes"] = torch.tensor([3, 2, 2, 1])
        a["input"] = normal(8, I, dtype=dtype, seed=20)
    return a


def backward_arguments(a, missing=()):
    """The arguments of `layer_backward` for random incoming gradients."""
    output, h_n, c_n, h_all, c_all, tape = LAYER(*a.values())
    lstm = a["cell"] == "lstm"
    grads = dict(d_output=output, d_h_n=h_n, d_c_n=c_n if lstm else None)
    grads |= dict(d_h_all=h_all if a["all_states"] else None, d_c_all=c_all if lstm and a["all_states"] else None)
    grads = {
        k: None if v is None or k in missing else normal(*v.shape, dtype=v.dtype, seed=9) for k, v in grads.items()
    }
    b = {k: a[k] for k in FIELDS[:8]} | dict(tape=tape) | grads
    b |= {k: a[k] for k in ("bidirectional", "batch_major")}
    return b | dict(needs=[True, True, lstm] + [True] * len(a["weights"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_weights_that_begin_anywhere(dtype, isa):
    """Views into one buffer, an odd number of values from its start: not aligned to more than a value."""
    for I in (2, 3, 6):
        a = arguments("gru", dtype, I=I, H=18)
        expected = LAYER(*a.values())
        views = []
        for w in a["weights"]:
            buffer = torch.empty(w.numel() + 1, dtype=dtype)
            views.append(buffer[1:].view(w.shape).copy_(w))
        for mine, other in zip(LAYER(*(a | {"weights": views}).values())[:2], expected):
            assert torch.equal(mine, other)


# All dtypes with plain calls; with the options, which would take minutes, one dtype that is its own compute dtype and
# one that is not.
@pytest.mark.parametrize(
    ("option", "dtype"),
    [(o, d) for o in OPTIONS for d in (DTYPES if o == "plain" else (torch.float32, torch.bfloat16))],
    ids=lambda v: v if isinstance(v, str) else dtype_name(v),
)
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_opcheck(cell, option, dtype):
    cell, *projected = cell.split()
    a = arguments(cell, dtype, option, proj=2 if projected else 0)
    for all_states, save in itertools.product([False, True], [False, True]) if option == "plain" else [(None, None)]:
        if save is not None:
            a |= dict(all_states=all_states, save=save)
        opcheck(LAYER, tuple(a.values()))
    a["save"] = True
    for missing in [(), ("d_h_n", "d_c_n"), ("d_output",)]:
        opcheck(BACKWARD, tuple(backward_arguments(a, missing).values()))
    b = backward_arguments(a)
    opcheck(OPERANDS, tuple((b | dict(needs=b["needs"][:3])).values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_stack_is_its_layers(cell, option, dtype):
    """Forward and back, bit for bit, whatever is saved and wanted."""
    cell, *projected = cell.split()
    lstm, proj = cell == "lstm", 2 if projected else 0
    first = arguments(cell, dtype, option, proj=proj) | dict(all_states=False)
    second = arguments(cell, dtype, option, I=2 * (proj or 5), proj=proj) | dict(all_states=False)
    first["batch_major"] = False  # the layout of the stack's input and output alone
    output, *states = LAYER(*first.values())[:3]
    second["input"] = output
    expected, *more = LAYER(*second.values())[:3]
    both = [None if first[k] is None else torch.cat([first[k], second[k]]) for k in ("h0", "c0")]
    weights = first["weights"] + second["weights"]
    given = (cell, first["input"], *both, weights, *(first[k] for k in FIELDS[5:8]))
    layout = (True, second["batch_major"], 2)
    saved = {}
    for saved_from in (0, 1, 2):
        found = STACK(*given, *layout, saved_from)
        assert found[0].equal(expected)
        assert found[0].stride() == expected.stride()
        assert found[1].equal(torch.cat([states[0], more[0]]))
        assert found[2].equal(torch.cat([states[1], more[1]]))
        saved[saved_from] = found[3]
        if dtype == torch.float32:
            opcheck(STACK, (*given, *layout, saved_from))

    upper = backward_arguments(second)
    lower = backward_arguments(first)
    incoming = [upper["d_output"]] + [
        torch.cat([lower[k], upper[k]]) if upper[k] is not None else None for k in ("d_h_n", "d_c_n")
    ]
    of_upper = BACKWARD(*(upper | dict(batch_major=False)).values())
    of_lower = BACKWARD(*(lower | dict(d_output=of_upper[0], batch_major=layout[1])).values())
    states = [torch.cat(pair) for pair in zip(of_lower[1:3], of_upper[1:3])]
    gradients = [of_lower[0], *states, *of_lower[3:], *of_upper[3:]]
    n, none, every = len(weights), [False] * 3, [True, True, lstm]
    for saved_from, needs in (
        (0, every + [True] * n),
        (0, none + [True] + [False] * (n - 1)),
        (0, [True, False, False] + [False] * n),
        (0, [False, True, False] + [False] * n),
        (0, none + [False] * (n // 2) + [True] * (n // 2)),
        (1, none + [False] * (n // 2) + [True] * (n // 2)),
        (1, none + [False] * (n - 1) + [True]),
    ):
        b = (*given, saved[saved_from], *incoming, *layout, needs)
        found = STACK_BACKWARD(*b)
        for mine, gradient, needed in zip(found, gradients, needs, strict=True):
            assert mine.equal(gradient) if needed else mine.numel() == 0
        if needs[0]:
            assert found[0].stride() == of_lower[0].stride()
        if dtype == torch.float32 and sum(needs) > 1:
            opcheck(STACK_BACKWARD, b)
    with pytest.raises(RuntimeError, match="needs: expected nothing for the layers below 1"):
        STACK_BACKWARD(*given, saved[1], *incoming, *layout, every + [True] * n)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_operands_are_what_gradients_are_products_of(cell, option, dtype, isa):
    cell, *projected = cell.split()
    lstm, a = cell == "lstm", arguments(cell, dtype, option, H=18, proj=7 if projected else 0)
    b = backward_arguments(a)
    expected = BACKWARD(*b.values())
    given = (*(b | dict(needs=b["needs"][:3])).values(),)
    *gradients, dgates, h_prev = OPERANDS(*given)[:5]
    projection = OPERANDS(*given)[5:]
    # Products of pairs of bfloat16 may be summed in another way, or of other numbers, than those of single values.
    rounding = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]

    def close(found, wanted):
        assert found.shape == wanted.shape
        assert (found - wanted).double().norm() <= rounding * wanted.double().norm()

    for found, wanted in zip(gradients, expected[: 2 + lstm]):
        close(found, wanted)
    D, traits, per = 2, ops.CELLS[cell], len(a["weights"]) // 2
    rows = a["input"].shape[:-1]
    assert dgates.shape == (D, *rows, traits["slots"] * 18) and h_prev.shape == (D, *rows, 7 if projected else 18)
    assert len(projection) == 2 * len(projected)
    if a["lengths"] is not None:
        past = torch.arange(rows[0])[:, None] >= a["lengths"]
        assert all(not t[:, past].any() for t in (dgates, h_prev, *projection))
    x = a["input"].to(dgates.dtype)
    for d in range(D):
        slots = dgates[d].unflatten(-1, (-1, 18))
        of_x = slots[..., traits["x_first"] : traits["x_first"] + traits["gates"], :].flatten(-2)
        of_h = torch.empty_like(of_x).unflatten(-1, (-1, 18))
        for slot, gate in enumerate(traits["hidden_gate"]):
            of_h[..., gate, :] = slots[..., slot, :]
        of_h = of_h.flatten(-2)
        found = [torch.einsum("...g,...i->gi", of_x, x), torch.einsum("...g,...p->gp", of_h, h_prev[d])]
        if per > 3:
            found += [t.flatten(0, -2).sum(0) for t in (of_x, of_h)]
        if projected:
            found.append(torch.einsum("...p,...h->ph", projection[0][d], projection[1][d]))
        for mine, wanted in zip(found, expected[3 + d * per : 3 + (d + 1) * per], strict=True):
            close(mine, wanted)


def test_operands_name_what_is_wrong():
    b = backward_arguments(arguments("gru"))
    for change, message in [
        (dict(needs=[True]), "needs: expected one value for input, h0 and c0 each, and perhaps h_reset and .*, got 1"),
        (dict(input=b["input"][0]), r"input: expected 3 dimensions \(T, B, input_size\), got shape \(3, 2\)"),
        (dict(tape=b["tape"][:, 1:]), r"tape: expected shape \(D, N, tape width\)"),
        (
            dict(needs=[True, True, True]),
            "c0, c_reset, d_c_n, d_c_all and their needs: expected None and False for cell",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            OPERANDS(*(b | dict(needs=b["needs"][:3]) | change).values())


def test_stack_names_what_is_wrong():
    a = arguments("gru")
    common = [a[k] for k in FIELDS[5:10]]
    weights = a["weights"]
    for arguments_, message in (
        ((a["input"], None, None, weights, *common, 3, 3), r"num_layers: expected a number of layers that the 8 weigh"),
        ((a["input"], None, None, weights, *common, 0, 0), r"num_layers: expected .* got 0"),
        ((a["input"], a["h0"], None, weights * 2, *common, 2, 2), r"h0: expected shape \(L\*D, B, P\) = \(4, 3, 5\)"),
        ((a["input"], None, None, weights * 2, *common, 2, 2), r"w_ih\): expected shape \(3\*H, I\) = \(15, 10\)"),
        ((a["input"], None, a["h0"], weights, *common, 1, 1), r"c0: expected None for cell 'gru', got a tensor"),
        ((a["input"], None, None, weights, *common, 1, 2), r"saved_from: expected 0 to num_layers = 1, got 2"),
        ((a["input"], None, None, weights, *common, 1, -1), r"saved_from: expected 0 to num_layers = 1, got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            STACK("gru", *arguments_)


def test_stack_backward_names_what_is_wrong():
    lower, upper = arguments("gru"), arguments("gru", I=10)
    weights, ragged = lower["weights"] + upper["weights"], [lower[k] for k in FIELDS[5:8]]
    given = dict(cell="gru", input=lower["input"], h0=None, c0=None, weights=weights)
    given |= dict(zip(FIELDS[5:8], ragged))
    output, h_n, _c_n, saved = STACK(*given.values(), True, False, 2, 0)
    given |= dict(saved=saved, d_output=output, d_h_n=h_n, d_c_n=None, bidirectional=True, batch_major=False)
    given |= dict(num_layers=2, needs=[True, False, False] + [True] * len(weights))
    assert len(STACK_BACKWARD(*given.values())) == 3 + len(weights)
    tape, second, inner = saved
    for name, value, message in (
        ("saved", [tape] * 5, r"saved: expected what stack returned for 2 layers, got 5 tensors"),
        ("saved", [tape], r"saved: expected what stack returned for 2 layers, got 1 tensors"),
        ("saved", [tape] * 4, r"saved: expected what stack returned for 2 layers, got 4 tensors"),
        ("saved", [], r"needs: expected nothing for the layers below 2"),
        ("saved", [tape, second[:, 1:], inner], r"saved \(tape\): expected shape \(D, N, tape width\)"),
        ("saved", [tape, second, inner[1:]], r"saved \(tape\): expected shape"),
        ("saved", [tape, second, inner[..., 1:]], r"saved: expected an input of layer 1 that fits its weights"),
        ("d_output", output[1:], r"d_output: expected shape"),
        ("d_h_n", h_n[1:], r"d_h_n: expected shape \(L\*D, B, P\) = \(4, 3, 5\)"),
        ("d_c_n", h_n, r"d_c_n.*: expected None"),
        ("num_layers", 3, r"num_layers: expected a number of layers that the 16 weights"),
        ("num_layers", 0, r"num_layers: expected .* got 0"),
        ("needs", [True], r"needs: expected one value for"),
        ("input", lower["input"][0], r"input: expected 3 dimensions"),
        ("input", lower["input"][1:], r"saved: expected the inputs of all layers to have T"),
    ):
        with pytest.raises(RuntimeError, match=message):
            STACK_BACKWARD(*(given | {name: value}).values())


def step_arguments(cell, dtype=torch.float32, hx=True, proj=0, B=3, I=7, H=37):
    """The arguments of `step`, and of `layer` for the same."""
    a = arguments(cell, dtype, T=1, B=B, I=I, H=H, proj=proj, D=1)
    if not hx:
        a |= dict(h0=None, c0=None)
    states = [None if a[k] is None else a[k][0] for k in ("h0", "c0")]
    return [cell, a["input"][0], *states, a["weights"]], a


@pytest.mark.parametrize("B", [1, 4, 5, 40])
@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_step_is_a_layer_of_one_step(cell, dtype, hx, B):
    cell, *projected = cell.split()
    step, a = step_arguments(cell, dtype, hx, proj=5 if projected else 0, B=B)
    _, h_n, c_n, _, _, tape = LAYER(*a.values())
    for save in (True, False):
        h, c, own_tape = STEP(*step, save)
        assert h.equal(h_n[0])
        assert c.equal(c_n[0]) if cell == "lstm" else c.shape == (0,)
        assert own_tape.shape == (tape.shape if save else (0,))
    if B == 4:
        opcheck(STEP, (*step, True))
        opcheck(STEP, (*step, False))


@pytest.mark.parametrize("B", [1, 5, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_backward_of_a_step_is_that_of_a_layer(cell, dtype, B):
    cell, *projected = cell.split()
    step, a = step_arguments(cell, dtype, proj=5 if projected else 0, B=B)
    b = backward_arguments(a, ("d_output",))
    expected = BACKWARD(*b.values())
    flat = b | dict(zip(FIELDS[:5], step))
    flat |= {k: None if b[k] is None else b[k][0] for k in ("d_h_n", "d_c_n")}
    found = BACKWARD(*flat.values())
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.equal(other[0] if i < 3 and other.numel() else other), i
    opcheck(BACKWARD, tuple(flat.values()))
    with pytest.raises(RuntimeError, match=r"input: expected 3 dimensions .* or for one step .* got shape"):
        BACKWARD(*(flat | dict(d_output=b["d_h_n"])).values())
    with pytest.raises(RuntimeError, match=r"d_h_n: expected shape \(B, P\)"):
        BACKWARD(*(flat | dict(d_h_n=b["d_h_n"])).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(7)}, r"input: expected 2 dimensions \(B, input_size\), got shape \(7,\)"),
        ({2: torch.zeros(2, 37)}, r"h0: expected shape \(B, P\) = \(3, 37\), got \(2, 37\)"),
        ({3: torch.zeros(3, 36)}, r"c0: expected shape \(B, H\) = \(3, 37\), got \(3, 36\)"),
        ({0: "gru"}, r"weights\[1\] \(w_hh\): expected shape"),
        ({4: [torch.zeros(148, 7)]}, r"weights: expected 2 to 5 tensors for each of 1 direction\(s\), got 1"),
    ],
)
def test_step_names_what_is_wrong(change, message):
    step, _ = step_arguments("lstm")
    for place, value in change.items():
        step[place] = value
    with pytest.raises(RuntimeError, match=message):
        STEP(*step, False)


def same_layout(fake, real):
    assert len(fake) == len(real)
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device)
        if r.numel():
            assert f.stride() == r.stride()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_fake_strides_are_the_real_ones(cell, option):
    cell, *projected = cell.split()
    a = arguments(cell, option=option, proj=2 if projected else 0)
    for view in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        if option != "packed":
            a["input"] = view(a["input"])
        b = backward_arguments(a)
        for op, given in ((LAYER, a), (BACKWARD, b)):
            real = op(*given.values())
            with FakeTensorMode() as mode:
                fake = op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, tuple(given.values())))
            same_layout(fake, real)
        for needed in range(len(b["needs"])):
            alone = b | dict(needs=[i == needed for i in range(len(b["needs"]))])
            if alone["needs"][2] and cell != "lstm":
                continue
            real = BACKWARD(*alone.values())
            assert [r.numel() > 0 or i == needed for i, r in enumerate(real)].count(True) == 1


@pytest.mark.parametrize("cell", CELLS)
def test_results_are_fresh_memory(cell):
    a = arguments(cell, option="everything")
    given = [a["input"], a["h0"], *a["weights"]] + ([a["c0"]] if cell == "lstm" else [])
    results = [*LAYER(*a.values()), *BACKWARD(*backward_arguments(a).values())]
    places = [t.untyped_storage().data_ptr() for t in given + results if t.numel()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("option", OPTIONS)
def test_meta_kernels(option):
    a = arguments("gru", option=option)
    meta = LAYER(*torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t if t.dtype == torch.int64 else t.to("meta"), tuple(a.values())
    ))  # fmt: skip
    same_layout([t.to("meta") for t in LAYER(*a.values())], meta)


GOOD = [torch.zeros(20, 2), torch.zeros(20, 5), torch.zeros(20), torch.zeros(20)]
BAD = {
    "cell": ("cell", dict(cell="elman")),
    "input has one dimension": ("input", dict(input=torch.zeros(3))),
    "input is integer": ("input", dict(input=torch.zeros(4, 3, 2, dtype=torch.int64))),
    "h0 has another batch": ("h0", dict(h0=torch.zeros(2, 4, 5))),
    "h0 has another dtype": ("h0", dict(h0=torch.zeros(2, 3, 5, dtype=torch.float64))),
    "c0 has another width": ("c0", dict(c0=torch.zeros(2, 3, 4))),
    "a weight is missing": ("weights", dict(weights=[torch.zeros(20, 2)])),
    "a weight is short": ("weights", dict(weights=[*GOOD[:3], torch.zeros(19)] * 2)),
    "a weight has another dtype": (
        "weights", dict(weights=[GOOD[0].double(), *GOOD[1:]] * 2),
    ),
    "lengths are float": ("lengths", dict(lengths=torch.zeros(3))),
    "lengths are few": ("lengths", dict(lengths=torch.tensor([1, 2]))),
    "a length is negative": ("lengths", dict(lengths=torch.tensor([1, 2, -1]))),
    "a length is beyond T": ("lengths", dict(lengths=torch.tensor([1, 2, 5]))),
    "reset is float": ("reset", dict(reset=torch.zeros(4, 3))),
    "reset is transposed": ("reset", dict(reset=torch.zeros(3, 4, dtype=torch.bool))),
    "batch sizes grow": ("batch_sizes", dict(input=torch.zeros(8, 2), batch_sizes=torch.tensor([2, 3, 2, 1]))),
    "batch sizes do not add up": ("batch_sizes", dict(input=torch.zeros(8, 2), batch_sizes=torch.tensor([3, 2, 1, 1]))),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(case):
    name, change = BAD[case]
    with pytest.raises((RuntimeError, ValueError), match=name) as caught:
        LAYER(*(arguments("lstm") | change).values())
    assert "expected" in str(caught.value).lower()
    assert "got" in str(caught.value)
    for private in ("/home/", "/tmp/", "csrc/"):
        assert private not in str(caught.value)


def test_backward_errors_name_the_argument():
    b = backward_arguments(arguments("lstm"))
    for name, value in {
        "tape": torch.zeros(3), "d_output": torch.zeros(4, 3, 9), "d_h_n": torch.zeros(2, 3, 4),
        "d_c_n": torch.zeros(1), "needs": [True],
    }.items():  # fmt: skip
        with pytest.raises((RuntimeError, ValueError), match=name):
            BACKWARD(*(b | {name: value}).values())


@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_flop_counter(cell):
    """2 * multiplications of every matrix product, as torch counts them: input projection, recurrence, projection."""
    cell, *projected = cell.split()
    T, B, I, H, P, D, G = 4, 3, 2, 5, 2 if projected else 5, 2, CELLS[cell]
    name = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}[cell]
    options = ({"nonlinearity": cell[4:]} if name == "RNN" else {}) | ({"proj_size": 2} if projected else {})
    module = getattr(fastrnn, name)(I, H, bidirectional=True, **options)
    into, recurrent, state = (
        2 * T * B * D * G * H * I,
        2 * T * B * D * G * H * P,
        2 * T * B * D * H * P * bool(projected),
    )
    for needs_input in (False, True):
        x = torch.randn(T, B, I, requires_grad=needs_input)
        with FlopCounterMode(display=False) as forward:
            output, _ = module(x)
        assert forward.get_total_flops() == into + recurrent + state
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        # every product has one for the gradient of its weight, and one for the gradient of its other operand
        assert backward.get_total_flops() == into * (1 + needs_input) + 2 * recurrent + 2 * state


def test_flops_are_torchs_for_the_same_work():
    """torch.nn.RNN without biases is nothing but products: the same count as its own operators give."""
    x = torch.randn(6, 4, 5)
    module = torch.nn.RNN(5, 7, bias=False)
    counts = []
    for convert in (lambda m: m, fastrnn.accelerate):
        with FlopCounterMode(display=False) as counter:
            convert(module)(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_layers_in_one_call():
    rnn, x = fastrnn.LSTM(5, 7, 3, bidirectional=True, proj_size=3), torch.randn(6, 4, 5)
    expected = 0
    for k, width in enumerate((5, 6, 6)):
        layer = fastrnn.LSTM(width, 7, bidirectional=True, proj_size=3)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(6, 4, width, requires_grad=k > 0))[0].sum().backward()
        expected += counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        rnn(x)[0].sum().backward()
    assert counter.get_total_flops() == expected > 0
    rnn.requires_grad_(False)
    rnn.weight_hh_l1.requires_grad_()  # backward ends there
    with FlopCounterMode(display=False) as counter:
        output = rnn(x)[0]
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    rows, gates, both = 2 * 6 * 4, 4 * 7, 2
    recurrent, state = rows * both * gates * 3, rows * both * 7 * 3
    # of the third layer input and recurrence, of the second recurrence, and one direction's weight
    assert counter.get_total_flops() == rows * both * gates * 6 + 2 * (recurrent + state) + recurrent // 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        rnn(x)
    assert counter.get_total_flops() == forward


def test_schemas_are_functional():
    for op in (LAYER, BACKWARD, STEP, STACK, STACK_BACKWARD):
        assert not op._schema.is_mutable
        assert torch.Tag.pt2_compliant_tag in op.tags or not op.tags


def test_cells_list():
    assert {c["name"]: c["gates"] for c in ops.CELLS.values()} == CELLS
    assert [c["name"] for c in ops.CELLS.values() if c["has_c"]] == ["lstm"]
