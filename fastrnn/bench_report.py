"""What `python -m fastrnn bench` says of its rows: tables, means, targets, losses, the figure, the conditions."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastrnn
from fastrnn import roofline, workloads
from fastrnn.terminal import print_table

MODES = ("inference", "training")
FAMILIES = ("RNN", "LSTM", "GRU")
PLAIN = ("workloads", "grid")  # the groups that are one call of torch.nn beside one of fastrnn


def family(row: dict) -> str:
    return row["cell"].removesuffix("Cell")


def geometric_mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.geometric_mean(values) if values else None


def ratios(rows: list[dict], mode: str, keep: Callable[[dict], bool] = lambda row: True) -> list[float]:
    """torch.nn's time over fastrnn's, of the rows that have the mode and are to be kept."""
    return [row[mode]["ratio"] for row in rows if mode in row and keep(row)]


def peer_ratios(
    rows: list[dict], peer: str, keep: Callable[[dict], bool] = lambda row: True, ratio: str = "ratio"
) -> list[float]:
    """The peer's time over fastrnn's, of the rows that have one. Peers keep their weights packed, and beside them so
    does fastrnn (module.freeze()); ratio "ratio_not_frozen": fastrnn packs them at each call."""
    found = [row["inference"].get("peers", {}).get(peer, {}) for row in rows if "inference" in row and keep(row)]
    return [peer[ratio] for peer in found if ratio in peer]


# ---------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    name: str
    goal: float
    found: float | None  # None: no row of this class was measured
    rows: int
    at_most: bool = False  # otherwise at least

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.goal if self.at_most else self.found >= self.goal


def targets(rows: list[dict]) -> list[Target]:
    """What the project wants of each class of rows, and what was found. One-step cells count with their sequences."""
    plain = [row for row in rows if row["group"] in PLAIN]
    small = [row for row in plain if row["H"] <= 256]

    def lstm(row):
        return family(row) == "LSTM"

    def other(row):
        return not lstm(row)

    def one_row(row):
        return row["B"] == 1

    def few(row):
        return row["B"] * row["H"] <= (512 if lstm(row) else 2000)

    found = [
        ("inference, GRU and RNN", 3.0, ratios(plain, "inference", other)),
        ("inference, LSTM", 1.3, ratios(plain, "inference", lstm)),
        ("inference, LSTM from 32 rows on", 1.0, ratios(plain, "inference", lambda row: lstm(row) and row["B"] >= 32)),
        ("training, GRU and RNN, H <= 256, B*H <= 2000", 6.0,
         ratios(small, "training", lambda row: other(row) and few(row))),
        ("training, LSTM, H <= 256, B*H <= 512", 3.0, ratios(small, "training", lambda row: lstm(row) and few(row))),
        ("training, others of H <= 256", 1.2, ratios(small, "training", lambda row: not few(row))),
        ("inference, frozen, over ONNX Runtime, one row", 1.5, peer_ratios(plain, "ONNX Runtime", one_row)),
        ("inference, not frozen, over ONNX Runtime, one row", 1.5,
         peer_ratios(plain, "ONNX Runtime", one_row, "ratio_not_frozen")),
    ]  # fmt: skip
    ragged = [row for row in rows if row["group"] == "ragged"]
    for name, goal, keep in (
        ("B*H <= 4096", 10.0, lambda row: row["B"] * row["H"] <= 4096),
        ("B 32, H 256", 5.0, lambda row: (row["B"], row["H"]) == (32, 256)),
        ("B 64, H 512", 2.5, lambda row: (row["B"], row["H"]) == (64, 512)),
    ):
        found.append((f"training, ragged rows, {name}", goal, ratios(ragged, "training", keep)))
    resets = [row for row in rows if row["group"] == "reset"]
    found.append(("training with resets over a loop of torch.nn", 10.0, ratios(resets, "training")))
    result = [Target(name, goal, geometric_mean(values), len(values)) for name, goal, values in found]
    plain_calls = [row["training"]["over_plain"] for row in resets if "training" in row]
    result.append(
        Target("training with resets, time over without", 1.05, geometric_mean(plain_calls), len(plain_calls), True)
    )
    every = ratios(rows, "inference") + ratios(rows, "training")
    result.append(Target("the slowest ratio of all", 0.95, min(every, default=None), len(every)))
    return result


def means(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """mode -> cell family or "all" -> rows, geometric mean and smallest ratio, means over the peers."""
    result: dict[str, dict[str, dict]] = {}
    for mode in MODES:
        for name in (*FAMILIES, "all"):
            chosen = [row for row in rows if mode in row and name in ("all", family(row))]
            values = ratios(chosen, mode)
            if values:
                entry = {"rows": len(values), "over_torch": geometric_mean(values), "slowest": min(values)}
                peers = sorted({p for row in chosen for p in row[mode].get("peers", {})})
                entry["peers"] = {p: geometric_mean(peer_ratios(chosen, p)) for p in peers}
                result.setdefault(mode, {})[name] = entry
    return result


# ---------------------------------------------------------------------------------------------------- printing


def _figures(value: float | None, mark: bool = True) -> str:
    if value is None:
        return "-"
    text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"▼ {text}" if mark and value < 1 else text


def _time(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def print_rows(rows: list[dict], peers: list[str]) -> None:
    for mode in MODES:
        chosen = [row for row in rows if mode in row]
        if not chosen:
            continue
        letters = "BTIHLDP" if any(row["P"] for row in chosen) else "BTIHLD"
        shown = [peer for peer in peers if any(peer in row[mode].get("peers", {}) for row in chosen)]
        header = ["workload", "cell", ",".join(letters), "torch", "fastrnn", "q1-q3", "GF/s", "ratio"]
        header += shown + ["error"] + ["gradients"] * (mode == "training")
        lines = []
        for row in chosen:
            result = row[mode]
            ours = result["times"]["fastrnn"]
            spread = "-".join(f"{ours[q] / ours['median'] * 100:.0f}" for q in ("q1", "q3"))
            line = [row["name"], row["cell"], ",".join(str(row[letter]) for letter in letters)]
            line += [_time(result["us_per_step"][name]) for name in ("torch", "fastrnn")]
            line += [f"{spread}%", f"{result['gflops']['fastrnn']:.1f}", _figures(result["ratio"])]
            line += [_figures(result.get("peers", {}).get(peer, {}).get("ratio")) for peer in shown]
            line += [_figures(row["error"]["output"], mark=False)]
            line += [_figures(row["error"].get("gradient"), mark=False)] * (mode == "training")
            lines.append(line)
        print_table(
            f"{mode.capitalize()}: µs per step and layer; ratios: their time / fastrnn's (frozen, beside a peer); "
            "error: over torch.nn's",
            header,
            lines,
        )
    resets = [row for row in rows if row.get("training", {}).get("over_plain")]
    if resets:
        lines = [[row["name"], _figures(row["training"]["over_plain"], mark=False)] for row in resets]
        print_table("Time with resets over time without", ["workload", "training"], lines)


def print_summary(rows: list[dict]) -> None:
    found = means(rows)
    lines = []
    for mode, entries in found.items():
        for name, entry in entries.items():
            peers = ", ".join(f"{peer} {_figures(v, mark=False)}" for peer, v in entry["peers"].items() if v)
            lines.append([f"{mode}, {name}", str(entry["rows"]), _figures(entry["over_torch"]),
                          _figures(entry["slowest"]), peers or "-"])  # fmt: skip
    print_table(
        "Geometric means of the ratios", ["", "rows", "over torch.nn", "slowest", "over peers (inference)"], lines
    )
    lines = []
    for target in targets(rows):
        if target.found is not None:
            goal = f"{'<=' if target.at_most else '>='} {target.goal:g}"
            lines.append([target.name, str(target.rows), goal, f"{target.found:.3f}",
                          "met" if target.met else "▼ missed"])  # fmt: skip
    print_table("Targets (geometric means, at the threads in use)", ["class", "rows", "goal", "found", ""], lines)

    losses = [(row[mode]["ratio"], "torch.nn", row, mode) for row in rows for mode in MODES if mode in row]
    for row in rows:
        for peer, result in row.get("inference", {}).get("peers", {}).items():
            losses.append((result.get("ratio", 1.0), peer, row, "inference"))
    losses = [loss for loss in losses if loss[0] < 1]
    for ratio, name, row, mode in sorted(losses, key=lambda loss: (loss[1] != "torch.nn", loss[1], loss[0])):
        print(f"slower than {name}: {ratio:.2f}  {mode}, {row['name']} ({row['cell']})")
    for row in rows:
        for peer, result in row.get("inference", {}).get("peers", {}).items():
            if "left_out" in result:
                print(f"{peer} left out on {row['name']}: {result['left_out']}")
    if not any(name == "torch.nn" for _, name, _, _ in losses):
        print("Nowhere slower than torch.nn.")


def print_limits(rows: list[dict], found: dict) -> None:
    lines = [["fma", f"{found['fma']:.1f} GF/s", ""]]
    if found["tiles"]:
        lines.append(["tiles (bfloat16)", f"{found['tiles']:.1f} GF/s", ""])
    for level in found["levels"]:
        size = f"{level['bytes'] / 1024:,.0f} KiB" if level["bytes"] else ""
        lines.append([level["name"], f"{level['bandwidth']:.1f} GB/s", size])
    print_table("Limits of this machine at these threads, measured", ["", "at most", "holds"], lines)
    lines = []
    for mode in MODES:
        for name in FAMILIES:
            shares = [row[mode]["roof"]["share"] for row in rows if mode in row and family(row) == name]
            if shares:
                middle = statistics.median(shares)
                lines.append([f"{mode}, {name}", str(len(shares)), f"{middle:.0%}", f"{max(shares):.0%}"])
    print_table("Share of the roof that fastrnn reaches", ["", "rows", "median", "largest"], lines)


# ---------------------------------------------------------------------------------------------------- conditions


def busy_processors(seconds: float = 0.3) -> float | None:
    """How many of this process's processors are at work while it sleeps: above 0, others disturb the timing."""

    def spent() -> tuple[float, float]:
        """Clock ticks in all, and idle ones (idle and waiting for a disk), of the processors this process may use."""
        usable = {f"cpu{i}" for i in roofline.affinity()}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        ticks = [[int(t) for t in line[1:9]] for line in lines if line[0] in usable]
        return sum(map(sum, ticks)), sum(t[3] + t[4] for t in ticks)

    try:
        total, idle = spent()
        time.sleep(seconds)
        total, idle = (after - before for after, before in zip(spent(), (total, idle)))
        return round((1 - idle / total) * len(roofline.affinity()), 2) if total else None
    except (OSError, ValueError, IndexError):
        return None


