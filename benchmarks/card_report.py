"""What benchmarks/card.py says of its results: the table of requirements, the tables of times, the figure."""

from __future__ import annotations

import statistics
from pathlib import Path

from card_work import CUDNN, PATHS, REQUIREMENTS, WORKS, Requirement

COLOURS = {CUDNN: "#868e96", "step": "#f08c00", "block": "#2f9e44", "cluster": "#1864ab", "grid": "#ae3ec9"}
MARKS = {CUDNN: "|", "step": "s", "block": "o", "cluster": "D", "grid": "^"}
PRECISIONS = {"tf32": "float32 (TF32)", "float32": "float32, strict", "bfloat16": "bfloat16", "float16": "float16"}


def rows_of(stages: dict[str, dict]) -> list[dict]:
    """The measured rows of the stages bench, rl and packed, in the order of the list."""
    found = [row for name in ("bench", "rl", "packed") for row in stages.get(name, {}).get("items", {}).values()]
    order = {w.name: i for i, w in enumerate(WORKS)}
    rows = [row for row in found if "times" in row and row["name"] in order]
    return sorted(rows, key=lambda row: (order[row["name"]], list(PRECISIONS).index(row["precision"]), row["mode"]))


def judged(requirement: Requirement, rows: list[dict]) -> dict:
    """What was measured of a requirement; met is None where nothing was, or where a row has no path of ours."""
    expected = sum(
        (p in requirement.precisions) * (m in requirement.modes)
        for w in WORKS
        if w.name in requirement.works
        for p in w.precisions
        for m in w.modes
    )
    mine = [row for row in rows if requirement.concerns(row)]
    with_ratio = [row for row in mine if row["ratio"] is not None]
    found = {"name": requirement.name, "asked": requirement.asked, "rows": len(mine), "expected": expected,
             "served": len(with_ratio), "least": None, "mean": None, "slowest": None, "us": None, "cudnn_us": None,
             "met": None}  # fmt: skip
    if not with_ratio:
        return found
    worst = min(with_ratio, key=lambda row: row["ratio"])
    found |= {
        "least": worst["ratio"],
        "mean": statistics.geometric_mean(row["ratio"] for row in with_ratio),
        "slowest": f"{worst['name']}, {worst['precision']}, {worst['mode']}",
        "us": worst["us"][worst["best"]],
        "cudnn_us": worst["us"][CUDNN],
    }
    met = worst["ratio"] >= requirement.ratio
    if requirement.us is not None:
        met &= all(row["us"][row["best"]] <= requirement.us for row in with_ratio)
    found["met"] = met if not met or len(with_ratio) == expected else None
    return found


def table(rows: list[dict]) -> list[dict]:
    return [judged(requirement, rows) for requirement in REQUIREMENTS]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_requirements(found: list[dict], print_table) -> None:
    words = {True: "met", False: "▼ missed", None: "▼ open"}
    lines = [
        [f["name"], f["asked"], f"{f['served']}/{f['expected']}", _number(f["least"]), _number(f["mean"]),
         _number(f["us"]), _number(f["cudnn_us"]), words[f["met"]], f["slowest"] or ""]
        for f in found
    ]  # fmt: skip
    header = ["requirement", "asked", "rows", "least", "mean", "µs", "cuDNN", "", "the slowest row"]
    print_table("cuDNN's time over fastrnn's best path's; µs per step and layer of the slowest row", header, lines)


def print_rows(rows: list[dict], print_table) -> None:
    for mode in ("forward", "training"):
        lines = []
        for row in (row for row in rows if row["mode"] == mode):
            line = [row["name"], ",".join(str(row[k]) for k in "BTIHLD"), row["precision"]]
            line += [_number(row["us"].get(name)) for name in (CUDNN, *PATHS)]
            spread = row["times"][row["best"] or CUDNN]
            line += [f"{100 * (spread['q3'] - spread['q1']) / spread['median']:.0f}%"]
            ratio = row["ratio"]
            lines.append([*line, "-" if ratio is None else f"▼ {ratio:.2f}" if ratio < 1 else f"{ratio:.2f}"])
        if lines:
            header = ["workload", "B,T,I,H,L,D", "precision", CUDNN, *PATHS, "spread", "ratio"]
            print_table(f"{mode.capitalize()}: µs per step and layer; ratio: cuDNN over the best path", header, lines)


