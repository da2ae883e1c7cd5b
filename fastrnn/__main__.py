"""The command line: `python -m fastrnn info | check | bench | demo`.

Exit codes: 0 good, 1 a check failed, 2 the command line is wrong, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys

import torch

import fastrnn
from fastrnn import bench, check, demo
from fastrnn.terminal import interrupted


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line (it would print the usage first)."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def info(args: argparse.Namespace) -> int:
    facts = dict(fastrnn.build_info())
    facts |= {"threads": torch.get_num_threads(), "python": platform.python_version(), "machine": platform.machine()}
    facts["workspace_bytes"] = fastrnn.workspace_bytes()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if value is None:
            continue
        text = (", ".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)
        print(f"{name.replace('_', ' ') + ':':<22}{text}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="fastrnn", description="RNN, LSTM and GRU for PyTorch by fused kernels.")
    commands = top.add_subparsers(metavar="COMMAND")
    for function, add_arguments, name, what in (
        (info, None, "info", "what this build holds and which kernels this machine runs"),
        (check.main, check.add_arguments, "check", "compare fastrnn with torch.nn on this machine, about a minute"),
        (bench.main, bench.add_arguments, "bench", "time fastrnn beside torch.nn, ONNX Runtime and OpenVINO"),
        (
            demo.main,
            demo.add_arguments,
            "demo",
            "train a character model twice, on torch.nn and on fastrnn, and compare",
        ),
    ):
        command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        command.set_defaults(function=function, command=command)
        if add_arguments:
            add_arguments(command)
        else:
            command.add_argument("--json", action="store_true", help="print it as JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    top = parser()
    args = top.parse_args(argv)
    if not hasattr(args, "function"):
        top.print_help()
        return 2
    try:
        return args.function(args)
    except demo.BadArgument as error:
        args.command.error(str(error))
    except KeyboardInterrupt:
        print(f"\n{args.command.prog}: interrupted, nothing written", file=sys.stderr)
        return interrupted()
    except BrokenPipeError:  # `| head`: the reader has gone; without this Python complains again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
