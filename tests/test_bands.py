"""Few hidden units in many rows, back-propagated band by band of the rows (csrc/cpu/bands.h): the gradients of weights
are those of the bands by themselves, added in their order, whoever had which band.
"""

import functools
import itertools
import operator

import pytest
import torch
from conftest import ISAS, KINDS, SIXTEEN, against_torch, build, dtype_name, equal, normal, shared_out, with_gradients
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

KINDS_AND_PROJECTED = [*KINDS, "LSTM projected"]


def make(kind, I, H, **options):
    kind, *projected = kind.split()
    return build(kind, I, H, **({"proj_size": H // 2 + 1} if projected else {}), **options)


def gradients(rnn, x, **options):
    """Of the weights by name, and of the input."""
    x = x.detach().requires_grad_()
    output = rnn(x, **options)[0]
    weights = dict(rnn.named_parameters())
    incoming = torch.linspace(-1, 1, output.shape[-1]).to(output.dtype).expand_as(output)
    found = torch.autograd.grad(output, [*weights.values(), x], incoming)
    return dict(zip(weights, found)), found[-1]


# B, T, bands: rows enough for so many, but too few for a band to be cut again. Rows that bands share evenly, and not.
SHAPES = [(8, 64, 2), (16, 40, 2), (32, 63, 4), (37, 50, 4), (64, 31, 4), (130, 28, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS_AND_PROJECTED)
def test_the_sums_of_bands(kind, dtype, isa):
    for (B, T, bands), D in itertools.product(SHAPES, (1, 2)):
        rnn, x = make(kind, 5, 9, bidirectional=D == 2, dtype=dtype), normal(T, B, 5, dtype=dtype)
        reset = torch.rand(T, B, generator=torch.Generator().manual_seed(B)) < 0.1
        weights, dx = gradients(rnn, x, reset=reset)
        cuts = [B * i // bands for i in range(bands + 1)]
        of_bands = [gradients(rnn, x[:, a:b], reset=reset[:, a:b]) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(dx, torch.cat([dx for _, dx in of_bands], 1))
        for name, found in weights.items():
            expected = functools.reduce(operator.add, (weights[name] for weights, _ in of_bands))
            assert torch.equal(found, expected), (B, T, D, name)


def test_not_where_sums_are_large_or_rows_are_few():
    for B, T, H in ((8, 63, 9), (7, 200, 9), (64, 20, 400), (32, 16, 100)):
        rnn, x = build("LSTM", 5, H), normal(T, B, 5)
        weights, _ = gradients(rnn, x)
        halves = [gradients(rnn, x[:, half])[0]["weight_hh_l0"] for half in (slice(B // 2), slice(B // 2, B))]
        assert not torch.equal(weights["weight_hh_l0"], halves[0] + halves[1]), (B, T, H)


VARIANTS = {
    "dense": {},
    "equal lengths": {"lengths": "equal"},
    "lengths": {"lengths": "ragged"},
    "empty rows": {"lengths": "empty"},
    "packed": {"packed": True},
    "resets": {"reset": True, "lengths": "ragged", "all_states": True, "reset_state": True},
    "both directions": {"bidirectional": True},
    "both directions, packed": {"bidirectional": True, "packed": True},
    "three layers": {"num_layers": 3},
    "batch first": {"batch_first": True},
}


def call(kind, B, T, H, dtype=torch.float32, lengths=None, packed=False, reset=False, reset_state=False, **options):
    """Every result and every gradient."""
    all_states = options.pop("all_states", False)
    torch.manual_seed(B)
    rnn = make(kind, 6, H, dtype=dtype, **options)
    x = normal(*((B, T) if rnn.batch_first else (T, B)), 6, dtype=dtype)
    rows, given = rnn.num_layers * (2 if rnn.bidirectional else 1), {}
    widths = (rnn.proj_size or H, H) if rnn.mode == "LSTM" else (H,)

    def states(count, seed):
        made = tuple(normal(rows, count, n, dtype=dtype, seed=seed + n).requires_grad_() for n in widths)
        return made if len(made) == 2 else made[0]

    hx = states(B, 1)
    drawn = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(3))
    drawn[B // 2] = T
    if lengths:
        given["lengths"] = {"equal": torch.full((B,), T), "ragged": drawn, "empty": drawn * (drawn > T // 2)}[lengths]
    if reset:
        given["reset"] = torch.rand(T, B, generator=torch.Generator().manual_seed(4)) < 0.1
    if all_states:
        given["all_states"] = True
    if reset_state:
        given["reset_state"] = states(1, 5)
    if packed:
        x = pack_padded_sequence(x, drawn, enforce_sorted=False)
    leaf = (x.data if packed else x).requires_grad_()
    outputs = rnn(x._replace(data=leaf) if packed else leaf, hx, **given)
    leaves = [leaf, *rnn.parameters()]
    for state in (hx, given.get("reset_state", ())):
        leaves += state if isinstance(state, tuple) else [state]
    return list(with_gradients(outputs, leaves).values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS_AND_PROJECTED)
def test_any_thread_count(kind, variant, isa):
    """Fewer threads than bands, as many, and several for each band."""
    sizes = [(8, 70, 20), (33, 64, 17), (150, 15, 9)]
    ways = [("", 1), ("", 2), ("", 3), ("", 4), ("", 9), ("", 16), ("hidden", 3), ("wavefront", 2)]
    if isa not in ("avx512", ISAS[-1]):  # the others have the same code
        sizes, ways = [sizes[list(VARIANTS).index(variant) % 3]], ways[:1] + ways[1::3]
    for B, T, H in sizes:
        found = []
        for split, threads in ways:
            with shared_out(split, threads):
                found.append(call(kind, B, T, H, **VARIANTS[variant]))
        for other in found[1:]:
            equal(other, found[0])


@pytest.mark.parametrize("dtype", [torch.float64, *SIXTEEN], ids=dtype_name)
@pytest.mark.parametrize("kind", KINDS_AND_PROJECTED)
def test_any_thread_count_in_other_dtypes(kind, dtype, isa):
    found = []
    for threads in (1, 2, 3, 12):
        with shared_out("", threads):
            found.append(call(kind, 33, 64, 17, dtype, bidirectional=True, lengths="ragged"))
    for other in found[1:]:
        equal(other, found[0])


def test_rows_of_equal_length():
    """Whether that is said or not."""
    for kind, B in itertools.product(KINDS_AND_PROJECTED, (8, 33, 130)):
        equal(call(kind, B, 80, 20, lengths="equal"), call(kind, B, 80, 20))


@pytest.mark.parametrize("kind", KINDS_AND_PROJECTED)
def test_numbers(kind, rule, isa):
    for B, T, H, I in ((8, 70, 20, 3), (64, 20, 16, 16), (200, 9, 40, 1)):

        def run(rnn, dtype, seed, B=B, T=T, I=I):
            x = normal(T, B, I, dtype=dtype, seed=seed).requires_grad_()
            return with_gradients(rnn(x), [x, *rnn.parameters()])

        def built(module, H=H, I=I):
            return make(kind, I, H, module=module, bidirectional=True)

        against_torch(rule, built, run, torch.float32, f"{kind} B={B} T={T} H={H} I={I}")


@pytest.mark.parametrize("isa", [ISAS[-1]], indirect=True)
def test_some_gradients_alone(isa):
    """What is not asked for changes nothing of the rest."""
    rnn, x = make("LSTM projected", 5, 9, bidirectional=True), normal(40, 33, 5)
    weights, dx = gradients(rnn, x)
    names = list(weights)
    for wanted in ([0], [1, 5], [4], [2, 3, 7], [6, 8, 9]):
        for i, p in enumerate(rnn.parameters()):
            p.requires_grad_(i in wanted)
        output = rnn(x)[0]
        incoming = torch.linspace(-1, 1, output.shape[-1]).expand_as(output)
        found = torch.autograd.grad(output, [dict(rnn.named_parameters())[names[i]] for i in wanted], incoming)
        equal(list(found), [weights[names[i]] for i in wanted])
    for p in rnn.parameters():
        p.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    output = rnn(leaf)[0]
    output.backward(torch.linspace(-1, 1, output.shape[-1]).expand_as(output))
    assert torch.equal(leaf.grad, dx)


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("kind", KINDS_AND_PROJECTED)
def test_a_probe_sees_all_bands(kind, threads):
    """What it adds up over the whole batch is what it adds up over rows by themselves; and it changes no bit."""
    rnn = make(kind, 5, 9, dtype=torch.float64, bidirectional=True, num_layers=2)
    x = normal(20, 64, 5, dtype=torch.float64)

    def watched(x):
        with fastrnn.probe(rnn) as probe:
            found = gradients(rnn, x)
        return [layer.last for layer in probe.layers()], found

    with shared_out("", threads):
        whole, (weights, dx) = watched(x)
        parts = [watched(x[:, i : i + 4])[0] for i in range(0, 64, 4)]
        expected, same_dx = gradients(rnn, x)
    equal([*weights.values(), dx], [*expected.values(), same_dx])
    for i, layer in enumerate(whole):
        for name in ("h", "h_grad", "h_grad_arrived", "c", "c_grad", "c_grad_arrived"):
            got = getattr(layer, name)
            if got is None:
                continue
            squares = sum(getattr(part[i], name).square() for part in parts)
            assert torch.allclose(got.square(), squares, rtol=1e-9, atol=0), name
        for name, gate in layer.gates.items():
            mean = sum(part[i].gates[name].mean for part in parts) / len(parts)
            assert torch.allclose(gate.mean, mean, rtol=1e-9, atol=1e-12), name
