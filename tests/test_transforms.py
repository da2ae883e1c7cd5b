"""torch.func's transforms (vmap, grad, jvp and what is made of them) against loops of single calls, in float64.

Random configurations of layers, directions, layouts, PackedSequence, lengths, reset, reset_state, states and
all_states; what is mapped, and along which dimension, is random as well. torch.nn's own RNNs refuse most of it: one
test says which.
"""

import random
import warnings

import fastrnn._C as _C
import pytest
import torch
from conftest import ISAS, KINDS, TINY, build, normal, tensors_in
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import fastrnn

CELLS = ["RNN_TANH", "RNN_RELU", "GRU", "LSTM", "LSTM projected"]
N = 3  # samples
SEEDS = {"x": 1, "h0": 2, "c0": 3, "h_start": 4, "c_start": 5}


class Case:
    """A module in float64, and arguments drawn for it; those in `given` can be differentiated."""

    def __init__(self, cell, number, rows=None, small=False):
        r = random.Random(f"{cell}{number}{rows}")
        self.r, kind = r, cell.split()[0]
        self.rows = rows or r.choice(["dense", "dense", "lengths", "packed"])
        self.unbatched = self.rows != "packed" and r.random() < 0.3
        B, T = 1 if self.unbatched else r.randint(2, 3), r.randint(2, 3 if small else 5)
        H, I = r.randint(2, 3 if small else 7), r.randint(1, 3 if small else 5)
        D, L = r.randint(1, 2), 1 if small else r.randint(1, 2)
        extra = {"proj_size": H - 1} if "projected" in cell else {}
        torch.manual_seed(number)
        self.first = self.rows != "packed" and r.random() < 0.4
        self.module = build(
            kind, I, H, num_layers=L, bidirectional=D == 2, bias=r.random() < 0.7, batch_first=self.first,
            dtype=torch.float64, **extra,
        )  # fmt: skip
        self.lstm = kind == "LSTM"
        self.options = {"all_states": True} if r.random() < 0.4 else {}
        self.weights = {n: p.detach() for n, p in self.module.named_parameters()}
        self.shapes = {"x": (B, T, I) if self.first else (T, B, I)}
        if self.rows == "packed":
            lengths = sorted((r.randint(1, T) for _ in range(B)), reverse=True)
            self.sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
            T = lengths[0]
            self.shapes["x"] = (int(self.sizes.sum()), I)
        if r.random() < 0.6:
            self.shapes["h0"] = (L * D, B, extra.get("proj_size", H))
            if self.lstm:
                self.shapes["c0"] = (L * D, B, H)
        self.T, self.B, self.ragged = T, B, {}
        if self.rows == "lengths":
            self.ragged["lengths"] = lambda: torch.tensor([r.randint(0, T) for _ in range(B)])
        if r.random() < 0.5:
            shape = (B, T) if self.first else (T, B)
            self.ragged["reset"] = lambda: torch.rand(shape) < 0.4
            if r.random() < 0.6:
                rows = r.choice([1, B])
                self.shapes["h_start"] = (L * D, rows, extra.get("proj_size", H))
                if self.lstm:
                    self.shapes["c_start"] = (L * D, rows, H)
        _C.set_isa(r.choice(ISAS))

    def draw(self, name, sample=0):
        if name in self.ragged:
            torch.manual_seed(sample)
            return self.squeezed(name, self.ragged[name]())
        return self.squeezed(name, normal(*self.shapes[name], dtype=torch.float64, seed=SEEDS[name] + 7 * sample))

    def squeezed(self, name, t):
        if not self.unbatched:
            return t
        return t.squeeze({"x": int(not self.first), "reset": int(not self.first), "lengths": 0}.get(name, 1))

    @property
    def given(self):
        return list(self.shapes)

    def arguments(self):
        return {name: self.draw(name) for name in (*self.shapes, *self.ragged)}

    def call(self, weights, x, h0=None, c0=None, h_start=None, c_start=None, **ragged):
        hx = None if h0 is None else (h0, c0) if self.lstm else h0
        if h_start is not None:
            ragged["reset_state"] = (h_start, c_start) if self.lstm else h_start
        if self.rows == "packed":
            x = PackedSequence(x, self.sizes)
        found = functional_call(self.module, weights, (x, hx), {**ragged, **self.options})
        found = [found[0].data if self.rows == "packed" else found[0], *found[1:]]
        return tuple(tensors_in(found))

    def loss(self, weights, arguments):
        return sum((t.sin() * (i + 1)).sum() for i, t in enumerate(self.call(weights, **arguments)))

    def mapped(self, always=()):
        """in_dims for the arguments, and the arguments: some of them mapped, x and `always` more often than not."""
        dims, values = {}, self.arguments()
        for name in values:
            if name in always or self.r.random() < 0.6 or (name == "x" and not any(dims.values())):
                dim = self.r.randint(0, values[name].dim())
                values[name] = torch.stack([self.draw(name, s) for s in range(N)], dim)
                dims[name] = dim
            else:
                dims[name] = None
        if all(d is None for d in dims.values()):
            dims["x"], values["x"] = 0, torch.stack([self.draw("x", s) for s in range(N)])
        return dims, values

    def sample(self, dims, values, s):
        return {name: v if dims[name] is None else v.select(dims[name], s) for name, v in values.items()}

    def several(self, mapped):
        """Weights of N modules, stacked along 0 where mapped(name)."""
        dims = {name: 0 if mapped(name) else None for name in self.weights}
        values = {
            name: torch.stack([w * (1 + s / 3) for s in range(N)]) if dims[name] == 0 else w
            for name, w in self.weights.items()
        }
        return dims, values


