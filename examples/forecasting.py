"""Forecasts of two time series, one step to a whole season or two ahead, beside naive ones and an autoregression.

    python examples/forecasting.py               trains on the first 80%, forecasts the rest, draws a picture
    python examples/forecasting.py --cell lstm   the same with LSTM

The data come with statsmodels: sunspots a year, 1700 to 2008, and the carbon dioxide in the air over Mauna Loa, weekly,
1958 to 2001, here as monthly means. A GRU reads a window of the last W values, and two linear maps, one of its state
and one of the last H values themselves, give all H values to come at once:

    (z_{t+1} ... z_{t+H}) = A h_t + B (z_{t-H+1} ... z_t)       h_t = GRU(z_{t-W+1} ... z_t)

B is there because an RNN saturates: it does not follow a series out of the range it was trained on (G. Lai, W.-C.
Chang, Y. Yang, H. Liu 2018, "Modeling Long- and Short-Term Temporal Patterns with Deep Neural Networks"). z is the
square root of the sunspots, whose swings grow with their level, and for CO2 the change since the same month of the year
before, in units of its own size in training. Forecasts are the mean of several networks from different first weights.

How long to train, and whether to stretch the windows of training at random, is chosen before the held-out end is looked
at: by forecasts of three spans before it, each by a network that knows what came earlier only. Errors are means of
absolute ones (MAE) over all origins whose H values lie in the held-out end. MASE divides them by that of the seasonal
naive forecast inside of the training part (R. J. Hyndman, A. B. Koehler 2006, "Another look at measures of forecast
accuracy"); below, a season of sunspots is 11 years.
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

import torch
from statsmodels.datasets import co2, sunspots
from statsmodels.tsa.ar_model import AutoReg, ar_select_order
from torch import Tensor, nn

import fastrnn
from fastrnn.drawing import COLOURS, GREY, new_figure, save, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

CELLS = {"gru": "GRU", "lstm": "LSTM", "rnn": "RNN"}
FULL = dict(networks=5, hidden=32, epochs=60)
QUICK = dict(networks=1, hidden=16, epochs=15)
LEARNING_RATE, WEIGHT_DECAY, CLIP, BATCH = 3e-3, 1e-2, 1.0, 32
NAIVE = ("last value", "seasonal naive", "seasonal naive + drift")
TRAINING = 0.8
SPANS, EVERY = 3, 5  # of validation; epochs between two looks at it
STRETCHES = (0.0, 0.2)  # standard deviation of the logarithm of the factor


# ---------------------------------------------------------------------------------------------------- data


class Series:
    """A series of values y (N,), what the network sees of it, z, and the way back.

    An origin is the index of the last value that is known; the forecasts from it are of the next `horizon` values."""

    def __init__(self, name: str, unit: str, when, values, season: int, window: int, horizon: int, differences: bool):
        self.name, self.unit, self.when, self.y = name, unit, list(when), torch.tensor(values, dtype=torch.float64)
        self.season, self.window, self.horizon = season, window, horizon
        self.start = season if differences else 0  # z[i] is of y[start + i]
        self.z = self.y[season:] - self.y[:-season] if differences else self.y.sqrt()
        self.end = int(len(self.y) * TRAINING)  # of the training part

    def origins(self, begin: int, end: int) -> Tensor:
        """All whose forecasts lie in y[begin:end], and which have a whole window behind them."""
        return torch.arange(max(begin, self.start + self.window) - 1, end - self.horizon)

    def before(self, origins: Tensor, z: Tensor) -> Tensor:
        """(W, origins): z up to the origins"""
        return z.unfold(0, self.window, 1)[origins - self.start - self.window + 1].T

    def after(self, origins: Tensor, values: Tensor, start: int = 0) -> Tensor:
        """(origins, H): the values that follow on the origins; values[0] is of y[start]"""
        return values.unfold(0, self.horizon, 1)[origins - start + 1]

    def back(self, z: Tensor, origins: Tensor) -> Tensor:
        """y from forecasts of z, both (origins, H)."""
        if not self.start:
            return z.clamp(min=0).square()
        found: list[Tensor] = []
        for h in range(self.horizon):  # a season before lies a known value or, further ahead, a forecast
            last = found[h - self.season] if h >= self.season else self.y[origins + 1 + h - self.season]
            found.append(last + z[:, h])
        return torch.stack(found, 1)


def both() -> list[Series]:
    year = sunspots.load_pandas().data
    month = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()  # five months of the first seven years
    when = month.index.year + (month.index.month - 1) / 12
    return [
        Series("sunspots", "sunspots", year["YEAR"], year["SUNACTIVITY"].to_numpy(), 11, 22, 11, False),
        Series("CO2", "ppm", when, month.to_numpy(), 12, 36, 24, True),
    ]


# ---------------------------------------------------------------------------------------------------- network


class Forecaster(nn.Module):
    def __init__(self, cell: str, hidden: int, horizon: int):
        super().__init__()
        self.rnn = getattr(fastrnn, CELLS[cell])(1, hidden)
        self.from_state, self.from_values = nn.Linear(hidden, horizon), nn.Linear(horizon, horizon, bias=False)
        nn.init.zeros_(self.from_values.weight)

    def forward(self, z: Tensor) -> Tensor:
        """(B, H) from (W, B)"""
        output, _ = self.rnn(z[..., None])
        return self.from_state(output[-1]) + self.from_values(z[-self.from_values.in_features :].T)


def fit(series: Series, end: int, origins: Tensor, stretch: float, epochs: int, seed: int, args) -> Tensor:
    """Trains on y[:end] alone; the forecasts at `origins` after every EVERY epochs, (epochs // EVERY, origins, H)."""
    torch.manual_seed(seed)
    unit = series.z[: end - series.start].square().mean().sqrt()
    z = (series.z / unit).float()
    known = series.origins(0, end)
    inputs, targets = series.before(known, z), series.after(known, z, series.start)
    model = Forecaster(args.cell, args.hidden, series.horizon)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    found = []
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(known)).split(BATCH):
            factor = (stretch * torch.randn(len(rows))).exp()
            loss = (model(inputs[:, rows] * factor) - targets[rows] * factor[:, None]).abs().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
        if epoch % EVERY == 0:
            with torch.no_grad():
                found.append(series.back(model(series.before(origins, z)).double() * unit, origins))
    return torch.stack(found)


