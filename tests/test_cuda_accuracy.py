"""Every path on a GPU by the tolerance rule: outputs, final states and every gradient against float64.

err_torch is what torch.nn makes of the same call on the card at the same precision, by cuDNN. The truth is torch.nn in
float64; of float64 itself, `oracle.exact` in long double.
"""

import copy
import functools

import pytest
import torch
from conftest import KINDS, decide_relu, dtype_name, pair
from gpu import PATHS, PRECISIONS, RESIDENT, asked_for, forced, needs_card, on_card, suited, without_cudnn
from test_accuracy import LONG_DOUBLE, away_from_zero, describe, draw, exact, random_configuration, run

pytestmark = needs_card

# T, B, I, H, layers, directions: hidden sizes of every kind (1, odd, not of a multiple of 8, of 16, too wide for a
# block, for a cluster), rows from one to more than a tile, and the two together with layers and directions.
SHAPES = [
    (1, 1, 1, 1, 1, 1), (7, 3, 5, 1, 1, 1), (40, 1, 1, 18, 1, 1), (33, 16, 18, 25, 2, 1), (12, 3, 7, 25, 1, 2),
    (20, 64, 64, 64, 1, 1), (1, 16, 7, 100, 1, 1), (31, 3, 40, 100, 2, 2), (8, 300, 16, 130, 1, 1),
    (40, 200, 32, 64, 1, 1), (50, 1, 256, 256, 1, 1), (16, 10, 128, 256, 2, 2), (9, 64, 256, 256, 1, 1),
    (24, 17, 512, 512, 1, 1), (12, 3, 300, 519, 1, 1), (9, 16, 519, 519, 1, 2), (10, 16, 64, 768, 1, 1),
    (6, 128, 64, 1024, 1, 1), (6, 1, 400, 1150, 1, 1), (5, 64, 64, 1150, 1, 1), (300, 3, 9, 21, 1, 2),
]  # fmt: skip
# One row of a long sequence; cuDNN takes 65,535 steps at most.
LONG = [1000, 5000, pytest.param(70_000, marks=pytest.mark.slow)]
RANDOM = 180
EXACT_WORK = 1e8  # numpy's long double has no BLAS

served_by = pytest.mark.parametrize(
    ("path", "precision"),
    [(path, precision) for precision in PRECISIONS for path in PATHS if precision != "float64" or path == "step"],
)


def configuration(kind, precision, shape, seed=0):
    T, B, I, H, layers, directions = shape
    return random_configuration(0) | dict(
        kind=kind, dtype=PRECISIONS[precision], T=T, B=B, I=I, H=H, layers=layers, directions=directions, proj=0,
        bias=(T + H) % 5 > 0 or kind == "RNN_RELU", batch_first=False, packed=False, hx=True, only_output=False,
        seed=seed,
    )  # fmt: skip


def product_work(kind, shape):
    T, B, I, H, layers, directions = shape
    return T * B * layers * directions * {"LSTM": 4, "GRU": 3}.get(kind, 1) * H * (H + max(I, directions * H))


def by_torch(theirs, c, shown):
    """torch.nn's results: cuDNN's, where cuDNN takes the call."""
    theirs = copy.deepcopy(theirs).cuda()
    if c["T"] <= 65_535:
        try:
            return run(theirs, c, shown, c["dtype"])
        except RuntimeError as error:
            if "cudnn" not in str(error).lower():
                raise
    with without_cudnn():
        return run(theirs, c, shown, c["dtype"])


@functools.lru_cache(maxsize=8)
def without_us(items, precision, biases_decide):
    """What does not depend on the path: our module with its weights, the data, torch's results and the truth."""
    c = dict(items)
    if c["dtype"] == torch.float64 and not LONG_DOUBLE:
        pytest.skip("numpy's long double is no wider than double here: no truth to compare float64 with")
    torch.manual_seed(c["seed"])
    ours, theirs = pair(
        c["kind"], c["I"], c["H"], num_layers=c["layers"], bias=c["bias"], batch_first=c["batch_first"],
        bidirectional=c["directions"] == 2, dtype=c["dtype"], **({"proj_size": c["proj"]} if c["proj"] else {}),
    )  # fmt: skip
    if c["kind"] == "RNN_RELU":
        if biases_decide:
            decide_relu(theirs)
        data = draw(c) if biases_decide else away_from_zero(theirs, c)
        ours.load_state_dict(theirs.state_dict())
    else:
        data = draw(c)
    ours, shown = ours.cuda(), on_card(data)
    with asked_for(precision):
        torchs = by_torch(theirs, c, shown)
        if c["dtype"] == torch.float64:
            truth = exact(theirs, c, data)
        else:
            with without_cudnn():  # torch's plainest implementation
                truth = run(copy.deepcopy(theirs).double().cuda(), c, shown, torch.float64)
    return ours, shown, torchs, truth


def check(rule, c, precision, path, biases_decide=False):
    def three(n):
        drawn = c | {"seed": c["seed"] + 1_000_003 * n}
        ours, data, torchs, truth = without_us(tuple(drawn.items()), precision, biases_decide)
        with asked_for(precision), forced(path):
            return run(ours, c, data, c["dtype"]), torchs, truth

    suited(rule, precision).check(three, c["dtype"], f"{path} {precision} {describe(c)}")


@served_by
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", KINDS)
def test_shape(kind, shape, path, precision, rule):
    if precision == "float64" and product_work(kind, shape) > EXACT_WORK:
        shape = (min(shape[0], 9), min(shape[1], 3), min(shape[2], 65), 65, *shape[4:])
    check(rule, configuration(kind, precision, shape), precision, path, biases_decide=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("T", LONG)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "RNN_RELU"])
def test_a_long_sequence(kind, T, precision, path, rule):
    check(rule, configuration(kind, precision, (T, 1, 3, 18, 1, 1)), precision, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", range(RANDOM))
def test_random_configuration(index, path, rule):
    """The configurations of test_accuracy.py: packed, projected, without biases, ... all that nobody picked by hand."""
    c = random_configuration(index)
    if c["dtype"] == torch.float64 and path in RESIDENT:
        c["dtype"] = torch.float32  # no resident path serves float64
    check(rule, c, dtype_name(c["dtype"]), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_rows_by_the_thousand(kind, path, rule):
    """More rows than any path has room for at a time, as in reinforcement learning on thousands of environments."""
    for precision in ("tf32", "bfloat16"):
        check(rule, configuration(kind, precision, (4, 4096, 32, 256, 1, 1)), precision, path)


def test_every_precision_is_what_torch_means_by_it():
    """cuDNN's error at TF32 is above that at all of float32: else the switch that these tests turn does nothing."""
    c = configuration("LSTM", "float32", (24, 17, 512, 512, 1, 1))
    errors = {}
    for precision in ("float32", "tf32"):
        _, _, torchs, truth = without_us(tuple(c.items()), precision, False)
        errors[precision] = ((torchs["output"].double() - truth["output"]).norm() / truth["output"].norm()).item()
    assert errors["float32"] < 1e-5 < errors["tf32"] < 1e-2, errors
