"""examples/comparison.py: that it runs and prints what it promises, and that the comparison is fair."""

import argparse

import pytest
import torch
from programs import is_whole_png, load, run, table
from torch import nn

import fastrnn

comparison = load("comparison")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data():
    return comparison.Digits(seed=0)


def test_as_a_program(tmp_path):
    done = run("comparison", "--quick", "--threads", "1", "--output", "c.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    majority, linear = (float(table(done.stdout, name)[1].rstrip("%")) for name in ("the most common", "logistic"))
    assert 7 < majority < 15 and linear > 90
    for kind in comparison.KINDS:
        _, width, parameters, rate, accuracy, seeds, epoch, inference, kept = table(done.stdout, kind)
        assert abs(int(parameters.replace(",", "")) / 7000 - 1) <= 0.03 and int(width) > 1
        assert float(rate) in comparison.RATES
        low, high = (float(text.rstrip("%")) for text in seeds.split(" to "))
        assert majority < low <= float(accuracy.rstrip("%")) <= high < linear
        assert min(map(float, (epoch, inference, kept))) > 0
    assert is_whole_png(tmp_path / "c.png") and [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_a_bad_argument_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        comparison.main(["--parameters", "none"])
    assert stopped.value.code == 2
    assert "argument --parameters" in capsys.readouterr().err


def test_parts_do_not_overlap_and_the_test_part_is_not_standardised_by(data):
    rows = torch.cat([data.train, data.validation, data.test])
    assert rows.sort().values.equal(torch.arange(1797)) and len(data.train) == 1079
    train = data.images[data.train]
    assert abs(train.mean().item()) < 1e-5 and abs(train.std().item() - 1) < 1e-5
    assert abs(data.images[data.test].mean().item()) > 1e-4
    digits = comparison.load_digits()
    for i in (0, 77, 1796):  # the two pixels of step t are the neighbours 2t and 2t + 1, row by row
        pixels = torch.tensor(digits.data[i])
        line = data.images[i].double().flatten()
        assert (torch.corrcoef(torch.stack([line, pixels]))[0, 1] - 1).abs() < 1e-6
        assert data.labels[i] == digits.target[i]


def test_the_baselines(data):
    test = data.labels[data.test]
    assert data.majority() in [(test == digit).double().mean().item() for digit in range(10)]
    assert 0.94 < data.logistic_regression() < 0.99


def test_epochs_have_every_training_row_once(data):
    size = 100
    steps = list(comparison.batches(data, 2, size, seed=4))
    first, second = torch.cat(steps[:11]), torch.cat(steps[11:])
    assert len(steps) == 22 and not first.equal(second)
    assert first.sort().values.equal(data.train.sort().values) and second.sort().values.equal(data.train.sort().values)


@pytest.mark.parametrize("kind", comparison.KINDS)
@pytest.mark.parametrize("budget", [7_000, comparison.FULL["parameters"], 30_000])
def test_the_width_is_the_one_nearest_to_the_budget(kind, budget):
    width = comparison.solve(kind, budget)
    counts = [abs(comparison.parameters(comparison.KINDS[kind](w)) - budget) for w in (width - 1, width, width + 1)]
    assert counts[1] == min(counts) and counts[1] <= comparison.OFF_BUDGET * budget


@pytest.mark.parametrize("kind", comparison.KINDS)
def test_models_see_the_whole_sequence_and_no_other_row(kind, data):
    torch.manual_seed(1)
    model = comparison.KINDS[kind](12).double().eval()
    x = data.images[:5].double().requires_grad_()
    logits = model(x)
    assert logits.shape == (5, 10)
    (gradient,) = torch.autograd.grad(logits[2].square().sum(), x)
    assert (gradient[2].abs().sum(-1) > 0).all()
    assert not gradient[[0, 1, 3, 4]].any()


def test_validation_chooses_the_rate_and_seeds_make_different_models(data, monkeypatch):
    """The rate that is best on validation, whatever the test part says."""
    judged = []

    def judge(self, x, y):
        judged.append(len(x))
        assert x.equal(data.images[data.validation]) and y.equal(data.labels[data.validation])
        return (0.5, -abs(self.rate - 2e-2))

    monkeypatch.setattr(comparison, "KINDS", {k: comparison.KINDS[k] for k in ("RNN", "GRU")})
    monkeypatch.setattr(comparison.Trainee, "judge", judge)
    args = argparse.Namespace(epochs=1, batch=600, seeds=3, seed=0)
    trained = comparison.train_all(data, {"RNN": 5, "GRU": 4}, args)
    assert len(judged) == 2 * len(comparison.RATES)
    for trainees in trained.values():
        assert [t.seed for t in trainees] == [0, 1, 2] and {t.rate for t in trainees} == {2e-2}
        assert all(len(t.losses) == len(t.seconds) == 2 for t in trainees)
        assert len({t.losses[0] for t in trainees}) == 3


def test_what_is_kept_for_backward():
    """By hand: of tanh its output; of one gate's RNN one value, of LSTM five, for each step, row and unit."""
    B, T, H = 6, comparison.STEPS, 16
    x, y = torch.randn(B, T, comparison.PIXELS), torch.randint(10, (B,))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(T * comparison.PIXELS, 10)

        def forward(self, x):
            return self.linear(x.flatten(1)).tanh()

    plain = comparison.kept_for_backward(Plain(), x, y)
    logits = B * 10 * 4
    assert 2 * logits <= plain <= 2 * logits + 64  # tanh's, log_softmax's, and the loss's total weight
    cells = {"RNN": 1, "LSTM": 5, "GRU": 5}
    for kind, values in cells.items():
        model = comparison.KINDS[kind](H)
        found = comparison.kept_for_backward(model, x, y)
        tape = values * B * T * H * 4
        assert tape <= found <= 1.05 * tape + 4096, (kind, found / tape)
        assert all(p.grad is not None for p in model.parameters())


def test_the_recurrent_models_are_fastrnns_and_begin_as_is_said():
    for kind, gates in (("RNN", 1), ("LSTM", 4), ("GRU", 3)):
        rnn = comparison.KINDS[kind](9).rnn
        assert type(rnn) is getattr(fastrnn, kind)
        for gate in rnn.weight_hh_l0.split(9):
            assert (gate @ gate.T - torch.eye(9)).abs().max() < 1e-5
        bias = rnn.bias_ih_l0 + rnn.bias_hh_l0
        assert bias.sum() == (9 if kind == "LSTM" else 0) and len(bias) == 9 * gates
        if kind == "LSTM":
            assert (bias[9:18] == 1).all()


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        (dict(accuracies=[0.09, 0.1]), "GRU has learned nothing: accuracy 9.5%"),
        (dict(finite=False), "GRU has learned nothing"),
        (dict(parameters=9_000), "GRU has 9000 parameters, expected 10500 within 3%"),
    ],
    ids=["nothing", "chance", "not finite", "too small"],
)
def test_what_the_report_would_notice(change, fault, capsys):
    one = dict(parameters=10_600, rate=0.01, accuracies=[0.9, 0.94], finite=True, epoch=0.1, inference=0.01, kept=2**20)
    found = {kind: dict(one) for kind in comparison.KINDS}
    found["GRU"] |= change
    args = argparse.Namespace(epochs=1, batch=2, seeds=2, parameters=10_500)
    baselines = {"the most common digit": 0.1, "logistic regression": 0.97}
    assert comparison.report(found, dict.fromkeys(found, 7), baselines, args) is (fault is None)
    output = capsys.readouterr().out
    assert f"FAULT: {fault}" in output if fault else "FAULT" not in output
    assert table(output, "LSTM")[4:6] == ["92.0%", "90.0% to 94.0%"]
