"""Time beside torch.nn on workloads people run: `python benchmarks/workloads.py [--threads N] [--json FILE]`.

Each line is an A/B in this one process: an untimed call of both first, then rounds in which the order is shuffled;
medians, and torch's time over ours (above 1: fastrnn is faster). Inference is under no_grad, training is forward and
backward with a gradient for the input. The error is the output's against float64, over torch.nn's.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastrnn


@dataclass(frozen=True)
class Workload:
    name: str
    cell: str  # a class of torch.nn
    B: int
    T: int
    I: int  # noqa: E741
    H: int
    L: int = 1
    D: int = 1


# Shapes as their projects use them: CleanRL, DeepAR, darts, a neural amp model, RNNoise, OCR, Kokoro, hydrology, ...
WORKLOADS = [
    Workload("recurrent PPO (CleanRL)", "LSTM", 2, 128, 512, 128),
    Workload("recurrent PPO, GRU", "GRU", 8, 128, 64, 128),
    Workload("DeepAR", "LSTM", 32, 100, 40, 40, 2),
    Workload("DeepAR, GRU", "GRU", 32, 100, 40, 40, 2),
    Workload("forecasting (darts)", "RNN", 32, 24, 1, 25),
    Workload("forecasting (darts)", "GRU", 32, 24, 1, 25),
    Workload("forecasting (darts)", "LSTM", 32, 24, 1, 25),
    Workload("amp model, one stream", "LSTM", 1, 2048, 1, 18),
    Workload("amp model, one stream", "GRU", 1, 2048, 1, 18),
    Workload("noise suppression (RNNoise)", "GRU", 1, 500, 256, 256, 3),
    Workload("small RNN, one stream", "RNN", 1, 100, 64, 64),
    Workload("small RNN, batch", "RNN", 16, 100, 64, 120),
    Workload("OCR (CRNN), one line", "LSTM", 1, 26, 512, 256, 1, 2),
    Workload("speech synthesis (Kokoro)", "LSTM", 1, 200, 640, 256, 1, 2),
    Workload("hydrology", "LSTM", 256, 365, 32, 128),
    Workload("RL at scale (Sample Factory)", "GRU", 32, 32, 512, 512),
    Workload("voice activity (Silero), one step", "LSTMCell", 1, 1, 128, 128),
    Workload("one step", "GRUCell", 8, 1, 64, 128),
]


def interleave(contenders, seconds):
    """Median seconds of each of the callables."""
    for call in contenders:
        call()
    begin = time.perf_counter()
    for call in contenders:
        call()
    rounds = max(7, min(200, round(seconds / (time.perf_counter() - begin))))
    times = [[] for _ in contenders]
    for _ in range(rounds):
        for i in random.sample(range(len(contenders)), len(contenders)):
            begin = time.perf_counter()
            contenders[i]()
            times[i].append(time.perf_counter() - begin)
    return [statistics.median(t) for t in times]


def measure(w: Workload, seconds: float) -> dict:
    torch.manual_seed(0)
    if w.cell.endswith("Cell"):
        theirs, x = getattr(torch.nn, w.cell)(w.I, w.H), torch.randn(w.B, w.I)
    else:
        theirs = getattr(torch.nn, w.cell)(w.I, w.H, w.L, bidirectional=w.D == 2)
        x = torch.randn(w.T, w.B, w.I)
    ours = fastrnn.accelerate(copy.deepcopy(theirs))

    def first(module, x):
        found = module(x)
        return found[0] if isinstance(found, tuple) else found

    def infer(module):
        def call():
            with torch.no_grad():
                module(x)

        return call

    leaf = x.clone().requires_grad_()
    gradient = torch.randn_like(first(theirs, x))

    def train(module):
        return lambda: first(module, leaf).backward(gradient)

    with torch.no_grad():
        exact = first(copy.deepcopy(theirs).double(), x.double())
        errors = [float((first(m, x).double() - exact).norm()) for m in (theirs, ours)]
    result = {"workload": w.name, "cell": w.cell, "B": w.B, "T": w.T, "I": w.I, "H": w.H, "L": w.L, "D": w.D}
    for mode, maker in (("inference", infer), ("training", train)):
        torch_s, ours_s = interleave([maker(theirs), maker(ours)], seconds)
        per = 1e6 / (w.T * w.L)
        result[mode] = {"torch_us": torch_s * per, "fastrnn_us": ours_s * per, "ratio": torch_s / ours_s}
    result["error_ratio"] = errors[1] / errors[0] if errors[0] else 1.0
    return result


def conditions() -> dict:
    """Machine, versions and commit, to stand beside the figures."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "isa": fastrnn.build_info()["isa"],
        "torch": torch.__version__,
        "fastrnn": fastrnn.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each comparison takes")
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = [measure(w, arguments.seconds) for w in track(WORKLOADS, description="measuring", transient=True)]
    info = conditions()

    table = Table(title="µs per step and layer; ratio = torch.nn's time / fastrnn's", caption=str(info))
    for column in (
        "workload",
        "cell",
        "B,T,I,H,L,D",
        "torch",
        "fastrnn",
        "inference",
        "torch",
        "fastrnn",
        "training",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("workload", "cell") else "right")
    for r in results:
        shape = ",".join(str(r[k]) for k in "BTIHLD")
        cells = [r["workload"], r["cell"], shape]
        for mode in ("inference", "training"):
            m = r[mode]
            cells += [f"{m['torch_us']:.2f}", f"{m['fastrnn_us']:.2f}", f"{m['ratio']:.2f}x"]
        table.add_row(*cells, f"{r['error_ratio']:.2f}")
    Console(width=150).print(table)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"info": info, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
