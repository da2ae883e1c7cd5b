"""jacobian_spectrum: against Jacobians by autograd, systems whose exponents are known, and arithmetic of 400 digits."""

import copy
import math

import mpmath
import pytest
import torch
from conftest import KINDS, build, normal
from torch import nn
from torch.func import jacrev
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import jacobian_spectrum, spectrum

F64 = torch.float64
I, H = 3, 5
CASES = [(kind, {}) for kind in KINDS] + [("LSTM", {"proj_size": 2}), ("GRU", {"bias": False})]
MIXED = {"num_layers": 2, "bidirectional": True}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from two."""
    torch.set_num_threads(1)


def lively(kind, **options):
    """Larger weights than torch.nn's, so that the product is no desert; in a ReLU network most units alive."""
    module = build(kind, I, H, **options).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.mul_(1.5)
            if kind == "RNN_RELU" and name.startswith("bias_ih"):
                p.add_(2.0)
    return module


def states(module, B, seed=5):
    """An hx of a module for batched input."""
    L = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
    hx = tuple(normal(L, B, width, dtype=F64, seed=seed + i) for i, width in enumerate(widths))
    return hx if module.mode == "LSTM" else hx[0]


def single(module, layer, d):
    """One layer and direction of a module as a torch.nn module of one direction, forward in time."""
    I = module.input_size if layer == 0 else (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
    kind = module.mode
    options = {"proj_size": module.proj_size} if kind == "LSTM" else {}
    alone = build(kind, I, module.hidden_size, module=nn, bias=module.bias, **options).double()
    suffix = f"_l{layer}" + ("_reverse" if d else "")
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.copy_(getattr(module, name.removesuffix("_l0") + suffix))
    return alone


def after(alone, x, state):
    """The state after all of x (T, I), from the one before."""
    P = alone.proj_size or alone.hidden_size
    if alone.mode != "LSTM":
        return alone(x, state[None])[1][0]
    return torch.cat(alone(x, (state[None, :P], state[None, P:]))[1], 1)[0]


def jacobian(alone, x, state):
    """Of that, by the state before, (n, n), by torch's autograd through torch.nn."""
    return jacrev(lambda s: after(alone, x, s))(state)


def by_autograd(module, x, hx, lengths=None):
    """The whole products (L*D, B, n, n), and the sum over steps of log |det| (L*D, B): layer by layer, each given its
    input."""
    D, (T, B) = 1 + module.bidirectional, x.shape[:2]
    lengths = [T] * B if lengths is None else lengths.tolist()
    _, _, *found = module(x, hx, lengths=torch.tensor(lengths), all_states=True)
    h_all = found[0][0] if module.mode == "LSTM" else found[0]
    products, determinants = [], []
    for layer in range(module.num_layers):
        for d in range(D):
            alone, at = single(module, layer, d), layer * D + d
            for b, length in enumerate(lengths):
                row = (x[:length, b].flip(0) if d else x[:length, b]).detach()
                state = torch.cat([t[at, b] for t in (hx if module.mode == "LSTM" else (hx,))])
                products.append(jacobian(alone, row, state))
                total = 0.0
                for t in range(length):
                    total = total + torch.linalg.slogdet(jacobian(alone, row[t : t + 1], state)).logabsdet
                    state = after(alone, row[t : t + 1], state).detach()
                determinants.append(total)
        x = torch.cat([h_all[layer * D + d] for d in range(D)], 2)
    products = torch.stack(products).detach().unflatten(0, (-1, B))
    return products, torch.stack(determinants).detach().reshape(-1, B)


# ---------------------------------------------------------------------------------------------------- against autograd


@pytest.mark.parametrize("kind, options", CASES, ids=str)
def test_one_step_is_autograds_jacobian(kind, options):
    """The matrix itself, and not only its singular values."""
    module = lively(kind, **options)
    x, hx = normal(1, 4, I, dtype=F64), states(module, 4)
    with torch.no_grad():
        layers = spectrum._Layers(module, x, hx, None, 0)
        truth, _ = by_autograd(module, x, hx)
        parts = [[part[:, 0] for part in of] for of in layers.derivatives(0, 1)]
        J = layers.push(torch.eye(truth.size(-1), dtype=F64).repeat(1, 4, 1, 1), parts)
    assert (J - truth).abs().max() < 1e-14


@pytest.mark.parametrize("kind, options", CASES, ids=str)
def test_the_product_of_layers_directions_and_ragged_rows(kind, options, monkeypatch):
    monkeypatch.setattr(spectrum, "CHUNK", 400)  # several pieces of time
    module = lively(kind, **options, **MIXED)
    T, B, lengths = 9, 3, torch.tensor([9, 1, 5])
    x, hx = normal(T, B, I, dtype=F64), states(module, B)
    found = jacobian_spectrum(module, x, hx, lengths=lengths)
    truth, determinants = by_autograd(module, x, hx, lengths)
    n = truth.size(-1)
    assert found.log_singular_values.shape == found.row_exponents.shape == (4, B, n) and found.exponents.shape == (4, n)
    assert found.steps.tolist() == lengths.tolist()
    # An SVD of the product knows a singular value only as exactly as the largest one allows.
    values = torch.linalg.svdvals(truth)
    assert ((found.log_singular_values.exp() - values).abs() / values[..., :1]).max() < 1e-12
    exactly = dict(rtol=0, atol=1e-9)
    torch.testing.assert_close(found.log_singular_values.sum(2), determinants, **exactly)
    torch.testing.assert_close(found.row_exponents.sum(2) * found.steps, determinants, **exactly)
    assert (determinants == -math.inf).any() == (kind == "RNN_RELU") and determinants[:, 1].isfinite().any()
    assert found.exponents.equal(found.row_exponents.mean(1))
    for values in (found.exponents, found.row_exponents, found.log_singular_values):
        assert values.equal(values.sort(-1, descending=True).values)


@pytest.mark.parametrize("kind", ["RNN_TANH", "LSTM", "GRU"])
def test_exponents_are_benettins(kind):
    """QR after each step, of Jacobians by autograd."""
    module, T = lively(kind), 25
    x, hx = normal(T, 1, I, dtype=F64), states(module, 1)
    _, _, found = module(x, hx, all_states=True)
    after = torch.cat([t[0, :, 0] for t in (found if kind == "LSTM" else (found,))], 1).detach()
    before = torch.cat([torch.cat([t[0] for t in (hx if kind == "LSTM" else (hx,))], 1), after[:-1]])
    n = before.size(1)
    start = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(0))
    Q, total, counted = torch.linalg.qr(start)[0], torch.zeros(n, dtype=F64), torch.zeros(n, dtype=F64)
    for t in range(T):
        Q, R = torch.linalg.qr(jacobian(single(module, 0, 0), x[t], before[t]) @ Q)
        total += R.diagonal().abs().log()
        counted += R.diagonal().abs().log() if t >= 10 else 0
    one = jacobian_spectrum(module, x, hx)
    assert (one.exponents[0] - (total / T).sort(descending=True).values).abs().max() < 1e-10
    late = jacobian_spectrum(module, x, hx, burn_in=10)
    assert (late.exponents[0] - (counted / 15).sort(descending=True).values).abs().max() < 1e-10
    fewer = jacobian_spectrum(module, x, hx, k=2)
    assert (fewer.exponents[0] - (total / T)[:2].sort(descending=True).values).abs().max() < 1e-10
    assert fewer.log_singular_values is None


