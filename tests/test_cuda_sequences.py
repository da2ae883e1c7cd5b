"""reset, reset_state, lengths, packing, projections and all_states on a GPU: every combination of test_sequences.py on
every path, against its loop over the plain equations.

The truth, and err_torch, which is the same loop's error in the same dtype, are computed on the CPU.
"""

import copy
import functools
import itertools

import pytest
import torch
from conftest import DTYPES, SIXTEEN, build, dtype_name, flat, normal
from gpu import PATHS, asked_for, every_path, forced, needs_card
from test_sequences import CELLS, LAYOUTS, configuration, describe, draw, make, run_exact, run_oracle, run_ours
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytestmark = needs_card

on_paths = pytest.mark.parametrize(
    ("path", "dtype"),
    [(path, dtype) for dtype in DTYPES for path in PATHS if dtype != torch.float64 or path == "step"],
    ids=lambda v: v if isinstance(v, str) else dtype_name(v),
)


@functools.lru_cache(maxsize=256)
def without_us(items):
    """What does not depend on the path: the module, what is drawn, the loop's results and the truth."""
    c = dict(items)
    module, drawn = make(c), draw(c)
    theirs = run_oracle(module, c, *drawn, c["dtype"])
    exactly = c["dtype"] == torch.float64
    truth = run_exact(module, c, *drawn) if exactly else run_oracle(module, c, *drawn, torch.float64)
    return module, drawn, theirs, truth


def check(rule, c, path):
    def three(n):
        module, drawn, theirs, truth = without_us(tuple((c | {"seed": c["seed"] + 1_000_003 * n}).items()))
        with asked_for("float32"), forced(path):
            mine = run_ours(copy.deepcopy(module).cuda(), c | {"seed": c["seed"] + n}, *drawn, device="cuda")
        return mine, theirs, truth

    rule.check(three, c["dtype"], f"{path} {describe(c)}")