def mae(series: Series, forecasts: Tensor, origins: Tensor) -> Tensor:
    """Mean absolute error at each number of steps ahead: (..., H) from (..., origins, H)."""
    return (forecasts - series.after(origins, series.y)).abs().mean(-2)


def choose(series: Series, args: argparse.Namespace, tick) -> tuple[float, int]:
    """(stretch, epochs) with the least error over three spans before the end of the training part."""
    span, errors = len(series.y) // 8, []
    for stretch in STRETCHES:
        total = torch.zeros(args.epochs // EVERY, dtype=torch.float64)
        for end in range(series.end - SPANS * span, series.end, span):
            origins = series.origins(end, end + span)
            forecasts = fit(series, end, origins, stretch, args.epochs, args.seed, args)
            error = mae(series, forecasts, origins).mean(-1)
            total += error
            tick(f"validation: {error.min():.3g} {series.unit}")
        errors.append(total)
    i, looks = divmod(torch.stack(errors).argmin().item(), args.epochs // EVERY)
    return STRETCHES[i], EVERY * (looks + 1)


# ---------------------------------------------------------------------------------------------------- baselines


def last_value(series: Series, origins: Tensor) -> Tensor:
    return series.y[origins, None].expand(-1, series.horizon)


def seasonal(series: Series, origins: Tensor, drift: bool) -> Tensor:
    """The last known value of the same time of the season; with the mean change of a season in training, or without."""
    ahead = torch.arange(1, series.horizon + 1)
    seasons = (ahead + series.season - 1) // series.season
    y = series.y[: series.end]
    change = (y[series.season :] - y[: -series.season]).mean() if drift else 0.0
    return series.y[origins[:, None] + ahead - seasons * series.season] + seasons * change


def autoregression(series: Series, origins: Tensor) -> Tensor:
    """statsmodels' AutoReg of z, fitted to the training part, its lags chosen there by BIC."""
    known = series.z[: series.end - series.start].numpy()
    lags = ar_select_order(known, 2 * series.season, ic="bic").ar_lags
    parameters = AutoReg(known, lags).fit().params
    everything, found = AutoReg(series.z.numpy(), lags), []
    for t in (origins - series.start).tolist():
        ahead = everything.predict(parameters, start=t + 1, end=t + series.horizon, dynamic=0)
        found.append(torch.from_numpy(ahead))
    return series.back(torch.stack(found), origins)


class Result:
    """What each way forecasts of the held-out end of a series, and its errors."""

    def __init__(self, series: Series, args: argparse.Namespace, tick):
        self.series, self.origins = series, series.origins(series.end, len(series.y))
        self.stretch, self.epochs = choose(series, args, tick)
        networks = []
        for i in range(args.networks):
            seed = (args.seed + i) % 2**32
            networks.append(fit(series, series.end, self.origins, self.stretch, self.epochs, seed, args)[-1])
            tick("held-out end")
        self.ours = f"fastrnn.{CELLS[args.cell]}"
        self.forecasts = {
            "last value": last_value(series, self.origins),
            "seasonal naive": seasonal(series, self.origins, False),
            "seasonal naive + drift": seasonal(series, self.origins, True),
            "AutoReg": autoregression(series, self.origins),
            self.ours: torch.stack(networks).mean(0),
        }
        self.errors = {name: mae(series, forecast, self.origins) for name, forecast in self.forecasts.items()}
        y = series.y[: series.end]
        self.scale = (y[series.season :] - y[: -series.season]).abs().mean()  # of MASE

    def skill(self) -> float:
        """The share of the best naive forecast's error that the network does without."""
        naive = min(self.errors[name].mean().item() for name in NAIVE)
        return 1 - self.errors[self.ours].mean().item() / naive


# ---------------------------------------------------------------------------------------------------- report


def report(results: list[Result]) -> bool:
    """Prints the figures; False if a naive forecast is better than ours."""
    good = True
    for r in results:
        s = r.series
        rows = [
            [name, *(f"{e:.3g}" for e in (error[0], error[-1], error.mean())), f"{error.mean() / r.scale:.2f}"]
            for name, error in r.errors.items()
        ]
        span = f"{s.when[s.end]:.0f} to {s.when[-1]:.0f}"
        heading = f"{s.name}, {span}: mean absolute error, {s.unit}, {len(r.origins)} origins"
        print_table(heading, ["forecast", "1 step", f"{s.horizon} steps", "all steps", "MASE"], rows)
        better = [name for name, error in r.errors.items() if error.mean() < r.errors[r.ours].mean()]
        print(f"Chosen before: {r.epochs} epochs, windows stretched by {r.stretch:.0%}")
        print(f"Error of {r.ours}: {r.skill():.1%} below the best naive forecast's; ", end="")
        print(f"below it is: {', '.join(better) or 'none'}\n")
        good = good and r.skill() > 0
    if not good:
        print("FAULT: a naive forecast has less error than the network.")
    return good


def draw(results: list[Result], heading: str, path: Path) -> None:
    """The held-out end with forecasts, each as far as the horizon, and the error at each number of steps ahead."""
    figure = new_figure(11.5, 7.2)
    for r, (end, error) in zip(results, figure.subplots(len(results), 2, width_ratios=[2, 1], squeeze=False)):
        s = r.series
        first = s.end - s.window
        end.plot(s.when[first:], s.y[first:], color="#212529", linewidth=1.2, label="what came")
        end.axvline(s.when[s.end], color=GREY, linewidth=1, linestyle=":")
        ways = {"seasonal naive + drift": (COLOURS[4], "--"), r.ours: (COLOURS[0], "-")}
        for name, (colour, style) in ways.items():
            for i in range(len(r.origins) - 1, -1, -s.horizon):
                t = r.origins[i].item() + 1
                end.plot(s.when[t : t + s.horizon], r.forecasts[name][i], style, color=colour, linewidth=1.8,
                         label=name if i == len(r.origins) - 1 else None)  # fmt: skip
        end.set_ylabel(s.unit)
        end.legend(frameon=False, fontsize=9, loc="upper left", ncols=3)
        end.set_ylim(top=end.get_ylim()[1] + 0.12 * (end.get_ylim()[1] - end.get_ylim()[0]))
        title(end, f"{s.name}: forecasts of {s.horizon} steps; training ends at the dotted line")
        for colour, (name, e) in zip([GREY, COLOURS[5], COLOURS[4], COLOURS[2], COLOURS[0]], r.errors.items()):
            error.plot(range(1, s.horizon + 1), e, color=colour, linewidth=2.4 if name == r.ours else 1.4, label=name)
        error.set_ylim(bottom=0)
        error.set_xlabel("steps ahead")
        error.set_ylabel(f"mean absolute error, {s.unit}")
        title(error, "Error on the held-out end")
        tidy(end, error)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower right", frameon=False, ncols=5, fontsize=9)
    figure.suptitle(heading, fontsize=12)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(networks="networks whose mean is the forecast", hidden="hidden size", epochs="epochs at most")
    top = program("Forecasts of sunspots and CO2.", sizes, FULL, "forecasting.png")
    top.add_argument("--cell", choices=CELLS, default="gru", help="which RNN (default: gru)")
    return top


def ticker(progress: Progress, name: str):
    """A function that moves the bar one further."""
    steps = count(1)
    return lambda text: progress.update(name, next(steps), text)


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args = settle(top.parse_args(argv), FULL, QUICK)
    if args.epochs < EVERY:
        top.error(f"argument --epochs: expected at least {EVERY}, got {args.epochs}")
    many = both()
    for series in many:
        held_out = len(series.y) - series.end
        print(f"{series.name}: {series.end} values to train on, {held_out} held out, {series.horizon} steps ahead.")
    results, total = [], len(STRETCHES) * SPANS + args.networks
    with Progress({series.name: total for series in many}) as progress:
        for series in many:
            results.append(Result(series, args, ticker(progress, series.name)))
    good = report(results)
    skill = [f"{r.series.name} {r.skill():.0%} below the best naive one's" for r in results]
    size = f"{CELLS[args.cell]} of {args.hidden}, mean of {args.networks} network{'s' * (args.networks > 1)}"
    heading = f"Error of forecasts: {', '.join(skill)}\n{size}, seed {args.seed}"
    draw(results, heading, args.output)
    print(f"Picture: {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
