"""module.freeze(): the same numbers from weights that stay packed, and everything that has to undo it or go past it."""

import contextlib
import copy
import io
import pickle
import warnings
from types import SimpleNamespace

import fastrnn._C as _C
import pytest
import torch
from conftest import DTYPES, KINDS, build, dtype_name, normal, tensors_in
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.library import opcheck
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn import ops

CELLS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("GRUCell", {}), ("LSTMCell", {})]
I, H = 5, 21


@pytest.fixture
def calls(monkeypatch):
    """Which operators ran, by name; one step past them is "frozen" where it is by kept weights, else "step"."""
    ran = []
    forward = _C.forward

    def direct(cell, module, *arguments):
        found = forward(cell, module, *arguments)
        if found is not None:
            kept = module.get("_frozen")
            ran.append("frozen" if kept and kept.serves(SimpleNamespace(**module)) else "step")
        return found

    monkeypatch.setattr(_C, "forward", direct)
    for name in ("layer", "stack", "step", "pack", "_frozen"):
        inner = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _name=name, _inner=inner: (ran.append(_name.lstrip("_")), _inner(*a))[1]
        )
    return ran


def state(module, B, dtype, unbatched=False):
    D = 2 if module.bidirectional else 1
    widths = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
    shapes = [(module.num_layers * D, *(() if unbatched else (B,)), width) for width in widths]
    hx = tuple(normal(*s, dtype=dtype, seed=31 + i) for i, s in enumerate(shapes))
    return hx if module.mode == "LSTM" else hx[0]


def same(frozen, plain):
    frozen, plain = tensors_in(frozen), tensors_in(plain)
    assert len(frozen) == len(plain)
    for a, b in zip(frozen, plain):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def one_call_each(plain, frozen, arguments, options, calls):
    with torch.no_grad():
        expected = plain(*arguments, **options)
        calls.clear()
        same(frozen(*arguments, **options), expected)
        assert calls == ["frozen"]


OPTIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"bidirectional": True, "num_layers": 2},
    {"num_layers": 3, "batch_first": True},
    {"input_size": 2},
    {"proj_size": 9, "num_layers": 2, "bidirectional": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind, dtype, isa, calls):
    for options in OPTIONS:
        if "proj_size" in options and kind != "LSTM":
            continue
        I = options.get("input_size", 5)
        module = build(kind, I, H, **{k: v for k, v in options.items() if k != "input_size"}).to(dtype)
        frozen = copy.deepcopy(module)
        assert frozen.freeze() is frozen
        for T, B in [(1, 5), (7, 1), (9, 40), (3, 0)]:
            first = module.batch_first
            x = normal(*((B, T) if first else (T, B)), I, dtype=dtype, seed=T)
            hx = state(module, B, dtype)
            lengths = torch.randint(0, T + 1, (B,))
            reset = torch.rand((B, T) if first else (T, B)) < 0.3
            strided = x.transpose(0, 2).contiguous().transpose(0, 2)
            for arguments, options in [
                ((x,), {}),
                ((x, hx), {}),
                ((x, hx), {"lengths": lengths, "reset": reset}),
                ((strided, hx), {}),
            ]:
                one_call_each(module, frozen, arguments, options, calls)
        unbatched = normal(6, I, dtype=dtype, seed=1)
        one_call_each(module, frozen, (unbatched, state(module, 1, dtype, unbatched=True)), {}, calls)
        padded, lengths = normal(6, 4, I, dtype=dtype), torch.tensor([3, 6, 1, 4])
        one_call_each(module, frozen, (pack_padded_sequence(padded, lengths, enforce_sorted=False),), {}, calls)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_few_rows_is_the_sequence(kind, isa):
    """Where the weights are not packed, one step of at most four rows is summed in another order. Kept, never."""
    module = build(kind, I, H).freeze()
    for B in (1, 2, 4):
        x, hx = normal(2, B, I), state(module, B, torch.float32)
        with torch.no_grad():
            whole, _ = module(x, hx)
            output, hx = module(x[:1], hx)
            assert torch.equal(output, whole[:1])
            output, hx = module(x[1:], hx)
            assert torch.equal(output, whole[1:])