def test_burn_in_leaves_out_the_first_steps_of_the_product():
    module = lively("GRU", bidirectional=True)
    x, hx = normal(12, 2, I, dtype=F64), states(module, 2)
    found = jacobian_spectrum(module, x, hx, burn_in=8)
    _, _, h_all = module(x, hx, all_states=True)
    entering = torch.stack([h_all[0, 7], h_all[1, 4]]).detach()
    for d, part in enumerate((x[8:], x[:4])):
        begin = torch.stack([entering[d], entering[d]])  # the other direction's is not looked at
        truth = torch.linalg.svdvals(by_autograd(module, part, begin)[0][d]).log()
        assert (found.log_singular_values[d] - truth).abs().max() < 1e-9
    assert found.steps.tolist() == [4, 4]


# ---------------------------------------------------------------------------------------------------- known systems


def linear_system(A):
    """A ReLU RNN that stands still at a positive state, all units active: its Jacobian is A at every step."""
    rest = 3 * torch.ones(len(A), dtype=F64)
    module = fastrnn.RNN(1, len(A), nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(A)
        module.weight_ih_l0.zero_()
        module.bias_ih_l0.copy_(rest - A @ rest)
        module.bias_hh_l0.zero_()
    return module, rest[None]


def orthogonal_matrix(n, seed=0):
    return torch.linalg.qr(normal(n, n, dtype=F64, seed=seed))[0]


def test_an_orthogonal_matrix_keeps_everything():
    module, rest = linear_system(orthogonal_matrix(8))
    found = jacobian_spectrum(module, torch.zeros(300, 1, dtype=F64), rest)
    assert found.exponents.abs().max() < 1e-14 and found.log_singular_values.abs().max() < 1e-12
    module, rest = linear_system(0.95 * orthogonal_matrix(8))
    found = jacobian_spectrum(module, torch.zeros(300, 1, dtype=F64), rest)
    assert (found.exponents - math.log(0.95)).abs().max() < 1e-14
    assert (found.memory - -1 / math.log(0.95)).abs().max() < 1e-11
    assert found.outliving(19).tolist() == [8] and found.outliving(20).tolist() == [0]


def test_two_thousand_steps_of_strong_contraction():
    """Singular values of A^T, A symmetric, down to e^-9210: far below what a float64 holds."""
    eigenvalues = torch.tensor([0.9, 0.5, -0.5, 0.3, 0.01], dtype=F64)
    V = orthogonal_matrix(5)
    module, rest = linear_system(V @ eigenvalues.diag() @ V.t())
    x = torch.zeros(2000, 1, dtype=F64)
    found = jacobian_spectrum(module, x, rest)
    assert (found.log_singular_values[0, 0] / 2000 - eigenvalues.abs().log()).abs().max() < 1e-13
    assert found.log_singular_values[0, 0, -1] < -9000
    assert (found.exponents[0].sum() - eigenvalues.abs().log().sum()).abs() < 1e-12
    assert (found.exponents[0] - eigenvalues.abs().log()).abs().max() < 5 / 2000  # O(1 / steps)
    late = jacobian_spectrum(module, x, rest, burn_in=200)  # long enough for 0.5 / 0.9 to the 200th
    assert (late.exponents[0] - eigenvalues.abs().log()).abs().max() < 1e-12


def test_exponents_of_a_matrix_that_is_not_normal_are_those_of_its_eigenvalues():
    """Its powers grow at first, as a shear does: singular values tell that, exponents do not."""
    eigenvalues = torch.tensor([0.8, 0.6, 0.4], dtype=F64)
    A = eigenvalues.diag() + torch.tensor([[0.0, 9.0, 9.0], [0.0, 0.0, 9.0], [0.0, 0.0, 0.0]], dtype=F64)
    module, rest = linear_system(A)
    found = jacobian_spectrum(module, torch.zeros(400, 1, dtype=F64), rest, burn_in=200)
    assert (found.exponents[0] - eigenvalues.log()).abs().max() < 1e-12
    short = jacobian_spectrum(module, torch.zeros(3, 1, dtype=F64), rest)
    truth = torch.linalg.svdvals(A @ A @ A).log()
    assert truth[0] > 4 and (short.log_singular_values[0, 0] - truth).abs().max() < 1e-9


def exact_log_singular_values(matrices):
    """Of the product of matrices, each to be multiplied from the left, in 400 digits."""
    with mpmath.workdps(400):
        product = mpmath.eye(len(matrices[0]))
        for matrix in matrices:
            product = mpmath.matrix(matrix.tolist()) * product
        return torch.tensor([float(mpmath.log(v)) for v in mpmath.svd_r(product, compute_uv=False)], dtype=F64)


def test_singular_values_of_a_long_product_to_ten_digits():
    module, T = lively("RNN_TANH"), 60
    x = normal(T, 1, I, dtype=F64)
    output, _ = module(x)
    h = output.detach()[:, 0]
    factors = [(1 - h[t] ** 2).unsqueeze(1) * module.weight_hh_l0.detach() for t in range(T)]
    truth = exact_log_singular_values(factors)
    assert truth[0] - truth[-1] > 60  # an SVD in float64 would lose half of them
    assert (jacobian_spectrum(module, x).log_singular_values[0, 0] - truth).abs().max() < 1e-10


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 5.0, 60.0])
def test_singular_values_of_graded_matrices(spread):
    """Logarithms unsorted, far apart and close together; U is well-conditioned, as _Product keeps it."""
    n = 12
    log = spread * torch.arange(n, dtype=F64)[torch.randperm(n)]
    U = torch.eye(n, dtype=F64) + 0.3 * normal(n, n, dtype=F64, seed=3)
    with mpmath.workdps(400):
        S = mpmath.matrix(U.tolist())
        for i in range(n):
            for j in range(n):
                S[i, j] *= mpmath.exp(log[i].item())
        truth = torch.tensor([float(mpmath.log(v)) for v in mpmath.svd_r(S, compute_uv=False)], dtype=F64)
    assert (spectrum._log_singular_values(log, U) - truth).abs().max() < 1e-10