# ------------------------------------------------------------------------------------------------------------- figure


def _ratio(axes, at: float, ratio: float | None) -> None:
    """The ratio at the right edge of a line."""
    text = "-" if ratio is None else f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
    colour = "#adb5bd" if ratio is None else "#2b8a3e" if ratio >= 1 else "#c92a2a"
    axes.annotate(text, (1.0, at), xycoords=("axes fraction", "data"), xytext=(30, 0), textcoords="offset points",
                  color=colour, fontsize=8, va="center", ha="right", annotation_clip=False)  # fmt: skip


def _panel(axes, rows: list[dict], places: dict[tuple[str, str], float]) -> None:
    for row in rows:
        at, us, best = places[row["name"], row["precision"]], row["us"], row["best"]
        if best is not None:
            colour = "#b2f2bb" if row["ratio"] >= 1 else "#ffc9c9"
            axes.plot([us[CUDNN], us[best]], [at, at], color=colour, linewidth=5, solid_capstyle="butt", zorder=1)
        for name in (n for n in (CUDNN, *PATHS) if n in us):
            look = dict(s=70, linewidths=2.5) if name == CUDNN else dict(s=30 if name == best else 16, linewidths=0)
            alpha = 1.0 if name in (CUDNN, best) else 0.5
            axes.scatter(us[name], at, marker=MARKS[name], color=COLOURS[name], zorder=3, alpha=alpha, **look)
        _ratio(axes, at, row["ratio"])
    axes.set_xscale("log")
    if rows:
        every = [us for row in rows for us in row["us"].values()]
        low, high = min(every) / 1.3, max(every) * 1.3
        axes.set_xlim(low, high)
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("µs per step and layer", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def draw(rows: list[dict], title: str, path: Path) -> None:
    """A line for each workload and precision: µs per step and layer of cuDNN and of every path, forward and training;
    at the edge the ratio of cuDNN's time to the best path's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places: dict[tuple[str, str], float] = {}
    bands: dict[str, list[float]] = {}
    shown: dict[str, str] = {}
    y = 0.0
    for row in rows:
        key = row["name"], row["precision"]
        if key not in places:
            y += 0.0 if row["name"] in bands else 0.35
            places[key] = y
            bands.setdefault(row["name"], []).append(y)
            shown[row["name"]] = row["name"] + ("" if f" T{row['T']}" in row["name"] else f" T{row['T']}")
            y += 1
    height = 1.5 + 0.15 * y
    figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.09})
    for axes, mode in zip(panels, ("forward", "training")):
        for i, band in enumerate(bands.values()):
            if i % 2 == 0:
                axes.axhspan(band[0] - 0.65, band[-1] + 0.65, color="#f1f3f5", zorder=0, linewidth=0)
        _panel(axes, [row for row in rows if row["mode"] == mode], places)
        axes.set_title(mode, fontsize=10, loc="left")
        axes.annotate("cuDNN\n/ best", (1.0, 1.0), xycoords="axes fraction", xytext=(30, 3), ha="right",
                      textcoords="offset points", color="#495057", fontsize=7, annotation_clip=False)  # fmt: skip
    panels[0].set_yticks(list(places.values()), [PRECISIONS[precision] for _, precision in places], fontsize=8)
    for name, band in bands.items():
        panels[0].annotate(shown[name], (0.0, band[0]), xycoords=("axes fraction", "data"), xytext=(-92, 0), ha="right",
                           textcoords="offset points", va="center", fontsize=8, fontweight="bold")  # fmt: skip
    panels[0].set_ylim(y, -0.7)
    there = [name for name in (CUDNN, *PATHS) if any(name in row["us"] for row in rows)]
    handles = [panels[0].scatter([], [], marker=MARKS[n], color=COLOURS[n], s=70 if n == CUDNN else 30,
                                 linewidths=2.5 if n == CUDNN else 0, label=n) for n in there]  # fmt: skip
    figure.suptitle(title, fontsize=11)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(there), fontsize=8, frameon=False)
    figure.savefig(path, format="png")