@pytest.mark.parametrize("split", ["serial", "batch", "hidden", "wavefront", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind, split, isa):
    module = build(kind, I, 130, num_layers=2)
    frozen = copy.deepcopy(module).freeze()
    x = normal(20, 9, I)
    with torch.no_grad():
        plain = module(x)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                _C.set_split(split)
                same(frozen(x), plain)
        finally:
            _C.set_split("")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("name", "options"), CELLS, ids=["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_cells(name, options, dtype, isa, calls):
    for bias in (True, False):
        cell = getattr(fastrnn, name)(I, H, bias=bias, **options).to(dtype)
        frozen = copy.deepcopy(cell).freeze()
        sequence = getattr(fastrnn, name[:-4])(I, H, bias=bias, **options).to(dtype)
        sequence.load_state_dict({f"{n}_l0": p for n, p in cell.state_dict().items()})
        sequence.freeze()
        for B in (None, 0, 1, 4, 5, 33):
            shape = () if B is None else (B,)
            x, h, c = normal(*shape, I, dtype=dtype), normal(*shape, H, dtype=dtype, seed=1), normal(*shape, H, seed=2)
            hx = (h, c.to(dtype)) if name == "LSTMCell" else h
            with torch.no_grad():
                for state in (hx, None):
                    calls.clear()
                    found = frozen(x, state)
                    assert calls == ["frozen"]
                    if B is not None and B > 4:
                        same(found, cell(x, state))
                    elif B:
                        lifted = None if state is None else tuple(s[None] for s in tensors_in(state))
                        lifted = lifted if name == "LSTMCell" or state is None else lifted[0]
                        expected = sequence(x[None], lifted)[1]
                        for mine, whole in zip(tensors_in(found), tensors_in(expected)):
                            assert torch.equal(mine, whole[0])
                    for mine, other in zip(tensors_in(found), tensors_in(cell(x, state))):
                        assert mine.shape == other.shape and mine.dtype == other.dtype


def modules():
    yield fastrnn.GRU(I, H), normal(3, 2, I)
    yield fastrnn.LSTMCell(I, H), normal(2, I)


def is_used(module, x, calls) -> bool:
    calls.clear()
    with torch.no_grad():
        module(x)
    assert calls
    return calls == ["frozen"]


UNDONE_BY = {
    "train": lambda m: m.train(),
    "load_state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(m.state_dict(), assign=True),
    "to": lambda m: m.to(torch.float64).to(torch.float32),
    "to the same": lambda m: m.to("cpu"),
    "float": lambda m: m.float(),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a model"])
@pytest.mark.parametrize("name", UNDONE_BY)
def test_undone_by(name, inside, calls):
    for module, x in modules():
        module.freeze()
        assert is_used(module, x, calls)
        UNDONE_BY[name](nn.Sequential(module) if inside else module)
        assert not is_used(module, x, calls)
        assert "_frozen" not in module.__dict__
        module.freeze()
        assert is_used(module, x, calls)


@pytest.mark.parametrize(
    "act",
    [lambda m: m.eval(), lambda m: m.requires_grad_(False), lambda m: m.zero_grad(), lambda m: m.state_dict()],
    ids=["eval", "requires_grad_", "zero_grad", "state_dict"],
)
def test_not_undone_by(act, calls):
    for module, x in modules():
        act(module.freeze())
        assert is_used(module, x, calls)


def test_changed_weights_are_noticed(calls):
    for module, x in modules():
        names = list(module._parameters)
        for change in (
            lambda p: p.mul_(2),
            lambda p: p.copy_(torch.ones_like(p)),
            lambda p: nn.init.uniform_(p),
        ):
            for name in names:
                module.freeze()
                with torch.no_grad():
                    change(getattr(module, name))
                assert not is_used(module, x, calls)
                with torch.no_grad():
                    same(module(x), copy.deepcopy(module)(x))
        module.freeze()
        setattr(module, names[0], nn.Parameter(torch.zeros_like(getattr(module, names[0]))))
        assert not is_used(module, x, calls)
        module.freeze()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        assert is_used(module, x, calls)  # no gradients, no step
        tensors_in(module(x))[0].sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        assert not is_used(module, x, calls)


def test_replaced_data_is_noticed(calls):
    for module, x in modules():
        module.freeze()
        nn.utils.vector_to_parameters(
            torch.cat([p.detach().flatten() * 2 for p in module.parameters()]), module.parameters()
        )
        assert not is_used(module, x, calls)
        with torch.no_grad():
            same(module(x), copy.deepcopy(module).train()(x))
    for module, x in ((fastrnn.RNN(I, H), normal(3, 2, I)), (fastrnn.RNNCell(I, H), normal(2, I))):
        module.freeze()
        setattr(module, *(("mode", "RNN_RELU") if isinstance(module, nn.RNN) else ("nonlinearity", "relu")))
        assert not is_used(module, x, calls)


def test_inference_tensors(calls):
    with torch.inference_mode():
        module, x = fastrnn.LSTM(I, H), normal(3, 2, I)
        expected = module(x)
        calls.clear()
        same(module.freeze()(x), expected)
        assert calls == ["pack", "frozen"]


def test_overrides_of_other_bases_are_called():
    called = []

    class Other(nn.Module):
        def train(self, mode=True):
            called.append(mode)
            return super().train(mode)

    class Both(fastrnn.GRU, Other):
        pass

    module = Both(I, H).freeze()
    called.clear()
    assert "_frozen" not in module.train().__dict__
    assert called == [True]


def test_functional_call_gets_its_own_weights(calls):
    for module, x in modules():
        module.freeze()
        other = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
        plain = copy.deepcopy(module).train()
        with torch.no_grad():
            same(functional_call(module, other, (x,)), functional_call(plain, other, (x,)))
        assert is_used(module, x, calls)


def test_copies(calls):
    for module, x in modules():
        module.freeze()
        twin = copy.deepcopy(module)
        assert is_used(twin, x, calls)
        with torch.no_grad():
            same(twin(x), module(x))
            twin.weight_hh_l0.zero_() if isinstance(module, nn.GRU) else twin.weight_hh.zero_()
        assert not is_used(twin, x, calls) and is_used(module, x, calls)
        assert not is_used(copy.deepcopy(twin), x, calls)
        assert is_used(copy.copy(module), x, calls)
        loaded = pickle.loads(pickle.dumps(module))
        assert not is_used(loaded, x, calls)
        assert is_used(loaded.freeze(), x, calls)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert not is_used(torch.load(file, weights_only=False), x, calls)
        assert list(module.state_dict()) == list(loaded.train().state_dict())


def test_conversion(calls):
    model = fastrnn.accelerate(nn.Sequential(nn.LSTM(I, H), nn.Identity()))
    x = normal(3, 2, I)
    model[0].freeze()
    assert is_used(model[0], x, calls)
    fastrnn.restore(model)
    assert type(model[0]) is nn.LSTM and "_frozen" not in model[0].__dict__
    fastrnn.accelerate(model)
    assert not is_used(model[0], x, calls)
    with fastrnn.patch():
        patched = nn.GRU(I, H)
        with torch.no_grad():
            patched(x)
    for module, x in modules():
        expected = module(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            scripted = torch.jit.script(nn.Sequential(module.freeze()))
        for mine, theirs in zip(tensors_in(scripted(x)), tensors_in(expected)):
            torch.testing.assert_close(mine, theirs)


def test_gradients_go_past_it(calls):
    for module, x in modules():
        plain = copy.deepcopy(module)
        module.freeze()
        results = []
        for m in (module, plain):
            calls.clear()
            inner = x.clone().requires_grad_()
            tensors_in(m(inner))[0].sum().backward()
            assert "frozen" not in calls
            results.append([inner.grad, *(p.grad for p in m.parameters())])
        same(*results)
        module.requires_grad_(False)
        calls.clear()
        module(x)  # gradients are on, but nothing needs one
        assert calls == ["frozen"]
        calls.clear()
        with torch.inference_mode():
            module(x)
        assert calls == ["frozen"]
        inner = x.clone().requires_grad_()
        tensors_in(module(inner))[0].sum().backward()
        assert inner.grad is not None


@contextlib.contextmanager
def dual_level():
    with torch.autograd.forward_ad.dual_level():
        yield


def test_whatever_else_is_active(calls):
    for module, x in modules():
        plain = copy.deepcopy(module)
        module.freeze()
        with torch.no_grad():
            with torch.autocast("cpu"):
                calls.clear()
                same(module(x), plain(x))
                assert "frozen" not in calls
            assert torch.equal(*(tensors_in(vmap(m)(torch.stack([x, x + 1])))[0] for m in (module, plain)))
            with dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                tangents = [
                    torch.autograd.forward_ad.unpack_dual(tensors_in(m(dual))[0]).tangent for m in (module, plain)
                ]
                assert torch.equal(*tangents)
            counts = []
            for m in (module, plain):
                with FlopCounterMode(display=False) as counter:
                    m(x)
                counts.append(counter.get_total_flops())
            assert counts[0] == counts[1] > 0
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            shapes = [t.shape for t in tensors_in(module(mode.from_tensor(x)))]
            fake = mode.from_tensor(x)
        assert shapes == [t.shape for t in tensors_in(plain(x))]
        with torch.no_grad():
            assert shapes == [t.shape for t in tensors_in(module(fake))]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    for module, x in modules():
        module.freeze()
        with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
            torch._dynamo.reset()
            found = torch.compile(module, backend=backend, fullgraph=True)(x)
            for mine, theirs in zip(tensors_in(found), tensors_in(copy.deepcopy(module).train()(x))):
                assert torch.equal(mine, theirs)


def test_all_states_and_dropout_go_past_it(calls):
    module = fastrnn.LSTM(I, H, num_layers=2, dropout=0.5)
    plain = copy.deepcopy(module)
    module.freeze()  # in training mode
    x = normal(4, 3, I)
    with torch.no_grad():
        torch.manual_seed(1)
        found = module(x)
        torch.manual_seed(1)
        same(found, plain(x))
        assert "frozen" not in calls
        same(module.eval()(x, all_states=True), plain.eval()(x, all_states=True))
        assert "frozen" not in calls
        same(module(x), plain(x))
        assert "frozen" in calls


def test_errors_are_torchs(calls):
    for module, x in modules():
        plain = getattr(nn, type(module).__name__)(I, H)
        plain.load_state_dict(module.state_dict())
        module.freeze()
        good = [t.detach() for t in tensors_in(plain(x))][x.dim() == 3 :]

        cases = [(x[..., :-1],), (x[None, None],), (x, normal(7, 7)), (x.double(),), ("x",), (x.to_sparse(),), (x[:0],)]
        cases += [(x, "hx"), (x, (tuple(good),))]
        for change in (Tensor.double, Tensor.to_sparse, lambda t: t[..., 1:], lambda t: t[None]):
            states = tuple(map(change, good))
            cases.append((x, states if len(states) == 2 else states[0]))
        for arguments in cases:
            with torch.no_grad():
                try:
                    expected = plain(*arguments)
                except Exception as theirs:
                    with pytest.raises(type(theirs)) as ours:
                        module(*arguments)
                    assert str(ours.value) == str(theirs)
                else:  # torch.nn's cells serve no rows, and sparse ones: so do ours, by torch.nn's own forward
                    assert x.dim() == 2
                    same(module(*arguments), expected)


def test_what_cannot_be_frozen():
    with pytest.raises(ValueError, match="weight_ih_l0: expected a CPU tensor .* got torch.float32 on meta"):
        fastrnn.GRU(I, H, device="meta").freeze()
    with pytest.raises(ValueError, match="weight_hh: expected a plain parameter to freeze"):
        parametrizations.orthogonal(fastrnn.GRUCell(I, H), "weight_hh").freeze()
    cell = fastrnn.GRUCell(I, H)
    cell.bias_hh = None
    with pytest.raises(ValueError, match="bias_hh: expected a plain parameter to freeze"):
        cell.freeze()
    cell = fastrnn.GRUCell(I, H)
    cell.weight_ih = nn.Parameter(torch.zeros(3 * H, I + 1))
    with pytest.raises(ValueError, match=r"weight_ih: expected shape \(63, 5\) to freeze, got \(63, 6\)"):
        cell.freeze()
    cell.bias_hh = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias_hh: expected 63 rows to freeze, got shape \(3,\)"):
        cell.freeze()
    module = fastrnn.LSTM(I, H)
    module.bias_hh_l0 = nn.Parameter(torch.zeros(4 * H, dtype=torch.float64))
    with pytest.raises(ValueError, match="bias_hh_l0: expected a CPU tensor .* all weights of one dtype"):
        module.freeze()


def test_operators():
    weights = [p.detach() for p in fastrnn.LSTM(I, H, num_layers=2).parameters()]
    opcheck(torch.ops.fastrnn.pack.default, ("lstm", weights, False, 2), test_utils=("test_schema",))
    packed = ops.pack("lstm", weights, False, 2)
    x, states = normal(3, 2, I), (normal(2, 2, H), normal(2, 2, H, seed=1))
    opcheck(torch.ops.fastrnn.frozen.default, (packed, x, *states), test_utils=("test_schema",))
    for arguments, message in [
        ((packed[:-1], x), "packed: expected what fastrnn::pack returned, got another tensor"),
        ((packed.float(), x), "packed: expected what fastrnn::pack returned"),
        ((torch.zeros_like(packed), x), "packed: expected what fastrnn::pack returned"),
        ((packed, x.double()), f"input: expected float32 and {I} features, as the packed weights, got float64 of"),
        ((packed, x[..., 1:]), f"input: expected float32 and {I} features, as the packed weights, got float32 of"),
        ((packed, x[0]), "input: expected 3 dimensions .* or for one step one layer and direction"),
        ((packed, x, states[0][:1]), r"h0: expected shape \(L\*D, B, P\) = \(2, 2, 21\), got \(1, 2, 21\)"),
        ((packed, x, *states, True), r"h0: expected shape \(L\*D, B, P\) = \(2, 3, 21\), got \(2, 2, 21\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.frozen(*arguments)
    for arguments, message in [
        (("lstm", weights, False, 3), "num_layers: expected a number of layers that the 8 weights can be shared out"),
        (("lstm", weights[4:] + weights[:4], False, 2), r"weights: expected layer 1 to have inputs of D\*P = 21"),
        (
            ("lstm", [w.double() for w in weights[:4]] + weights[4:], False, 2),
            "weights: expected the dtype of the first layer, float64, in layer 1, got float32",
        ),
        (("elman", weights, False, 2), "cell: expected one of"),
        (("gru", weights, False, 2), "weights"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.pack(*arguments)


@pytest.mark.skipif(len(_C.isas()) < 2, reason="this machine runs one instruction set alone")
def test_another_instruction_set():
    module = fastrnn.GRU(I, H).freeze()
    wide, other = _C.isa(), _C.isas()[0]
    _C.set_isa(other)
    message = f"packed: expected weights packed for {other}, got some packed for {wide}"
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=message):
            module(normal(3, 2, I))
        module.freeze()(normal(3, 2, I))


def test_explain(isa):
    module = fastrnn.LSTM(I, H)
    x = normal(3, 2, I)
    with torch.no_grad():
        assert "its packed weights are kept" not in str(fastrnn.explain(module, x))
        module.freeze()
        assert "its packed weights are kept" in str(fastrnn.explain(module, x))
    assert "its packed weights are kept" not in str(fastrnn.explain(module, x))  # it records for backward