def conditions(dtype: str, seconds: float) -> dict:
    """Machine, versions, commit and settings, to stand beside the figures."""
    cpu = platform.processor() or platform.machine()
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    except OSError:
        pass

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    root = Path(fastrnn.__file__).resolve().parents[1]
    commit = None
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        try:
            commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None
        except OSError:
            pass
    info = fastrnn.build_info()
    return {
        "cpu": cpu,
        "cores": len(roofline.affinity()),
        "caches": roofline.caches(),
        "busy_before": busy_processors(),
        "isa": info["isa"],
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "seconds": seconds,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "fastrnn": fastrnn.__version__,
            "torch": str(torch.__version__),
            "onnxruntime": version("onnxruntime"),
            "openvino": version("openvino"),
            "python": platform.python_version(),
        },
        "commit": commit,
        "workloads": workloads.fingerprint(),
    }


def target_table(rows: list[dict]) -> list[dict]:
    return [{**asdict(target), "met": target.met} for target in targets(rows)]


# ---------------------------------------------------------------------------------------------------- figure


def draw(rows: list[dict], title: str, path: Path) -> None:
    """A bar for each workload from 1 to its ratio, by cell; inference and training side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = [row for row in rows if row["group"] == "workloads"] or rows
    places, labels, headings, y = [], [], [], 0.0
    for name in FAMILIES:
        of_cell = [row for row in chosen if family(row) == name]
        of_cell.sort(key=lambda row: -next(row[mode]["ratio"] for mode in MODES if mode in row))
        if of_cell:
            headings.append((y, name))
            y += 1
        for row in of_cell:
            places.append((y, row))
            labels.append(row["name"])
            y += 1
        y += 0.4
    figure = Figure(figsize=(9, 1.3 + 0.19 * y), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    every = [row[mode]["ratio"] for row in chosen for mode in MODES if mode in row]
    low, high = min([0.7, *every]), max([2.0, *every])
    for axes, mode in zip(panels, MODES):
        for at, row in places:
            if mode not in row:
                continue
            ratio = row[mode]["ratio"]
            colour = "#1864ab" if ratio >= 1 else "#d9480f"
            axes.barh(at, ratio - 1, left=1, height=0.72, color=colour)
            axes.annotate(f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}", (ratio, at),
                          (3 if ratio >= 1 else -3, 0), textcoords="offset points", va="center",
                          ha="left" if ratio >= 1 else "right", fontsize=7, color="#343a40")  # fmt: skip
        axes.axvline(1, color="#212529", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(low / 2, high * 1.7)  # room for the numbers beside the bars
        ticks = [t for t in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 2 <= t <= high * 1.7]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_title(mode, fontsize=10, loc="left")
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
    panels[0].set_yticks([at for at, _ in places] + [at for at, _ in headings],
                         labels + [name for _, name in headings], fontsize=8)  # fmt: skip
    for label in panels[0].get_yticklabels()[len(places) :]:
        label.set_fontweight("bold")
    panels[0].set_ylim(y - 0.5, -0.7)
    figure.supxlabel("time of torch.nn / time of fastrnn", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, format="png")
