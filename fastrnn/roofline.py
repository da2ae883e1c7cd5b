"""What this machine can do at most, and how near each workload comes to it: `python -m fastrnn bench --roofline`.

A step of a recurrent network reads all recurrent weights again, so operations per byte of those weights decide which
limit holds: few rows are bound by the bandwidth of the cache that holds the weights, many by the rate of fma, or of
AMX's tiles where they are in use. All are measured here, in the process that runs the workloads and on as many threads
(_C.limit, csrc/cpu/roofline.h).
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastrnn import _C

LARGEST = 1 << 30  # bytes: what the buffers for the memory's bandwidth may take in all
BYTES = {"float32": 4, "bfloat16": 2}
COLOURS = {"L1": "#2b8a3e", "L2": "#1864ab", "L3": "#862e9c", "memory": "#d9480f"}
MARKERS = {"RNN": "s", "LSTM": "o", "GRU": "^"}


def affinity() -> list[int]:
    """The processors this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _number(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _processors(text: str) -> set[int]:
    """Of "0-3,8": {0, 1, 2, 3, 8}."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def caches(root: Path | None = None) -> list[dict]:
    """The data caches of the first processor this process may use: level, size, and how many such processors share it.

    From Linux's sysfs; empty where that is not to be had.
    """
    usable = affinity()
    found = []
    for folder in sorted((root or Path(f"/sys/devices/system/cpu/cpu{usable[0]}/cache")).glob("index*")):
        try:
            kind, level, size, shared = (
                (folder / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                sharing = max(1, len(_processors(shared) & set(usable)))
                found.append({"level": int(level), "bytes": _number(size), "sharing": sharing})
        except (OSError, ValueError, IndexError):
            continue
    return sorted(found, key=lambda cache: cache["level"])


def on_all_threads(what: str, size: int, threads: int) -> float:
    """The sum of what `threads` threads reach at the same time."""
    if threads == 1:
        return _C.limit(what, size)
    start = threading.Barrier(threads)

    def one(_):
        start.wait()
        return _C.limit(what, size)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one, range(threads)))


def limits() -> dict:
    """{"fma": GF/s, "tiles": GF/s of bfloat16 or None, "levels": [{"name", "bytes" held for all threads, "bandwidth" in
    GB/s}, ...]}, nearest first."""
    threads = torch.get_num_threads()
    levels, below = [], 0
    for cache in caches():
        sharing = min(cache["sharing"], threads)
        # Half a cache, so that it stays in it; but more than the cache before holds.
        part = max(cache["bytes"] // 2 // sharing, 2 * below)
        below = cache["bytes"]
        levels.append(
            {
                "name": f"L{cache['level']}",
                "bytes": cache["bytes"] * max(1, threads // sharing),
                "bandwidth": on_all_threads("load", part, threads),
            }
        )
    if levels:
        part = min(2 * levels[-1]["bytes"], LARGEST) // threads
        levels.append({"name": "memory", "bytes": None, "bandwidth": on_all_threads("load", part, threads)})
    tiles = on_all_threads("tiles", 0, threads) if _C.isa() == "amx" else None
    return {"fma": on_all_threads("fma", 0, threads), "tiles": tiles, "levels": levels}


def peak(found: dict, dtype: str) -> tuple[float, str]:
    """The rate of the fastest products of that dtype in GF/s, and their name. Six of bfloat16 make one of float32."""
    tiles = (found["tiles"] or 0) / (6 if dtype == "float32" else 1)
    return (tiles, "tiles") if tiles > found["fma"] else (found["fma"], "fma")


def intensity(row: dict, mode: str, dtype: str) -> tuple[float, float]:
    """Operations per byte of recurrent weights, and the bytes of one layer's. Backward reads the weights once more."""
    size = row["recurrent_weights"] * BYTES[dtype]
    passes = 1 if mode == "inference" else 2
    return row[mode]["operations"] / (row["T"] * row["L"] * size * passes), size


def level_of(size: float, found: dict) -> dict | None:
    """The nearest level that holds `size` bytes."""
    return next((level for level in found["levels"] if level["bytes"] is None or size <= level["bytes"]), None)


def add_shares(rows: list[dict], found: dict, dtype: str) -> None:
    """Into every row: the roof over it in GF/s, and the share of it that fastrnn reaches."""
    for row in rows:
        for mode in ("inference", "training"):
            if mode in row:
                per_byte, size = intensity(row, mode, dtype)
                level = level_of(size, found)
                rate, _ = peak(found, dtype)
                roof = min(rate, per_byte * level["bandwidth"]) if level else rate
                row[mode]["roof"] = {
                    "gflops": roof,
                    "share": row[mode]["gflops"]["fastrnn"] / roof,
                    "weights_in": level["name"] if level else None,
                    "operations_per_byte": per_byte,
                }


def draw(rows: list[dict], found: dict, title: str, path: Path, dtype: str = "float32") -> None:
    """The roofs, and every workload under them in the colour of the nearest level that holds its recurrent weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = []
    for row in rows:
        for mode in ("inference", "training"):
            if mode in row:
                roof = row[mode]["roof"]
                colour = COLOURS.get(roof["weights_in"], "#495057")
                family = row["cell"].removesuffix("Cell")
                points.append((roof["operations_per_byte"], row[mode]["gflops"]["fastrnn"]))
                axes.plot(
                    *points[-1], MARKERS[family], color=colour, markersize=4.5, alpha=0.8, linestyle="none",
                    markerfacecolor=colour if mode == "inference" else "none",
                )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    left = min([x for x, _ in points] + [0.25]) / 1.5
    right = max([x for x, _ in points] + [64]) * 1.5
    low = min([y for _, y in points] + [found["fma"] / 20]) / 1.6
    rate, name = peak(found, dtype)
    for top, products in {found["fma"]: "fma", rate: name}.items():
        axes.axhline(top, color="#212529", linewidth=1.6, linestyle="-" if top == rate else "--")
        axes.annotate(f"{products} {top:.0f} GF/s", (right, top), (-4, 4), textcoords="offset points", ha="right",
                      fontsize=9)  # fmt: skip
    for level in found["levels"]:
        ridge = rate / level["bandwidth"]
        colour = COLOURS.get(level["name"], "#495057")
        axes.plot([left, ridge], [left * level["bandwidth"], rate], color=colour, linewidth=1.4)
    axes.set_xlim(left, right)
    axes.set_ylim(low, rate * 1.7)
    axes.set_xlabel("operations per byte of recurrent weights")
    axes.set_ylabel("GF/s")
    place = "colour: the nearest level that holds the recurrent weights of a layer"
    axes.set_title(f"{title}\n{place}", fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    handles = [
        Line2D([], [], color=COLOURS.get(level["name"], "#495057"), linewidth=1.4,
               label=f"{level['name']} {level['bandwidth']:.0f} GB/s")
        for level in found["levels"]
    ]  # fmt: skip
    for family, marker in MARKERS.items():
        handles.append(Line2D([], [], color="#495057", marker=marker, linestyle="none", markersize=5, label=family))
    for face, label in (("#495057", "inference"), ("none", "training")):
        handles.append(Line2D([], [], color="#495057", marker="o", linestyle="none", markersize=5,
                              markerfacecolor=face, label=label))  # fmt: skip
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(path, format="png")
