"""`python -m fastrnn bench`: fastrnn beside torch.nn, ONNX Runtime and OpenVINO on the workloads of workloads.py.

torch.nn and fastrnn are timed first, by calls that alternate in one process (measure.py). Then each peer is timed with
fastrnn alone, after a pause at every change of turn: the peers bring thread pools of their own, which go on spinning
after a call, and would be timed as the next contender's slowness.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import fastrnn
from fastrnn import _C, bench_report, measure, roofline, terminal, workloads
from fastrnn.demo import BadArgument
from fastrnn.peers import PEERS
from fastrnn.terminal import print_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY = dict(B=32, T=256, I=256, H=256, L=2)  # the training step of --memory


def _threads(text: str) -> int:
    most = len(roofline.affinity())
    if text == "all":
        return 0
    if text.isdecimal() and 1 <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected 'all' or a number from 1 to {most} (processors here), got {text!r}")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a dozen workloads, about a minute")
    parser.add_argument("--group", choices=("all", *workloads.GROUPS), default="all", help="(default: all)")
    parser.add_argument("--cell", choices=("all", "rnn", "lstm", "gru"), default="all", help="(default: all)")
    parser.add_argument("--only", metavar="SUBSTRING", default="", help="workloads with this in their name")
    parser.add_argument("--list", action="store_true", help="print the chosen workloads and measure nothing")
    parser.add_argument(
        "--threads", type=_threads, default=0, metavar="N", help="1, 2, ... or all: torch's default (default: all)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument("--isa", metavar="NAME", help="instruction set of fastrnn's kernels (default: the widest)")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="per comparison (default: 1, quick: 0.5)")
    parser.add_argument("--no-peers", action="store_true", help="torch.nn and fastrnn only")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a training step")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to this file")
    parser.add_argument("--figure", metavar="PNG", help="draw the ratios")
    parser.add_argument(
        "--roofline",
        metavar="PNG",
        nargs="?",
        const="fastrnn-roofline.png",
        help="measure this machine's limits, draw the workloads under them (default: fastrnn-roofline.png)",
    )


# ---------------------------------------------------------------------------------------------------- memory

_MEMORY_STEP = """
import resource, sys, torch
torch.set_num_threads({threads})
package = __import__("{package}", fromlist=["LSTM"])

def peak():  # kB; a child's ru_maxrss begins with its parent's, VmHWM does not
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)

def step(rnn, x):
    rnn(x)[0].sum().backward()

