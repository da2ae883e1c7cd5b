"""The CUDA kernels' proof on a card, in stages: build, check, test, sanitize, measure beside cuDNN, draw.

    python benchmarks/card.py                                     every stage, into build/card
    python benchmarks/card.py --stages build,smoke,tests --out DIR
    python benchmarks/card.py --list                              the stages, and what each has to do

Each stage takes at most --minutes, writes DIR/<stage>.json as it goes, and picks up where it stopped when the script is
started again on the same sources: what passed is not done again, what failed is. A stage that fails does not keep the
next ones from running. Tests and measurements run in children that are killed when a kernel hangs (card_watch.py).

Clocks are read, never set; nothing is fetched. Exit status: 0 all is well, 1 something failed, 2 the command line is
wrong, 3 nothing failed but time ran out (start it again).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import card_facts
import card_report
import card_work
from card_record import ROOT, Run, good, terminal
from card_stages import STAGES


def state(record: dict) -> str:
    if record.get("left_out"):
        return f"left out: {record['left_out']}"
    if record.get("ok") and record.get("complete"):
        return "good"
    # Time may run out on a stage none of whose items failed.
    bad = [name for name, result in record.get("items", {}).items() if not good(result)]
    fine = not bad and not record.get("error")
    return "▼ unfinished, start it again" if fine and not record.get("complete") else "▼ failed"


def summarize(run: Run) -> None:
    """What there is so far, of this run and those before it on the same sources."""
    found = {stage: run.read(stage) for stage in STAGES}
    rows = card_report.rows_of(found)
    if rows:
        card_report.print_rows(rows, terminal.print_table)
    requirements = card_report.table(rows)
    card_report.print_requirements(requirements, terminal.print_table)
    lines = []
    for stage, record in found.items():
        if record:
            bad = [name for name, result in record["items"].items() if not good(result)]
            first = bad[0] if bad else (record.get("error") or "").partition("\n")[0]
            lines.append([stage, str(len(record["items"])), str(len(bad)), f"{record['seconds']:.0f} s",
                          state(record), first[:100]])  # fmt: skip
    terminal.print_table("Stages", ["stage", "items", "not good", "took", "", "first of them"], lines)
    everything = {"conditions": run.conditions, "requirements": requirements,
                  "stages": {s: state(r) for s, r in found.items() if r}}  # fmt: skip
    (run.out / "summary.json").write_text(json.dumps(everything, indent=1) + "\n")


def run_stages(run: Run, names: list[str]) -> int:
    status = 0
    for name in names:
        print(f"== {name}: {STAGES[name].__doc__.splitlines()[0]}", flush=True)
        try:
            record = STAGES[name](run).data
        except Exception as error:  # the next stages may still run
            broken = run.record(name)
            broken.end(False, False, f"{type(error).__name__}: {error}")
            record = broken.data
        said = state(record)
        print(f"== {name}: {said}\n" + (f"{record['error']}\n" if record["error"] else ""), flush=True)
        if said == "▼ failed":
            status = 1
        elif "unfinished" in said and status == 0:
            status = 3
    summarize(run)
    return status


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="card.py", description=__doc__.partition("\n\n")[0])

    def stages(text: str) -> list[str]:
        names = list(STAGES) if text == "all" else [name for name in text.split(",") if name]
        wrong = [name for name in names if name not in STAGES]
        if wrong or not names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(STAGES)}, or all, got {text!r}")
        return names

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e6:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    found.add_argument("--stages", type=stages, default=list(STAGES), help=f"{','.join(STAGES)} (default: all)")
    found.add_argument("--out", type=Path, default=ROOT / "build" / "card", help="(default: build/card)")
    found.add_argument("--minutes", type=number, default=8.0, help="that a stage may take (default: 8)")
    found.add_argument("--seconds", type=number, default=0.6, help="of timing for each measurement (default: 0.6)")
    found.add_argument("--jobs", type=terminal.positive, default=4, help="children that test side by side (default: 4)")
    found.add_argument("--commit", help="what to write down where the sources are a copy without their repository")
    found.add_argument("--tests", default="", metavar="ARGS", help="more arguments for pytest, such as '-k LSTM'")
    found.add_argument("--list", action="store_true", help="say what there is to do, and do nothing")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.list:
        lines = [[name, stage.__doc__.splitlines()[0]] for name, stage in STAGES.items()]
        terminal.print_table("Stages", ["stage", ""], lines)
        terminal.print_table(
            "Workloads",
            ["workload", "B,T,I,H,L,D", "precisions"],
            [[w.name, w.shape, ", ".join(w.precisions)] for w in card_work.WORKS],
        )
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    conditions = card_facts.conditions(args.commit)
    if conditions["card"] is None:
        print("card.py: torch sees no GPU here: nothing can be shown", file=sys.stderr)
        return 1
    print(f"{conditions['card']}, torch {conditions['torch']}, cuDNN {conditions['cudnn']}", flush=True)
    conditions |= {"works": card_work.fingerprint()}
    run = Run(args.out, conditions, args.minutes, args.jobs, args.seconds, tuple(shlex.split(args.tests)))
    return run_stages(run, args.stages)


if __name__ == "__main__":
    sys.exit(main())
