"""examples/worked_example.py: its equations for any weights, and that a wrong number does not pass unnoticed."""

import random
import re

import pytest
import torch
from programs import is_whole_png, load, run

worked = load("worked_example")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def drawn(seed):
    """Random weights with every pre-activation far enough from 0 that finite differences stay on one side of it."""
    generator = random.Random(seed)
    while True:
        weights = {
            name: [[generator.gauss(0, 1) for _ in row] for row in rows] for name, rows in worked.WEIGHTS.items()
        }
        if all(abs(a) > 0.01 for row in worked.forward(weights)["a"] for a in row):
            return weights


def test_it_runs(tmp_path):
    done = run("worked_example", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    verdicts = re.findall(r"^(.+?)  +(\d+)  +(\S+)  (\S+)  holds$", done.stdout, re.M)
    assert len(verdicts) == 6
    for _, count, gap, limit in verdicts:
        assert int(count) >= 8 and float(gap) <= float(limit) <= 1e-8
    before, after = re.search(r"^One step of gradient descent.*: L = (\S+) -> (\S+)$", done.stdout, re.M).groups()
    assert float(after) < float(before)
    assert "FAULT" not in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["worked_example.png"]
    assert is_whole_png(tmp_path / "worked_example.png")


def test_a_bad_argument_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        worked.main(["--output", "nowhere/p.png"])
    assert stopped.value.code == 2
    assert "argument --output" in capsys.readouterr().err


def test_the_equations_hold_for_any_weights():
    off = on = 0
    for seed in range(20):
        weights = drawn(seed)
        rows, good = worked.judge(worked.checks(weights))
        assert good, rows
        found = [a > 0 for row in worked.forward(weights)["a"] for a in row]
        off, on = off + found.count(False), on + found.count(True)
    assert min(off, on) >= 20


def test_a_unit_that_is_off_gets_no_gradient():
    n = worked.forward(worked.WEIGHTS)
    g = worked.backward(worked.WEIGHTS, n)
    off = [(t, i) for t in worked.STEPS for i in worked.UNITS if n["a"][t][i] <= 0]
    assert off == [(1, 1)]
    assert n["h"][2][1] == 0 and g["dh"][1][1] != 0 and g["da"][1][1] == 0
    assert all(g["shares"][name][1][1] == [0.0] * worked.SHAPES[name][1] for name in ("W_ih", "W_hh", "b"))
    assert all(g["da"][t][i] == g["dh"][t][i] != 0 for t in worked.STEPS for i in worked.UNITS if (t, i) != (1, 1))


def test_paths_are_products_of_jacobians():
    weights = drawn(3)
    n = worked.forward(weights)
    W_hh, (w,) = (torch.tensor(weights[name], dtype=torch.float64) for name in ("W_hh", "w"))
    for t in worked.STEPS:
        jacobian = torch.eye(2, dtype=torch.float64)  # dh_T / dh_t
        for s in range(t + 1, len(n["a"])):
            jacobian = (torch.tensor(n["a"][s]) > 0).double().diag() @ W_hh @ jacobian
        for unit in worked.UNITS:
            found = list(worked.paths(weights, n, 1.0, t, unit))
            assert len({units for units, _ in found}) == len(found) == 2 ** (len(n["a"]) - 1 - t)
            assert all(units[0] == unit for units, _ in found)
            assert abs(sum(p for _, p in found) - (w @ jacobian)[unit]) <= 1e-12


@pytest.mark.parametrize("name", ["W_ih", "W_hh", "b", "w", "c"])
def test_a_wrong_gradient_is_noticed(name, monkeypatch, capsys):
    right = worked.backward

    def wrong(weights, n, *rest):
        g = right(weights, n, *rest)
        g["sums"][name][-1][-1] += 1e-6
        return g

    monkeypatch.setattr(worked, "backward", wrong)
    monkeypatch.setattr(worked, "draw", lambda *_: None)
    assert worked.main([]) == 1
    printed = capsys.readouterr().out
    assert re.search("^FAULT", printed, re.M)
    assert re.search("^gradients: fastrnn.RNN.*fails$", printed, re.M)
    assert re.search("^gradients: finite differences.*fails$", printed, re.M)


def test_an_open_gate_where_a_unit_is_off_is_noticed(monkeypatch, capsys):
    right = worked.backward
    monkeypatch.setattr(worked, "backward", lambda weights, n: right(weights, n | {"a": [[1.0, 1.0]] * 3}))
    monkeypatch.setattr(worked, "draw", lambda *_: None)
    assert worked.main([]) == 1
    failed = re.findall("^(.*?)  .*fails$", capsys.readouterr().out, re.M)
    assert len(failed) == 5  # everything but the forward pass


def test_what_is_not_a_number_fails():
    rows, good = worked.judge([("a", [1.0, 2.0], [1.0, float("nan")], 1e-12)])
    assert not good and rows[0][-1] == "▼ fails"
    with pytest.raises(ValueError, match="expected 2 numbers, got 1"):
        worked.judge([("a", [1.0, 2.0], [1.0], 1e-12)])