def test_neighbours_that_are_coupled_over_more_than_a_float64_holds():
    """Each e^20 from the next: close enough to matter to each other, 40 of them."""
    logs = -0.2 * torch.arange(40, dtype=F64)
    V = orthogonal_matrix(40)
    module, rest = linear_system(V @ logs.exp().diag() @ V.t())
    found = jacobian_spectrum(module, torch.zeros(100, 1, dtype=F64), rest)
    assert (found.log_singular_values[0, 0] - 100 * logs).abs().max() < 1e-9


def test_a_late_direction_may_overtake_an_early_one_by_any_factor():
    """Decoupled, so that no mixing puts the larger one first: e^800 apart, and then back."""
    product = spectrum._Product(1, 1, 2, 2, "cpu")
    Q, yes = torch.eye(2, dtype=F64).reshape(1, 1, 2, 2), torch.tensor([[True]])
    J = torch.tensor([[math.exp(-1), 0.0], [0.0, math.exp(1)]], dtype=F64)
    for _ in range(400):
        Q = product.follow(J @ Q, yes)
    expected = torch.tensor([400.0, -400.0], dtype=F64)
    assert (product.log_singular_values()[0, 0] - expected).abs().max() < 1e-10
    assert (product.logs().sort(descending=True).values[0, 0] - expected).abs().max() < 1e-10
    for _ in range(300):
        Q = product.follow(J.inverse() @ Q, yes)
    assert (product.log_singular_values()[0, 0] - expected / 4).abs().max() < 1e-10


