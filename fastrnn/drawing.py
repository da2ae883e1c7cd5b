"""Figures, by matplotlib where it is installed: without a window, and with axes that look alike."""

from __future__ import annotations

from pathlib import Path

OURS, THEIRS, GREY = "#1864ab", "#d9480f", "#868e96"
# For more than two things at once, in this order; told apart by people who see colours otherwise, too (Okabe and Ito).
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]


def new_figure(width: float, height: float, dpi: int = 100):
    """An empty figure of so many inches; ImportError, saying what to install, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fastrnn: drawing needs matplotlib: `pip install matplotlib`") from error
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(*many, grid: str = "both") -> None:
    """A pale grid behind what is drawn ("both", "x", "y" or "none"), and no frame above and to the right."""
    for axes in many:
        if grid != "none":
            axes.grid(alpha=0.25, axis=grid)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def title(axes, text: str) -> None:
    axes.set_title(text, fontsize=11, loc="left")


def smooth(values: list[float], reach: int) -> list[float]:
    """Mean over each value and `reach` neighbours either side; fewer at the steep start and at the end."""
    found = []
    for i in range(len(values)):
        near = values[i - min(reach, i) : i + min(reach, i) + 1]
        found.append(sum(near) / len(near))
    return found


def save(figure, path: str | Path) -> None:
    """As a PNG, written beside its place and moved there whole: an interrupt leaves no half a picture."""
    import os

    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
