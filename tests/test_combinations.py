"""Every combination of all_states, reset, reset_state, lengths and recompute under torch.compile, torch.func.vmap,
gradients sample by sample, checkpointing and gradients of gradients.

What each option does by itself is tested elsewhere; here, that they do it together, whatever acts on the call.
recompute does nothing under torch.func and for gradients of gradients: there it must do no harm.
"""

import functools
import itertools

import pytest
import torch
from conftest import KINDS, build, flat, normal, tensors_in
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastrnn.functional as F

T, B, I, H, N = 20, 3, 3, 4, 2  # more than a chunk of recompute
OPTIONS = [o for o in itertools.product([False, True], repeat=5) if o[1] or not o[2]]  # a reset state wants resets
NAMES = ["all_states", "reset", "reset_state", "lengths", "recompute"]


class Case:
    """A layer in float64 in one direction or two, with one of the combinations."""

    def __init__(self, number, options):
        self.kind = KINDS[number % 4]
        self.on = dict(zip(NAMES, options, strict=True))
        two = number % 3 == 0
        self.module = build(self.kind, I, H, num_layers=2, bidirectional=two, dtype=torch.float64)
        self.module.recompute = self.on["recompute"]
        self.x = normal(N, T, B, I, dtype=torch.float64)
        states = [normal(2 * (1 + two), B, H, dtype=torch.float64, seed=s) for s in (1, 2)]
        self.start = tuple(states) if self.kind == "LSTM" else states[0]
        self.reset = torch.rand(N, T, B) < 0.2
        self.lengths = torch.tensor([[T, 5, 11], [0, T, 9]])
        self.weights = dict(self.module.named_parameters())

    def sample(self, n):
        return self.x[n], self.reset[n], self.lengths[n], self.start

    def call(self, weights, x, reset, lengths, start):
        on, options = self.on, {"all_states": self.on["all_states"]}
        options |= {"reset": reset} if on["reset"] else {}
        options |= {"reset_state": start} if on["reset_state"] else {}
        options |= {"lengths": lengths} if on["lengths"] else {}
        return tuple(tensors_in(functional_call(self.module, weights, (x,), options)))

    def loss(self, weights, *arguments):
        return sum((t.sin() * (i + 1)).sum() for i, t in enumerate(self.call(weights, *arguments)))

    def leaves(self, n):
        """The arguments of sample n with x and the reset state to be differentiated, and all that can be."""
        x, reset, lengths, start = self.sample(n)
        x, states = x.clone().requires_grad_(), [t.clone().requires_grad_() for t in flat(start)]
        start = tuple(states) if self.kind == "LSTM" else states[0]
        return (x, reset, lengths, start), [x, *states, *self.weights.values()]

    def gradients(self, n, function=None):
        arguments, leaves = self.leaves(n)
        loss = self.loss(self.weights, *arguments) if function is None else function(*arguments)
        return derived(loss, leaves)


@pytest.fixture(params=enumerate(OPTIONS), ids=lambda p: " ".join(n for n, o in zip(NAMES, p[1]) if o) or "plain")
def case(request):
    torch.manual_seed(0)
    return Case(*request.param)


def derived(loss, leaves, **options):
    found = torch.autograd.grad(loss, leaves, allow_unused=True, **options)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def close(found, expected, bound=1e-13):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= bound * b.norm(), (a - b).norm() / b.norm()


def test_compile(case):
    torch._dynamo.reset()
    function = {"LSTM": F.lstm, "GRU": F.gru}.get(case.kind, F.rnn)
    extra = {} if function is not F.rnn else {"nonlinearity": case.kind[4:].lower()}
    weights, on, two = list(case.weights.values()), case.on, case.module.bidirectional

    def f(x, reset, lengths, start):
        found = function(
            x, None, weights, num_layers=2, bidirectional=two, all_states=on["all_states"],
            reset=reset if on["reset"] else None, reset_state=start if on["reset_state"] else None,
            lengths=lengths if on["lengths"] else None, recompute=on["recompute"], **extra,
        )  # fmt: skip
        return sum((t.sin() * (i + 1)).sum() for i, t in enumerate(tensors_in(found)))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(case.gradients(0, compiled), case.gradients(0), strict=True):
        assert a.equal(b)


def test_vmap(case):
    found = vmap(functools.partial(case.call, case.weights), in_dims=(0, 0, 0, None))(
        case.x, case.reset, case.lengths, case.start
    )
    each = [case.call(case.weights, *case.sample(n)) for n in range(N)]
    close(found, [torch.stack(parts) for parts in zip(*each)])


def test_sample_by_sample(case):
    found = vmap(grad(case.loss, argnums=(0, 1, 4)), in_dims=(None, 0, 0, 0, None))(
        case.weights, case.x, case.reset, case.lengths, case.start
    )
    of_weights, of_x, of_start = found
    expected = [torch.stack(parts) for parts in zip(*(case.gradients(n) for n in range(N)))]
    close([of_x, *flat(of_start), *of_weights.values()], expected)


def test_checkpointing(case):
    def again(*arguments):
        return checkpoint(functools.partial(case.loss, case.weights), *arguments, use_reentrant=False)

    for a, b in zip(case.gradients(0, again), case.gradients(0), strict=True):
        assert a.equal(b)


def test_gradients_of_gradients(case):
    """Along a direction, against forward mode through the plain equations (reference.py)."""
    arguments, leaves = case.leaves(0)
    direction = [normal(*leaf.shape, dtype=torch.float64, seed=i + 30) for i, leaf in enumerate(leaves)]
    gradients = derived(case.loss(case.weights, *arguments), leaves, create_graph=True)
    found = derived(sum((g * v).sum() for g, v in zip(gradients, direction) if g.requires_grad), leaves)

    def gradient(*values):
        x, *rest = values
        start, rest = (tuple(rest[:2]), rest[2:]) if case.kind == "LSTM" else (rest[0], rest[1:])
        weights = dict(zip(case.weights, rest, strict=True))
        of_weights, of_x, of_start = grad(case.loss, argnums=(0, 1, 4))(weights, x, *arguments[1:3], start)
        return of_x, *flat(of_start), *of_weights.values()

    _, expected = jvp(gradient, tuple(leaf.detach() for leaf in leaves), tuple(direction))
    close(found, expected, 1e-12)
