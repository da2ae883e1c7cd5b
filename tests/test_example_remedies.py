"""examples/remedies.py: that it runs and prints what it promises, and what could be wrong without anyone noticing."""

import argparse
import math

import pytest
import torch
from programs import is_whole_png, load, run, table
from torch import nn

import fastrnn

remedies = load("remedies")


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small gain nothing from two."""
    torch.set_num_threads(1)


class Silent:
    def update(self, *_):
        pass


def arguments(**changes):
    return argparse.Namespace(**{"delay": 6, "steps": 3, "hidden": 5, "batch": 4, "seed": 2} | changes)


def recipe(name):
    return next(r for r in remedies.recipes() if r.name == name)


def test_as_a_program(tmp_path):
    done = run("remedies", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    names = [r.name for r in remedies.recipes()]
    rows = {name: table(done.stdout, f"{name}  ") for name in names}
    losses = {name: float(row[1]) for name, row in rows.items()}
    assert all(len(row) == 7 and math.isfinite(losses[name]) for name, row in rows.items())
    assert table(done.stdout, "guessing") == ["guessing", "2.0794", "12.5%"]
    best = min(losses, key=losses.get)
    assert f"Best:       {best}, {losses[best]:.4f} where guessing costs 2.0794" in done.stdout
    assert losses[best] < 1.04 < losses["tanh"]
    assert float(rows["tanh"][4]) < 0.1 * float(rows["tanh, orthogonal, norm"][4])  # what reaches the first step
    assert [p.name for p in tmp_path.iterdir()] == ["remedies.png"]
    assert is_whole_png(tmp_path / "remedies.png")


def test_a_bad_argument_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        remedies.main(["--delay", "0"])
    assert stopped.value.code == 2
    assert "argument --delay" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_the_first_step_tells_the_symbol():
    x, symbols = remedies.draw_batch(200, 7, torch.Generator().manual_seed(0))
    assert x.shape == (9, 200, 9) and symbols.unique().tolist() == list(range(8))
    assert x[0].argmax(1).equal(symbols) and x[0].sum() == 200
    assert not x[1:-1].any()
    assert x[-1].equal(torch.eye(9)[8].expand(200, 9))


def test_the_baseline_is_what_guessing_costs():
    _, symbols = remedies.draw_batch(100, 1, torch.Generator().manual_seed(0))
    assert nn.functional.cross_entropy(torch.zeros(100, 8), symbols).item() == pytest.approx(remedies.BASELINE)


def test_clipping():
    def gradients(how, scale):
        parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
        parameters[0].grad = scale * torch.tensor([3.0, 0.0, -0.01])
        parameters[1].grad = scale * torch.tensor([0.0, 4.0])
        norm = remedies.clip(parameters, how)
        assert norm == pytest.approx(scale * math.hypot(5, 0.01))
        return torch.cat([p.grad for p in parameters])

    whole = torch.tensor([3.0, 0.0, -0.01, 0.0, 4.0])
    assert gradients(None, 1).equal(whole)
    assert (gradients("norm", 1) - whole / math.hypot(5, 0.01)).abs().max() < 1e-6
    assert gradients("norm", 0.1).equal(0.1 * whole)  # short ones stay
    assert gradients("value", 1).equal(torch.tensor([0.1, 0.0, -0.01, 0.0, 0.1]))


@pytest.mark.parametrize("name", ["tanh", "LSTM, norm", "GRU, chrono, norm"])
def test_what_reaches_the_first_step_is_autograds(name):
    """The first training step again, step by step with torch.nn's cell."""
    args, found = arguments(), recipe(name)
    remedies.train(found, args, Silent())
    torch.manual_seed(args.seed)
    model = remedies.Model(recipe(name).make(9, args.hidden, args.delay + 2))
    cell = getattr(nn, f"{type(model.rnn).__name__}Cell")(9, args.hidden)
    cell.load_state_dict({key.removesuffix("_l0"): t for key, t in model.rnn.state_dict().items()})
    generator = torch.Generator().manual_seed(args.seed)
    remedies.draw_batch(4, args.delay, generator)
    x, symbols = remedies.draw_batch(args.batch, args.delay, generator)
    states = [cell(x[0])]
    for step in x[1:]:
        states.append(cell(step, states[-1]))
    pairs = [s if isinstance(s, tuple) else (s,) for s in states]
    loss = nn.functional.cross_entropy(model.linear(pairs[-1][0]), symbols)
    assert loss.item() == pytest.approx(found.losses[0], rel=1e-6)
    first, last = (
        math.hypot(*(g.norm().item() for g in torch.autograd.grad(loss, pair, retain_graph=True)))
        for pair in (pairs[0], pairs[-1])
    )
    assert remedies.flow(found) == pytest.approx(first / last, rel=1e-3)


def test_every_recipe_sees_the_same_batches_and_a_seed_decides(monkeypatch):
    seen, draw = [], remedies.draw_batch

    def watched(*args):
        batch = draw(*args)
        seen.append(batch[1])
        return batch

    monkeypatch.setattr(remedies, "draw_batch", watched)
    runs = []
    for name in ("tanh", "LSTM, chrono, norm", "LSTM, chrono, norm"):
        done = recipe(name)
        remedies.train(done, arguments(), Silent())
        runs.append((seen.copy(), done.losses, done.norms, done.growth))
        seen.clear()
    for symbols, *_ in runs[1:]:
        assert all(a.equal(b) for a, b in zip(symbols, runs[0][0], strict=True))
    assert runs[1][1:] == runs[2][1:]
    other = recipe("tanh")
    remedies.train(other, arguments(seed=3), Silent())
    assert other.losses != runs[0][1]


def test_growth_is_that_of_the_recurrence():
    rnn = fastrnn.RNN(9, 4, nonlinearity="relu")
    with torch.no_grad():
        fastrnn.init.identity(rnn, 0.9).bias_ih_l0.fill_(1.0)
    x, _ = remedies.draw_batch(3, 20, torch.Generator().manual_seed(0))
    assert remedies.growth(remedies.Model(rnn), x) == pytest.approx(math.log(0.9))
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(1e30)
    assert math.isnan(remedies.growth(remedies.Model(rnn), x))


def test_a_network_that_learned_nothing_is_a_fault(capsys):
    done = [recipe("tanh")]
    remedies.train(done[0], arguments(), Silent())
    assert not remedies.report(done, arguments())
    assert "\nFAULT: expected a loss below 1.04" in capsys.readouterr().out