@pytest.fixture(params=[(cell, number) for cell in CELLS for number in range(12)], ids=lambda p: f"{p[0]} {p[1]}")
def case(request):
    return Case(*request.param)


def close(found, expected):
    found, expected = tensors_in(found), tensors_in(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= 1e-13 * b.norm(), (a - b).norm() / b.norm()


def looped(f, dims, values):
    """f for each sample, stacked as vmap stacks."""
    found = [tensors_in(f(values(s))) for s in range(N)]
    return [torch.stack(parts) for parts in zip(*found)]


def derived(outputs, leaves, *received, **options):
    """torch.autograd.grad, with zeros for what was not used."""
    found = torch.autograd.grad(outputs, leaves, *received, allow_unused=True, **options)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def gradients(case, weights, arguments):
    """Of the loss, by plain autograd: of all weights, then of all that is given."""
    leaves = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
    inner = {n: v.detach().clone().requires_grad_() if n in case.given else v for n, v in arguments.items()}
    return derived(case.loss(leaves, inner), [*leaves.values(), *(inner[n] for n in case.given)])


def split(case, arguments):
    """What is given, and the rest."""
    return {n: arguments[n] for n in case.given}, {n: v for n, v in arguments.items() if n not in case.given}


def test_vmap(case):
    dims, values = case.mapped()
    found = vmap(lambda v: case.call(case.weights, **v), in_dims=(dims,))(values)
    close(found, looped(lambda v: case.call(case.weights, **v), dims, lambda s: case.sample(dims, values, s)))


def test_ensembles(case):
    """vmap over weights: of all of them, or of some."""
    for mapped in (lambda name: True, lambda name: "weight_hh" in name):
        w_dims, weights = case.several(mapped)
        dims, values = case.mapped()
        found = vmap(lambda w, v: case.call(w, **v), in_dims=(w_dims, dims))(weights, values)
        expected = [
            tensors_in(case.call(case.sample(w_dims, weights, s), **case.sample(dims, values, s))) for s in range(N)
        ]
        close(found, [torch.stack(parts) for parts in zip(*expected)])


def test_gradients_of_an_ensemble(case):
    w_dims, weights = case.several(lambda name: True)
    values = case.arguments()
    given, rest = split(case, values)
    found = vmap(grad(lambda w, g: case.loss(w, {**g, **rest}), argnums=(0, 1)), in_dims=(w_dims, None))(weights, given)
    expected = [gradients(case, case.sample(w_dims, weights, s), values) for s in range(N)]
    close([*found[0].values(), *found[1].values()], [torch.stack(parts) for parts in zip(*expected)])


def test_per_sample_gradients(case, calls):
    dims, values = case.mapped()
    given, rest = split(case, values)
    in_dims = (None, {n: dims[n] for n in given}, {n: dims[n] for n in rest})
    calls.clear()
    found = vmap(grad(lambda w, g, o: case.loss(w, {**g, **o}), argnums=(0, 1)), in_dims=in_dims)(
        case.weights, given, rest
    )
    # One back-propagation of each layer for all samples, whose weights' gradients are products outside.
    assert calls.count("layer_operands") == case.module.num_layers and "layer_backward" not in calls
    expected = [gradients(case, case.weights, case.sample(dims, values, s)) for s in range(N)]
    close([*found[0].values(), *found[1].values()], [torch.stack(parts) for parts in zip(*expected)])


def test_grad_of_vmap(case):
    dims, values = case.mapped()
    given, rest = split(case, values)

    def total(w, g):
        return vmap(lambda v: case.loss(w, v), in_dims=(dims,))({**g, **rest}).sum()

    found = grad(total, argnums=(0, 1))(case.weights, given)
    leaves = {n: w.clone().requires_grad_() for n, w in case.weights.items()}
    inner = {n: v.clone().requires_grad_() for n, v in given.items()}
    alone = sum(case.loss(leaves, case.sample(dims, {**inner, **rest}, s)) for s in range(N))
    expected = derived(alone, [*leaves.values(), *inner.values()])
    close([*found[0].values(), *found[1].values()], expected)
    close(derived(total(leaves, inner), [*leaves.values(), *inner.values()]), expected)  # plain autograd around vmap


def test_vmap_of_vmap(case):
    dims, values = case.mapped(always=["x"])
    two = torch.stack([values["x"], values["x"].cos()])

    def both(x):
        return vmap(lambda v: case.loss(case.weights, v), in_dims=(dims,))({**values, "x": x})

    close(vmap(both)(two), torch.stack([both(x) for x in two]))

    def per_sample(x):
        return vmap(grad(lambda w, v: case.loss(w, v)), in_dims=(None, dims))(case.weights, {**values, "x": x})

    found, expected = vmap(per_sample)(two), [per_sample(x) for x in two]
    close(list(found.values()), [torch.stack([e[n] for e in expected]) for n in case.weights])


def test_vjp_of_many_cotangents(case):
    """As jacrev does: the forward pass is not mapped, the backward pass is."""
    values = case.arguments()
    given, rest = split(case, values)
    outputs, pull = vjp(lambda w, g: case.call(w, **g, **rest), case.weights, given)
    cotangents = tuple(normal(N, *t.shape, dtype=torch.float64, seed=i) for i, t in enumerate(outputs))
    found = vmap(pull)(cotangents)
    leaves = {n: w.clone().requires_grad_() for n, w in case.weights.items()}
    inner = {n: v.clone().requires_grad_() for n, v in given.items()}
    outputs = case.call(leaves, **inner, **rest)
    expected = []
    for s in range(N):
        roots, received = zip(*((o, c[s]) for o, c in zip(outputs, cotangents) if o.requires_grad))
        expected.append(derived(roots, [*leaves.values(), *inner.values()], received, retain_graph=True))
    close([*found[0].values(), *found[1].values()], [torch.stack(parts) for parts in zip(*expected)])


def test_jvp(case):
    values = case.arguments()
    given, rest = split(case, values)
    directions = {n: torch.randn_like(v) for n, v in given.items()}
    w_directions = {n: torch.randn_like(w) for n, w in case.weights.items()}
    value, tangent = jvp(lambda w, g: case.loss(w, {**g, **rest}), (case.weights, given), (w_directions, directions))
    expected = gradients(case, case.weights, values)
    along = sum((g * v).sum() for g, v in zip(expected, [*w_directions.values(), *directions.values()]))
    close(value, case.loss(case.weights, values))
    close(tangent, along)
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(v, directions[n]) for n, v in given.items()}
        w_duals = {n: forward_ad.make_dual(w, w_directions[n]) for n, w in case.weights.items()}
        close(forward_ad.unpack_dual(case.loss(w_duals, {**duals, **rest})).tangent, along)