step(package.{cell}(8, 8), torch.randn(4, 2, 8))  # what only a first call needs
rnn, x = package.{cell}({I}, {H}, {L}), torch.randn({T}, {B}, {I}, requires_grad=True)
before = peak()
step(rnn, x)
print(peak() - before)
"""


def peak_memory(cell: str, package: str, threads: int) -> float:
    """MiB by which one training step raises the peak of resident memory, in a process of its own."""
    code = _MEMORY_STEP.format(cell=cell, package=package, threads=threads, **MEMORY)
    path = [str(Path(fastrnn.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "FASTRNN_ISA": _C.isa()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def measure_memory(threads: int) -> list[dict]:
    found = []
    for cell in ("LSTM", "GRU"):
        theirs, ours = (peak_memory(cell, package, threads) for package in ("torch.nn", "fastrnn"))
        found.append({"cell": cell, **MEMORY, "torch_mib": theirs, "fastrnn_mib": ours})
    rows = [[f["cell"], f"{f['torch_mib']:.0f}", f"{f['fastrnn_mib']:.0f}"] for f in found]
    shape = ", ".join(f"{letter} {size}" for letter, size in MEMORY.items())
    print_table(f"Peak memory of a training step, MiB, float32 ({shape})", ["cell", "torch.nn", "fastrnn"], rows)
    return found


# ---------------------------------------------------------------------------------------------------- running


class Bar:
    """A progress bar on stderr, by rich where installed; drawn only between measurements, never during one."""

    def __init__(self, total: int):
        self.bars = None
        self.total, self.done = total, 0
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
                console = Console(stderr=True)
                self.bars = Progress(*columns, console=console, transient=True, auto_refresh=False)
                self.task = self.bars.add_task("", total=total)
            except ImportError:
                pass

    def __enter__(self) -> Bar:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *exc) -> None:
        if self.bars:
            self.bars.stop()

    def begin(self, text: str) -> None:
        if self.bars:
            self.bars.update(self.task, completed=self.done, description=text, refresh=True)
        else:
            print(f"{self.done + 1}/{self.total}  {text}", file=sys.stderr, flush=True)
        self.done += 1


def writable(option: str, path: str | None) -> Path | None:
    """Found out before measuring, not after."""
    if path is None:
        return None
    found = Path(path)
    if found.is_dir() or not found.parent.is_dir() or not os.access(found.parent, os.W_OK):
        raise BadArgument(f"argument {option}: expected a file name in a folder that can be written to, got {path!r}")
    return found


def figure_path(option: str, path: str | None) -> Path | None:
    found = writable(option, path)
    if found is not None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            raise BadArgument(f"argument {option}: expected matplotlib to be installed, it is not") from None
    return found


def header(info: dict, count: int, peers: list) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in info["versions"].items() if v and name != "python")
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    lines = [
        f"{info['cpu']}, {info['cores']} processors, {info['isa']}, {threads}, {info['dtype']}; "
        f"commit {info['commit'] or 'unknown'}",
        versions,
        f"{count} workloads, {info['seconds']:g} s per comparison: medians of alternating calls in one process.",
    ]
    if peers:
        names = " and ".join(peer.name for peer in peers)
        lines.append(f"{names}: inference only, each alternating with fastrnn alone, after torch.nn's turn.")
        if info["threads"] > 1:
            pause = f"{measure.PAUSE * 1e3:.0f} ms"
            lines.append(
                f"Their idle threads spin, as by default; {pause} between turns keep them off fastrnn's calls."
            )
    if (info["busy_before"] or 0) > 0.2:
        lines.append(
            f"Others are using {info['busy_before']:.1f} of the processors: these figures will not be worth much."
        )
    return "\n".join(lines)


def choose_peers(dtype: torch.dtype, wanted: bool) -> list:
    """Those that are installed and know the dtype; a line for each that is left out."""
    found = []
    for peer in PEERS if wanted else ():
        missing = peer.missing()
        if missing:
            print(f"{peer.name} is left out: {', '.join(missing)} not installed.")
        elif dtype not in peer.dtypes:
            print(f"{peer.name} is left out: its RNNs do not compute in {str(dtype)[6:]} on the CPU.")
        else:
            found.append(peer)
    return found


def run(chosen: list[workloads.Workload], dtype: torch.dtype, seconds: float, peers: list) -> tuple[list[dict], bool]:
    """The rows, and whether Ctrl-C ended it early."""
    rows: list[dict] = []
    order = random.Random(0)
    try:
        with Bar(len(chosen)) as bar, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            for w in chosen:
                bar.begin(f"{w.name} ({w.cell} {w.shape})")
                rows.append(measure.measure(w, dtype, seconds, peers, order))
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def main(args: argparse.Namespace) -> int:
    chosen = workloads.select(args.group, args.cell if args.cell == "all" else args.cell.upper(), args.only, args.quick)
    if not chosen:
        raise BadArgument("arguments --quick, --group, --cell, --only: expected to choose a workload, they choose none")
    if args.isa is not None and args.isa not in _C.isas():
        raise BadArgument(f"argument --isa: expected one of {', '.join(_C.isas())} on this machine, got {args.isa!r}")
    if args.list:
        rows = [[w.name, w.group, w.cell, w.shape, w.source, w.note] for w in chosen]
        print_table("Letters: B,T,I,H,L,D[,P]", ["workload", "group", "cell", "sizes", "from", "note"], rows)
        return 0
    paths = {"json": writable("--json", args.json)}
    paths |= {name: figure_path(f"--{name}", getattr(args, name)) for name in ("figure", "roofline")}

    if args.threads:
        torch.set_num_threads(args.threads)
    before = _C.isa()
    if args.isa is not None:
        _C.set_isa(args.isa)
    try:
        return measure_and_report(args, chosen, paths)
    finally:
        _C.set_isa(before)


def measure_and_report(args: argparse.Namespace, chosen: list[workloads.Workload], paths: dict) -> int:
    seconds = args.seconds or (0.5 if args.quick else 1.0)
    dtype = DTYPES[args.dtype]
    info = bench_report.conditions(args.dtype, seconds)
    peers = choose_peers(dtype, not args.no_peers)
    print(header(info, len(chosen), peers), flush=True)
    found = roofline.limits() if paths["roofline"] else None  # before the peers' threads exist
    rows, interrupted = run(chosen, dtype, seconds, peers)
    print()
    if rows:
        bench_report.print_rows(rows, [peer.name for peer in peers])
        bench_report.print_summary(rows)
    if interrupted:
        print(f"Interrupted: {len(rows)} of {len(chosen)} workloads were measured.")
    if found is not None and rows:
        roofline.add_shares(rows, found, args.dtype)
        bench_report.print_limits(rows, found)
    memory = measure_memory(torch.get_num_threads()) if args.memory and not interrupted else None

    where = f"{info['cpu']}, {info['threads']} thread{'s' * (info['threads'] > 1)}, {info['isa']}, {args.dtype}"
    if paths["figure"] and rows:
        bench_report.draw(
            rows, f"fastrnn beside torch.nn {torch.__version__.partition('+')[0]}\n{where}", paths["figure"]
        )
        print(f"Figure: {paths['figure']}")
    if found is not None and rows:
        roofline.draw(rows, found, f"fastrnn under the limits of {where}", paths["roofline"], args.dtype)
        print(f"Roofline: {paths['roofline']}")
    if paths["json"]:
        everything = {
            "info": info,
            "interrupted": interrupted,
            "rows": rows,
            "means": bench_report.means(rows),
            "targets": bench_report.target_table(rows),
            "roofline": found,
            "memory": memory,
        }
        paths["json"].write_text(json.dumps(everything, indent=1) + "\n")
        print(f"Results: {paths['json']}")
    return terminal.interrupted() if interrupted else 0