# ---------------------------------------------------------------------------------------------------- lost directions


def test_what_relu_switches_off_is_lost():
    module, T, B = build("RNN_RELU", I, 8).double(), 6, 5
    x = normal(T, B, I, dtype=F64)
    found = jacobian_spectrum(module, x)
    output, _ = module(x)
    ranks = set()
    for b in range(B):
        product = torch.eye(8, dtype=F64)
        for t in range(T):
            product = (output[t, b] > 0).double().unsqueeze(1) * (module.weight_hh_l0.detach() @ product)
        values = torch.linalg.svdvals(product)
        rank = int((values > 1e-12 * values[0]).sum())
        ranks.add(rank)
        assert found.row_exponents[0, b].isfinite().sum() == found.log_singular_values[0, b].isfinite().sum() == rank
        assert (found.log_singular_values[0, b, :rank] - values[:rank].log()).abs().max() < 1e-9
        assert (found.row_exponents[0, b, rank:] == -math.inf).all()
    assert len(ranks) > 1 and max(ranks) < 8
    assert (found.memory > 0).all()


def test_the_best_kept_direction_may_be_the_one_that_is_lost():
    """Two units that never mix. By the time the slow one is switched off, the basis lies in the two to the last bit."""
    module = fastrnn.RNN(1, 2, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        module.weight_ih_l0.copy_(torch.tensor([[1.0], [0.0]]))
        module.bias_ih_l0.copy_(torch.tensor([0.0, 1.0]))
        module.bias_hh_l0.zero_()
    for T in (3, 100, 1000):
        x = torch.ones(T + 1, 1, dtype=F64)
        x[T] = -1e6
        found = jacobian_spectrum(module, x)
        assert found.row_exponents[0, 0].tolist()[1] == found.log_singular_values[0, 0].tolist()[1] == -math.inf
        if T > 60:  # before, rounding does not hide what is left of the other direction
            assert found.exponents[0, 0].item() == pytest.approx(math.log(0.5), abs=2 / T)
        assert found.log_singular_values[0, 0, 0].item() == pytest.approx((T + 1) * math.log(0.5), rel=1e-12)


def test_when_all_is_lost():
    module = build("RNN_RELU", 1, 3).double()
    with torch.no_grad():
        module.bias_ih_l0.fill_(-100)
    found = jacobian_spectrum(module, torch.zeros(4, 2, 1, dtype=F64))
    assert (found.exponents == -math.inf).all() and (found.log_singular_values == -math.inf).all()
    assert found.memory.tolist() == [0.0] and found.outliving(1).tolist() == [0]
    assert "-inf, -inf, -inf; memory 0 steps; 0 outlive 10" in str(found)


# ---------------------------------------------------------------------------------------------------- what it takes


def same(a, b):
    assert a.row_exponents.equal(b.row_exponents) and a.log_singular_values.equal(b.log_singular_values)
    assert a.steps.equal(b.steps)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_ways_of_giving_a_sequence(kind):
    module, lengths = lively(kind, **MIXED), torch.tensor([4, 7, 2])
    x, hx = normal(7, 3, I, dtype=F64), states(module, 3)
    found = jacobian_spectrum(module, x, hx, lengths=lengths)
    same(jacobian_spectrum(module, pack_padded_sequence(x, lengths, enforce_sorted=False), hx), found)
    first = copy.deepcopy(module)
    first.batch_first = True
    same(jacobian_spectrum(first, x.transpose(0, 1), hx, lengths=lengths), found)
    packed = pack_padded_sequence(x.transpose(0, 1), lengths, batch_first=True, enforce_sorted=False)
    same(jacobian_spectrum(first, packed, hx), found)
    poisoned = x.clone()
    for b, length in enumerate(lengths):
        poisoned[length:, b] = math.nan
    same(jacobian_spectrum(module, poisoned, hx, lengths=lengths), found)
    for b, length in enumerate(lengths.tolist()):
        row = [t[:, b] for t in (hx if kind == "LSTM" else (hx,))]
        alone = jacobian_spectrum(module, x[:length, b], tuple(row) if kind == "LSTM" else row[0])
        assert (alone.row_exponents - found.row_exponents[:, b : b + 1]).abs().max() < 1e-9
        short = jacobian_spectrum(
            module, x[:, b], tuple(row) if kind == "LSTM" else row[0], lengths=torch.tensor(length)
        )
        assert (short.row_exponents - alone.row_exponents).abs().max() < 1e-9
        assert short.steps.equal(alone.steps)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_torch_and_dtypes(kind):
    theirs = build(kind, I, H, module=nn, num_layers=2)
    ours = fastrnn.accelerate(copy.deepcopy(theirs))
    x = normal(6, 2, I)
    exact = jacobian_spectrum(copy.deepcopy(ours).double(), x.double())
    before, rng = copy.deepcopy(theirs.state_dict()), torch.get_rng_state()
    for module in (theirs, ours, ours.eval().freeze()):
        same(jacobian_spectrum(module, x), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(jacobian_spectrum(ours, x), exact)
    assert all(t.equal(before[name]) for name, t in theirs.state_dict().items())
    assert torch.get_rng_state().equal(rng) and all(p.grad is None for p in theirs.parameters())
    half = copy.deepcopy(theirs).bfloat16()
    same(jacobian_spectrum(half, x.bfloat16()), jacobian_spectrum(half.double(), x.bfloat16().double()))


def test_dropout_is_left_out():
    module = fastrnn.LSTM(I, H, 2, dropout=0.9).double()
    x = normal(6, 2, I, dtype=F64)
    same(jacobian_spectrum(module.train(), x), jacobian_spectrum(module.eval(), x))


def test_under_grad_and_inference_modes():
    module, x = fastrnn.GRU(I, H).double(), normal(6, 2, I, dtype=F64)
    plain = jacobian_spectrum(module, x.clone().requires_grad_())
    assert not plain.exponents.requires_grad
    with torch.no_grad():
        same(jacobian_spectrum(module, x), plain)
    with torch.inference_mode():
        same(jacobian_spectrum(module, x), plain)


def test_what_it_prints():
    eigenvalues = torch.tensor([0.99, 0.5, 0.25, 0.125], dtype=F64)
    module, rest = linear_system(eigenvalues.diag())
    found = jacobian_spectrum(module, torch.zeros(600, 1, dtype=F64), rest, burn_in=200)
    assert str(found).splitlines() == [
        "RNN: 4 Lyapunov exponents per step, of 400 steps in 1 row",
        "  layer 0: -0.0101, -0.693, -1.39 ... -2.08; memory 99.5 steps; 1 outlive 10, 0 outlive 100, 0 outlive 1000",
    ]
    both = jacobian_spectrum(fastrnn.LSTM(I, H, 2, bidirectional=True), normal(7, 2, I), lengths=torch.tensor([7, 3]))
    lines = str(both).splitlines()
    assert lines[0] == "LSTM: 10 Lyapunov exponents per step, of 3 to 7 steps in 2 rows"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        f"layer {k} {d}" for k in (0, 1) for d in ("forward", "reverse")
    ]
    explodes, rest = linear_system(1.5 * torch.eye(2, dtype=F64))
    assert jacobian_spectrum(explodes, torch.zeros(5, 1, dtype=F64), rest).memory.tolist() == [math.inf]


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda m, x: jacobian_spectrum(fastrnn.LSTMCell(I, H), x), TypeError, "module: .*, got LSTMCell"),
        (lambda m, x: jacobian_spectrum(nn.Sequential(m), x), TypeError, "module: .*, got Sequential"),
        (lambda m, x: jacobian_spectrum(m, x, k=0), ValueError, "k: expected a whole number from 1 to 5, got 0"),
        (lambda m, x: jacobian_spectrum(m, x, k=6), ValueError, "k: expected a whole number from 1 to 5, got 6"),
        (lambda m, x: jacobian_spectrum(m, x, k=2.0), ValueError, "k: expected a whole number .*, got 2.0"),
        (lambda m, x: jacobian_spectrum(m, x, burn_in=-1), ValueError, "burn_in: expected a whole number from 0 on"),
        (lambda m, x: jacobian_spectrum(m, x, burn_in=6), ValueError, "expected more than burn_in = 6 steps .* got 6"),
        (lambda m, x: jacobian_spectrum(m, x, lengths=torch.tensor([6, 0])), ValueError, "lengths: .*, got 0"),
        (lambda m, x: jacobian_spectrum(m, x, lengths=[6, 1]), TypeError, "lengths: expected a tensor"),
        (lambda m, x: jacobian_spectrum(m, x, lengths=torch.tensor([7, 1])), ValueError, "lengths: .* 0 to T = 6"),
        (
            lambda m, x: jacobian_spectrum(m, pack_padded_sequence(x, [6, 1]), lengths=torch.tensor([6, 1])),
            ValueError,
            "lengths: expected None with a PackedSequence",
        ),
        (lambda m, x: jacobian_spectrum(m, x * math.nan), ValueError, "x, hx: .* all states are finite"),
        (lambda m, x: jacobian_spectrum(m, x[:, :, :1]), RuntimeError, "input.size"),  # torch.nn's own words
        (lambda m, x: jacobian_spectrum(m, x, x), RuntimeError, "Expected hidden"),
    ],
)
def test_bad_arguments_are_named(call, error, text):
    with pytest.raises(error, match=text):
        call(fastrnn.GRU(I, H), normal(6, 2, I))
