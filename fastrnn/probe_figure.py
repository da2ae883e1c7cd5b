"""A probe's figures: onto matplotlib's axes, as one PNG, and to TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path

from fastrnn import diagnosis
from fastrnn.drawing import COLOURS, GREY, new_figure, save, tidy, title

MOST = 4  # layers that get a row of their own
NAMED, NAMED_WEIGHTS = 8, 24  # lines that a legend has room for


def plot(probe, path: str | Path) -> None:
    save(figure(probe), path)


def figure(probe):
    layers = probe.layers()
    if not layers:
        raise RuntimeError("probe: expected at least one backward pass before it is drawn, got none")
    shown = layers
    if len(layers) > MOST:
        shown = sorted(layers, key=lambda layer: (diagnosis.flow(layer.last) or [0.0])[-1])[:MOST]
        shown.sort(key=layers.index)
    found = new_figure(15, 4.2 * (1 + len(shown)), dpi=80)
    axes = found.subplots(1 + len(shown), 3, squeeze=False)
    flow(axes[0, 0], layers)
    states(axes[0, 1], layers)
    weights(axes[0, 2], probe.weights())
    for layer, (left, middle, right) in zip(shown, axes[1:]):
        heat_map(left, layer)
        gates(middle, layer)
        saturation(right, layer)
    more = f", {MOST} of {len(layers)} layers below" if len(layers) > MOST else ""
    steps = "1 training step" if probe.trained == 1 else f"{probe.trained} training steps"
    found.suptitle(f"Probe, {steps}{more}", fontsize=13)
    return found


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _legend(axes, most: int, **options) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > most:
        options["title"] = f"the first {most} of {len(handles)}"
        options["title_fontsize"] = options["fontsize"]
    axes.legend(handles[:most], labels[:most], **options)


def _alone(values) -> str | None:
    """The marker of a line: one of a single point would not be seen."""
    return "o" if len(values) == 1 else None


def _note(axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)


def flow(axes, layers, label: str | None = None, color=None) -> None:
    drawn = False
    for i, layer in enumerate(layers):
        steps = diagnosis.longest(layer.last)
        gradient = layer.last.h_grad if layer.last.c is None else layer.last.c_grad
        norms = [x if 0 < x < math.inf else math.nan for x in gradient[steps].tolist()]
        left = diagnosis.flow(layer.last)
        if not left:
            continue
        drawn, colour = True, color or _colour(i)
        axes.plot(
            range(len(norms)), norms, color=colour, linewidth=1.8, marker=_alone(norms), label=label or layer.name
        )
        first = len(norms) - len(left)
        rest = [norms[first] * 10**value if abs(value) < 300 else math.nan for value in left]
        axes.plot(range(first, len(norms)), rest, color=colour, linewidth=1.1, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("distance from the last step, steps")
    axes.set_ylabel("norm of dL/dh (LSTM: dL/dc)")
    title(axes, "Gradient flow (dashed: of the last step's alone)")
    if drawn:
        axes.set_xlim(left=-0.1 if axes.get_xlim()[1] < 0.5 else 0)
        _legend(axes, NAMED, frameon=False, fontsize=9)
    else:
        _note(axes, "no gradient")
    tidy(axes)


def heat_map(axes, layer) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    numbers = sorted(layer.history)
    T = max(len(layer.history[n]) for n in numbers)
    values = np.full((len(numbers), T), np.nan)
    for row, n in enumerate(numbers):
        norms = layer.history[n].h_grad.numpy()
        values[row, : len(norms)] = norms
    values[~(values > 0) | ~np.isfinite(values)] = np.nan
    title(axes, f"{layer.name}: norm of dL/dh (grey: none)")
    axes.set_xlabel("time step")
    axes.set_ylabel("training step")
    if np.isnan(values).all():
        _note(axes, "no gradient")
        return
    low, high = np.nanmin(values), np.nanmax(values)
    low = max(low, high * 1e-12)  # what is below is as good as gone, and would take all the colours
    edges = [numbers[0] - 0.5, *((a + b) / 2 for a, b in zip(numbers, numbers[1:])), numbers[-1] + 0.5]
    axes.set_facecolor("#dddddd")
    mesh = axes.pcolormesh(
        np.arange(T + 1) - 0.5, edges, np.ma.masked_invalid(values), cmap="viridis",
        norm=LogNorm(low, high if high > low else 10 * low), rasterized=True,
    )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(mesh, ax=axes, pad=0.02)
    tidy(axes, grid="none")


def _lines(axes, layer, value, name: str, limits) -> None:
    for i, (gate, found) in enumerate(layer.last.gates.items()):
        values = value(found).tolist()
        axes.plot(values, color=_colour(i), linewidth=1.6, marker=_alone(values), label=gate)
    axes.set_xlabel("time step")
    axes.set_ylim(*limits)
    title(axes, f"{layer.name}: {name}")
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper right")
    tidy(axes)


def gates(axes, layer) -> None:
    means = [value for gate in layer.last.gates.values() for value in gate.mean.tolist() if math.isfinite(value)]
    low, high = min([0.0, *means]), max([1.0, *means])
    low, high = low - 0.04 * (high - low), high + 0.25 * (high - low)
    what = "units" if layer.cell.startswith("rnn") else "gates"
    _lines(axes, layer, lambda gate: gate.mean, f"{what}, mean", (low, high))


def saturation(axes, layer) -> None:
    what = {"rnn_relu": "units, share off", "rnn_tanh": "units, share saturated"}
    _lines(axes, layer, lambda gate: gate.saturated, what.get(layer.cell, "gates, share saturated"), (0, 1.25))


def states(axes, layers) -> None:
    for i, layer in enumerate(layers):
        record = layer.last
        rows = record.rows.clamp(min=1).sqrt()
        marker = _alone(rows)
        axes.plot((record.h / rows).tolist(), color=_colour(i), linewidth=1.8, marker=marker, label=layer.name)
        if record.c is not None:
            axes.plot((record.c / rows).tolist(), color=_colour(i), linewidth=1.1, linestyle="--", marker=marker)
    axes.set_xlabel("time step")
    axes.set_ylabel("norm for a row (root mean square)")
    axes.set_ylim(bottom=0)
    title(axes, "States h" + (" (dashed: c)" if any(layer.last.c is not None for layer in layers) else ""))
    _legend(axes, NAMED, frameon=False, fontsize=9)
    tidy(axes)


def weights(axes, norms) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, (name, found) in enumerate(norms.items()):
        steps = sorted(found)
        values = [found[step] if found[step] > 0 and math.isfinite(found[step]) else math.nan for step in steps]
        style = ["-", "--", ":", "-."][i // len(COLOURS) % 4]
        axes.plot(steps, values, style, color=_colour(i), linewidth=1.3, marker=_alone(steps), label=name)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title(axes, "Weights: norm of the gradient")
    if norms:
        columns = 1 + min(len(norms), NAMED_WEIGHTS) // 12
        _legend(axes, NAMED_WEIGHTS, framealpha=0.7, edgecolor="none", fontsize=7, ncols=columns)
    else:
        _note(axes, "no .grad was set")
    tidy(axes)


def to_tensorboard(probe, writer) -> None:
    to, own = writer, not hasattr(writer, "add_scalar")
    if own:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("fastrnn: writing to TensorBoard needs it: `pip install tensorboard`") from error
        to = SummaryWriter(str(writer))
    try:
        for layer in probe.layers():
            tag = f"{layer.name}".replace(" ", "_")
            for step, record in layer.history.items():
                left = diagnosis.flow(record)
                if left and math.isfinite(left[-1]):
                    to.add_scalar(f"{tag}/log10_of_gradient_left", left[-1], step)
                to.add_scalar(f"{tag}/gradient_norm_largest", record.h_grad.max().item(), step)
                to.add_scalar(f"{tag}/gradient_norm_smallest", record.h_grad.min().item(), step)
                to.add_scalar(f"{tag}/state_norm_last", record.h[-1].item(), step)
                for name, gate in record.gates.items():
                    to.add_scalar(f"{tag}/gate_{name}_mean", diagnosis.average(record, gate.mean), step)
                    to.add_scalar(f"{tag}/gate_{name}_saturated", diagnosis.average(record, gate.saturated), step)
        for name, norms in probe.weights().items():
            for step, norm in norms.items():
                to.add_scalar(f"gradient_norm/{name}", norm, step)
        last = max(probe.steps, default=0)
        to.add_text("probe", "\n".join(f"    {line}" for line in probe.summary().split("\n")), last)
        if probe.layers():
            to.add_figure("probe", figure(probe), last, close=False)
        to.flush()
    finally:
        if own:
            to.close()
