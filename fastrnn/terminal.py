"""What `python -m fastrnn` and the examples print with: progress and tables, by rich on a terminal, as plain lines
elsewhere; and the types of their arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn


def rich_console():
    """A rich Console when rich is installed and stdout is a terminal, else None (pipes and logs get plain lines)."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


class Progress:
    """Bars side by side: `with Progress({"torch.nn": 400, "fastrnn": 400}) as p: p.update("fastrnn", 12, "loss 3.1")`.

    Plain output: one line whenever a bar has come a tenth further and a second has passed, and at its end.
    """

    def __init__(self, totals: dict[str, int]):
        self.totals = totals
        self._bars = None
        console = rich_console()
        if console is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[text]}"), console=console, refresh_per_second=4,
            )  # fmt: skip
            self._tasks = {name: self._bars.add_task(name, total=n, text="") for name, n in totals.items()}
        else:
            self._printed = dict.fromkeys(totals, (0, 0.0))
            self._width = max(map(len, totals))

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._bars is not None:
            self._bars.stop()
        print()

    def update(self, name: str, done: int, text: str) -> None:
        if self._bars is not None:
            self._bars.update(self._tasks[name], completed=done, text=text)
            return
        total, (last, when) = self.totals[name], self._printed[name]
        now = time.monotonic()
        if done == total or (10 * (done - last) >= total and now - when >= 1.0):
            self._printed[name] = (done, now)
            print(f"{name:<{self._width}}  {done:>{len(str(total))}}/{total}  {text}", flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, the others to the right. A cell that begins with ▼ is red on a terminal."""
    console = rich_console()
    if console is not None:
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(f"[red]{cell}[/red]" if cell.startswith("▼") else cell for cell in row))
        console.print(table)
        return
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    print(title)
    for row in (header, ["-" * w for w in widths], *rows):
        cells = [f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print(flush=True)


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def picture(text: str) -> Path:
    """Where the picture goes, found out before training and not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file name in a folder that can be written to, got {text!r}")
    return path


def program(description: str, sizes: dict[str, str], full: dict[str, int], output: str) -> argparse.ArgumentParser:
    """A parser with what every example takes: --seed, --threads, --output (a picture named `output`), --quick; and
    whole numbers: sizes are their names and what they are, full their values without --quick."""
    top = argparse.ArgumentParser(description=description)
    for name, what in sizes.items():
        top.add_argument(f"--{name}", type=positive, metavar="N", help=f"{what} (default: {full[name]})")
    top.add_argument("--seed", type=seed, default=0, metavar="N", help="of everything random (default: 0)")
    top.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's)")
    top.add_argument("--output", type=picture, default=output, metavar="PNG", help=f"the picture (default: {output})")
    top.add_argument("--quick", action="store_true", help="small and short: shows that it runs, not how well it learns")
    return top


def settle(args: argparse.Namespace, full: dict, quick: dict) -> argparse.Namespace:
    """Gives what was left out its value, and torch the threads that were asked for."""
    for name, value in (quick if args.quick else full).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    return args


def interrupted() -> int:
    """The exit code after Ctrl-C, which has been caught: 130.

    An interrupt inside of exec(), by which modules that are being imported define their classes, makes Python end by
    the signal all the same, until exec() has been called again.
    """
    exec("")
    return 130


def launch(main: Callable[[], int]) -> NoReturn:
    """Runs a program's main function and exits with what it returns; Ctrl-C ends it without a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(interrupted())