@pytest.mark.parametrize("cell", CELLS)
def test_jacobians_and_hessian(cell):
    case = Case(cell, 1, rows="lengths", small=True)
    values = case.arguments()

    def f(x):
        return case.call(case.weights, **{**values, "x": x})[0]

    def loss(x):
        return f(x).sin().sum()

    x = values["x"]
    plain = torch.autograd.functional.jacobian(f, x)
    close(jacrev(f)(x), plain)
    close(jacfwd(f)(x), plain)
    close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x))
    close(jacrev(jacrev(loss))(x), torch.autograd.functional.hessian(loss, x))

    def weighted(w):
        return case.loss({**case.weights, "weight_hh_l0": w}, values)

    w = case.weights["weight_hh_l0"]
    close(hessian(weighted)(w), torch.autograd.functional.hessian(weighted, w))


def test_plain_backward_through_transformed_gradients(case):
    """torch.func.grad inside, loss.backward() outside: a gradient penalty, sample by sample."""
    dims, values = case.mapped(always=["x"])
    given, rest = split(case, values)

    def penalties(w, x):
        def one(x, v):
            return grad(lambda x: case.loss(w, {**v, "x": x}))(x).square().sum()

        others = {n: d for n, d in dims.items() if n != "x"}
        return vmap(one, in_dims=(dims["x"], others))(x, {n: v for n, v in values.items() if n != "x"})

    leaves = {n: w.clone().requires_grad_() for n, w in case.weights.items()}
    x = given["x"].clone().requires_grad_()
    found = derived(penalties(leaves, x).sum(), [*leaves.values(), x])
    total = 0
    for s in range(N):
        sample = case.sample(dims, {**values, "x": x}, s)
        (by_x,) = torch.autograd.grad(case.loss(leaves, sample), sample["x"], create_graph=True)
        total = total + by_x.square().sum()
    close(found, derived(total, [*leaves.values(), x]))


