"""examples/forecasting.py: that it runs, and what could be wrong without anyone noticing: the future in what is
trained, chosen, scaled or filled in, windows and forecasts that are off by one, baselines, errors."""

import argparse
import copy

import numpy as np
import pytest
import torch
from programs import is_whole_png, load, run, table
from statsmodels.datasets import co2

example = load("forecasting")
SERIES = example.both()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=SERIES, ids=lambda series: series.name)
def series(request):
    return request.param


def settings():
    return argparse.Namespace(cell="gru", seed=2, **example.QUICK | dict(epochs=5))


def test_it_runs(tmp_path):
    done = run("forecasting", "--quick", "--threads", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for part, held_out in zip(done.stdout.split("mean absolute error")[1:], ("52 origins", "83 origins"), strict=True):
        assert held_out in part
        ours, *naive = (
            [float(cell) for cell in table(part, name)[1:]]
            for name in ("fastrnn.GRU", "last value", "seasonal naive  ", "seasonal naive + drift")
        )
        assert ours[2] < min(row[2] for row in naive)
        assert ours[3] < min(row[3] for row in naive)
    assert [p.name for p in tmp_path.iterdir()] == ["forecasting.png"]
    assert is_whole_png(tmp_path / "forecasting.png")


def test_too_few_epochs_are_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        example.main(["--epochs", "4"])
    assert stopped.value.code == 2
    assert "argument --epochs: expected at least 5, got 4" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- data


def test_what_is_filled_in_is_in_training():
    raw = co2.load_pandas().data["co2"].resample("MS").mean().to_numpy()
    series = SERIES[1]
    gaps = np.isnan(raw)
    assert gaps.sum() == 5 and np.flatnonzero(gaps).max() + 1 < series.end // 4
    assert np.array_equal(series.y.numpy()[~gaps], raw[~gaps])


def test_windows_and_what_follows_on_them(series):
    origins = series.origins(series.end, len(series.y))
    y, z, W, H = series.y, series.z, series.window, series.horizon
    before, after = series.before(origins, z), series.after(origins, y)
    assert before.shape == (W, len(origins)) and after.shape == (len(origins), H)
    for i, t in enumerate(origins.tolist()):
        assert torch.equal(before[:, i], z[t + 1 - W - series.start : t + 1 - series.start])
        assert torch.equal(after[i], y[t + 1 : t + 1 + H])
    assert torch.equal(after[0], y[series.end : series.end + H])  # the first origin is the last of training
    assert torch.equal(after[-1], y[-H:])
    known = series.origins(0, series.end)
    assert series.before(known, z).size(1) == len(known)
    assert known[0] == series.start + W - 1
    assert known[-1] + H == series.end - 1  # no target of training is held out


def test_the_way_back(series):
    origins = series.origins(0, len(series.y))
    truth = series.after(origins, series.y)
    found = series.back(series.after(origins, series.z, series.start), origins)
    assert (found - truth).abs().max() <= 1e-12 * truth.abs().max()


def test_nothing_is_known_of_the_future(series, monkeypatch):
    """With other values after the training part the same is chosen, and forecast from its end, bit for bit.

    The other values lie on both sides: an absolute error further off in the same direction has the same gradient."""
    monkeypatch.setattr(example, "SPANS", 1)
    other = copy.copy(series)
    other.y = series.y.clone()
    other.y[series.end :: 2], other.y[series.end + 1 :: 2] = 0, 3 * series.y[series.end + 1 :: 2] + 100
    other.z = other.y[other.start :] - other.y[: -other.start] if series.start else other.y.sqrt()
    found, want = (example.Result(s, settings(), lambda text: None) for s in (other, series))
    assert (found.stretch, found.epochs, found.scale) == (want.stretch, want.epochs, want.scale)
    for name, forecasts in want.forecasts.items():
        assert torch.equal(found.forecasts[name][0], forecasts[0]), name
        assert not torch.equal(found.forecasts[name][20], forecasts[20]), name
        assert (found.errors[name] > want.errors[name]).all(), name


def test_validation_trains_on_what_came_before(series):
    """The same for a span of validation: what lies in it does not reach the network that forecasts it."""
    end = series.end - len(series.y) // 8
    origins = series.origins(end, series.end)
    other = copy.copy(series)
    other.z = series.z.clone()
    other.z[end - series.start :: 2] += 5
    other.z[end - series.start + 1 :: 2] -= 5
    found, want = (example.fit(s, end, origins[:1], 0.2, 5, 1, settings()) for s in (other, series))
    assert torch.equal(found, want)


# ---------------------------------------------------------------------------------------------------- forecasts


def test_the_forecaster_is_its_equation(series):
    torch.manual_seed(0)
    model, H = example.Forecaster("gru", 8, series.horizon), series.horizon
    torch.nn.init.normal_(model.from_values.weight)
    z = torch.randn(series.window, 5)
    with torch.no_grad():
        _, h_n = model.rnn(z[..., None])
        want = h_n[0] @ model.from_state.weight.T + model.from_state.bias + z[-H:].T @ model.from_values.weight.T
        assert (model(z) - want).abs().max() < 1e-5


def test_naive_forecasts_are_their_definition(series):
    origins, y, S = series.origins(series.end, len(series.y)), series.y, series.season
    change = (y[S : series.end] - y[: series.end - S]).mean()
    last, plain, drift = (
        example.last_value(series, origins),
        example.seasonal(series, origins, False),
        example.seasonal(series, origins, True),
    )
    for i, t in enumerate(origins.tolist()):
        for h in range(1, series.horizon + 1):
            back, seasons = t + h, 0
            while back > t:
                back, seasons = back - S, seasons + 1
            assert last[i, h - 1] == y[t]
            assert plain[i, h - 1] == y[back]
            assert drift[i, h - 1] == y[back] + seasons * change


def test_the_autoregression_is_least_squares_on_training(series):
    """One step ahead each, by numpy, its own forecasts fed back."""
    known = series.z[: series.end - series.start].numpy()
    lags = example.ar_select_order(known, 2 * series.season, ic="bic").ar_lags
    p = max(lags)
    rows = np.array([[1, *(known[t - k] for k in lags)] for t in range(p, len(known))])
    weights = np.linalg.lstsq(rows, known[p:], rcond=None)[0]
    origins = series.origins(series.end, len(series.y))[:7]
    want = []
    for t in (origins - series.start).tolist():
        values = series.z[: t + 1].tolist()
        for _ in range(series.horizon):
            values.append(weights @ [1, *(values[len(values) - k] for k in lags)])
        want.append(values[t + 1 :])
    want = series.back(torch.tensor(want, dtype=torch.float64), origins)
    assert (example.autoregression(series, origins) - want).abs().max() < 1e-8 * want.abs().max()


def test_errors_are_their_definition(series):
    origins = series.origins(series.end, len(series.y))
    forecasts = example.last_value(series, origins)
    found = example.mae(series, forecasts, origins)
    for h in (1, series.horizon):
        each = [
            abs(series.y[t + h] - series.y[t]).item() for t in range(series.end - 1, len(series.y) - series.horizon)
        ]
        assert found[h - 1].item() == pytest.approx(sum(each) / len(each), rel=1e-12)