@on_paths
@pytest.mark.parametrize("rows", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_combination(cell, rows, path, dtype, rule):
    layouts = LAYOUTS[:2] if rows == "packed" else LAYOUTS
    for number, options in enumerate(itertools.product([False, True], [False, True], [1, 2], [1, 2])):
        if rows == "dense" and not options[0] and not options[1] and cell != "LSTM projected":
            continue  # plain torch.nn: test_cuda_accuracy.py
        check(rule, configuration(cell, dtype, rows, *options, layouts[number % len(layouts)]), path)


@on_paths
@pytest.mark.parametrize("sizes", [(18, 9, 3), (65, 4, 9), (128, 3, 2), (100, 6, 17), (256, 5, 20)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_larger_sizes(cell, sizes, path, dtype, rule):
    """Sizes that fill tiles, several groups of rows and several blocks, with everything on at once."""
    H, T, B = sizes
    if dtype == torch.float64 and H > 128:
        H = 65
    for rows in ("dense", "lengths", "packed"):
        c = configuration(cell, dtype, rows, True, True, 2, 2, "time first")
        check(rule, c | dict(H=H, I=H // 2 + 1, T=T, B=B, proj=H // 3 if c["proj"] else 0), path)


# What the options mean, in terms of each other.


def small(kind, dtype=torch.float32, B=19, H=37, **options):
    torch.manual_seed(0)
    return build(kind, 11, H, device="cuda", dtype=dtype, **options), normal(9, B, 11, dtype=dtype).cuda()


def gradients(rnn, x, *outputs):
    loss = sum(v.float().square().sum() for v in outputs)
    return torch.autograd.grad(loss, [x, *rnn.parameters()])


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN], ids=dtype_name)
@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
def test_nan_past_the_length_does_no_harm(kind, dtype, path):
    """Same bits as with zeros there: nothing past a length is read, forward or backward."""
    rnn, x = small(kind, dtype, num_layers=2, bidirectional=True)
    lengths = torch.randint(0, 10, (19,), generator=torch.Generator().manual_seed(3)).cuda()
    outside = torch.arange(9, device="cuda")[:, None] >= lengths
    results = []
    with forced(path):
        for filling in (0.0, torch.nan, torch.inf):
            given = x.clone()
            given[outside] = filling
            given.requires_grad_()
            output, hidden, states = rnn(given, lengths=lengths, all_states=True)
            found = [output, *flat(hidden), *flat(states)]
            dx, *others = gradients(rnn, given, *found)
            found += [dx, *others]
            assert (output[outside] == 0).all() and (dx[outside] == 0).all()
            assert all(v.isfinite().all() for v in found)
            results.append(found)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@every_path
@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
def test_lengths_is_packing(kind, path):
    """Padded with lengths on the card, on the CPU, and packed: the same numbers to rounding, the first two bit for
    bit. The step path multiplies as many rows as there are, so packed sums may be in another order."""
    rnn, x = small(kind, num_layers=2, bidirectional=True)
    lengths = torch.randint(1, 10, (19,), generator=torch.Generator().manual_seed(4))
    lengths[5] = 9
    with forced(path), asked_for("float32"):
        output, hidden = rnn(x, lengths=lengths.cuda())
        from_cpu, _ = rnn(x, lengths=lengths)
        packed, packed_hidden = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert output.equal(from_cpu)
    torch.testing.assert_close(output, pad_packed_sequence(packed, total_length=9)[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(flat(hidden), flat(packed_hidden), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_path
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=dtype_name)
def test_lengths_on_the_card_are_clamped(dtype, path):
    """Nobody waits to look at them: what is out of range counts as 0 or T."""
    rnn, x = small("LSTM")
    wild = torch.tensor([-1, 0, 9, 10, 2**30, -(2**30), 4] + [9] * 12, dtype=dtype, device="cuda")
    with forced(path):
        found = rnn(x, lengths=wild)
        expected = rnn(x, lengths=wild.clamp(0, 9))
    assert found[0].equal(expected[0])
    assert all(a.equal(b) for a, b in zip(found[1], expected[1], strict=True))


@every_path
@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
def test_reset_is_separate_calls(kind, path):
    rnn, x = small(kind, num_layers=2)
    reset = torch.zeros(9, 19, dtype=torch.bool, device="cuda")
    reset[4] = True
    with forced(path), asked_for("float32"):
        output, _ = rnn(x, reset=reset)
        pieces = [rnn(x[:4])[0], rnn(x[4:])[0]]
    torch.testing.assert_close(output, torch.cat(pieces), rtol=1e-5, atol=1e-6)


@every_path
@pytest.mark.parametrize("kind", ["RNN_TANH", "GRU", "LSTM"])
def test_no_gradient_crosses_a_reset(kind, path):
    rnn, x = small(kind, bidirectional=True)
    x.requires_grad_()
    reset = torch.zeros(9, 19, dtype=torch.bool, device="cuda")
    reset[3, 1] = True
    with forced(path):
        output, _ = rnn(x, reset=reset)
        (grad,) = torch.autograd.grad(output[:3, 1].sum(), x)
    others = [b for b in range(19) if b != 1]
    assert (grad[3:] == 0).all() and (grad[:, others] == 0).all() and (grad[:3, 1] != 0).any()


@every_path
def test_a_row_of_length_zero_returns_its_state_and_its_gradient(path):
    for kind in ("RNN_TANH", "GRU", "LSTM"):
        rnn, x = small(kind, bidirectional=True, num_layers=2)
        h0, c0 = (normal(4, 19, 37, seed=s).cuda().requires_grad_() for s in (1, 2))
        lengths = torch.tensor([0, 9, 3, 0] + [5] * 15, device="cuda")
        with forced(path):
            hx = (h0, c0) if kind == "LSTM" else h0
            output, hidden = rnn(x, hx, lengths=lengths, reset=torch.ones(9, 19, dtype=torch.bool, device="cuda"))
            assert (output[:, [0, 3]] == 0).all()
            for given, got in zip((h0, c0), flat(hidden)):
                assert got[:, [0, 3]].equal(given[:, [0, 3]])
                incoming = torch.randn_like(got)
                (grad,) = torch.autograd.grad(got, given, incoming, retain_graph=True)
                assert grad[:, [0, 3]].equal(incoming[:, [0, 3]])