@pytest.fixture
def calls(monkeypatch):
    """The names of the backward operators that run, in order."""
    seen = []
    for name in ("layer_backward", "layer_operands"):
        function = getattr(fastrnn.ops, name)

        def record(*args, name=name, function=function, **kwargs):
            seen.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(fastrnn.ops, name, record)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind, dtype, isa):
    """The results and their dtypes are those of single calls."""
    module = build(kind, 5, 18, bidirectional=True, dtype=dtype)
    x = normal(N, 6, 2, 5, dtype=dtype)
    weights = {n: p.detach() for n, p in module.named_parameters()}

    def loss(w, x):
        return functional_call(module, w, (x,))[0].float().square().sum()

    with torch.no_grad():
        found, expected = vmap(module)(x), [module(sample) for sample in x]
        for i, t in enumerate(tensors_in(found)):
            assert torch.equal(t, torch.stack([tensors_in(e)[i] for e in expected]))
    found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for name, g in found.items():
        expected = torch.stack([grad(loss)(weights, sample)[name] for sample in x])
        assert g.dtype == dtype
        assert (g - expected).float().norm() <= TINY[dtype] * expected.float().norm()


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(kind):
    """Against single calls: torch.nn's cells cannot be mapped either."""
    cell = getattr(fastrnn, kind)(5, 7, dtype=torch.float64)
    weights = {n: p.detach() for n, p in cell.named_parameters()}
    x, v = normal(N, 4, 5, dtype=torch.float64), normal(4, 5, dtype=torch.float64, seed=1)

    def f(w, x):
        return tensors_in(functional_call(cell, w, (x,)))

    def loss(w, x):
        return sum(t.sin().sum() for t in f(w, x))

    def plain(x):
        leaves = [w.clone().requires_grad_() for w in weights.values()]
        return torch.autograd.grad(loss(dict(zip(weights, leaves)), x), leaves)

    close(vmap(lambda x: f(weights, x))(x), [torch.stack(parts) for parts in zip(*(f(weights, s) for s in x))])
    close(vmap(lambda x: f(weights, x)[0])(x[0]), f(weights, x[0])[0])  # one row at a time
    expected = [torch.stack(parts) for parts in zip(*(plain(s) for s in x))]
    close(list(vmap(grad(loss), in_dims=(None, 0))(weights, x).values()), expected)
    by_x = torch.autograd.functional.jacobian(lambda x: f(weights, x)[0], x[0])
    close([jacrev(lambda x: f(weights, x)[0])(x[0]), jacfwd(lambda x: f(weights, x)[0])(x[0])], [by_x, by_x])
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(f(weights, forward_ad.make_dual(x[0], v))[0])
    close([value, tangent], [f(weights, x[0])[0], (by_x * v).sum((-1, -2))])
    close([value, tangent], jvp(lambda x: f(weights, x)[0], (x[0],), (v,)))
    close(
        hessian(lambda x: loss(weights, x))(x[0]), torch.autograd.functional.hessian(lambda x: loss(weights, x), x[0])
    )


def test_hidden_dual_is_not_lost():
    rnn = fastrnn.GRU(5, 7, dtype=torch.float64)
    h, x = normal(1, 4, 7, dtype=torch.float64), normal(6, 4, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        output, h_n = rnn(x, forward_ad.make_dual(h, torch.ones_like(h)))
        tangents = [forward_ad.unpack_dual(t).tangent for t in (output, h_n)]
    assert all(t is not None and t.norm() > 0 for t in tangents)


TRANSFORMS = {
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x + 1])),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sum()))(torch.stack([x, x + 1])),
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).sin().sum())(x),
}


def outcome(f):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f()
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_what_torch_refuses(kind):
    """In float32, in which it refuses most; ours refuses nothing, and in float64 gives whatever torch.nn gives."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(3, 4, num_layers=2, bidirectional=True)
    ours = getattr(fastrnn, kind)(3, 4, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x, refused = normal(3, 2, 3), set()
    for name, f in TRANSFORMS.items():
        if isinstance(outcome(lambda: f(lambda x: theirs(x)[0], x)), Exception):  # noqa: B023
            refused.add(name)
    ours, theirs, x = ours.double(), theirs.double(), x.double()
    for f in TRANSFORMS.values():
        expected = outcome(lambda: f(lambda x: theirs(x)[0], x))  # noqa: B023
        found = tensors_in(f(lambda x: ours(x)[0], x))
        if not isinstance(expected, Exception):
            close(found, expected)
    assert refused == REFUSED[kind] or torch.__version__ >= "2.14"


REFUSED = {
    "RNN": {"vmap", "vmap of grad"},
    "GRU": {"vmap", "vmap of grad"},
    "LSTM": {"vmap", "jvp", "jacfwd", "hessian"},
}
