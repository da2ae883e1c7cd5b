"""Data-parallel training: DistributedDataParallel over processes, each with its part of every batch.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py      two processes on this machine (one for each GPU)
    python examples/ddp.py                                        one process, the same batches
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --cell gru --quick

A character model learns English (Python's own help topics). A batch of N rows is dealt out to W processes; rank r has
the rows R_r, and DDP takes the mean of the ranks' gradients (Li et al., 2020, "PyTorch Distributed: Experiences on
Accelerating Data Parallel Training"). That is the gradient of the whole batch's mean loss, however unequal the parts,
if each rank's loss is

    loss_r = W / (N T) * sum over rows i in R_r and steps t of l(i, t)         (1/W) sum_r loss_r = mean of l

Before training, every rank holds DDP's gradients against those of the whole batch. Afterwards rank 0 trains the same
model from the same seed alone, so that the losses can be laid on each other. gloo on CPU, NCCL with a GPU per process.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastrnn
from fastrnn.demo import CELLS, CharacterModel, Text, read_text
from fastrnn.drawing import GREY, OURS, THEIRS, new_figure, save, smooth, tidy, title
from fastrnn.terminal import Progress, launch, print_table, program, settle

FULL = dict(steps=400, hidden=192, layers=2, batch=32, length=64)
QUICK = dict(steps=30, hidden=48, layers=2, batch=15, length=24)  # 15 rows: two processes get unequal parts
LEARNING_RATE, CLIP = 4e-3, 1.0
GRADIENTS_LIMIT = 1e-5  # relative: sums of some thousand float32 terms in another order
SAME, SAME_LIMIT = 10, 1e-4  # in the first ten steps rounding cannot have grown: a larger difference is a fault
TIMEOUT = timedelta(minutes=5)  # of a collective: when a rank is gone, the others do not wait for ever


# ---------------------------------------------------------------------------------------------------- processes


class Team(NamedTuple):
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a (T, B) tensor: sizes differ by one at most, and may be 0."""
        return tensor.tensor_split(self.size, dim=1)[self.rank]


@contextlib.contextmanager
def join():
    """The team that torchrun made, by its environment variables; a team of one without it. Always taken apart again."""
    if "RANK" not in os.environ:
        yield Team(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus and int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
        sys.exit(f"error: --nproc-per-node: expected at most {gpus}, the GPUs here (for CPU: CUDA_VISIBLE_DEVICES='')")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- training


class Trainee:
    """The model, wrapped by DDP in a team of several, with its optimiser and its losses, of the whole batch."""

    def __init__(self, team: Team, data: Text, args: argparse.Namespace):
        self.team, self.losses, self.seconds = team, [], 0.0
        self.name = "1 process" if team.size == 1 else f"{team.size} processes, DDP"
        torch.manual_seed(args.seed)
        rnn_class = getattr(fastrnn, CELLS[args.cell])
        self.model = CharacterModel(rnn_class, len(data.characters), args.hidden, args.layers).to(team.device)
        self.parallel = self.model if team.size == 1 else DistributedDataParallel(self.model)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """This rank's share of the batch's mean loss, times the number of ranks: DDP divides by it."""
        numbers, target = (self.team.part(t.to(self.team.device)) for t in batch)
        logits, _ = self.parallel(numbers)
        share = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        return share * (self.team.size / batch[1].numel())

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        begin = time.perf_counter()
        loss = self.loss(batch)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)  # of the whole batch's gradient: the same on every rank
        self.optimiser.step()
        loss = loss.detach()
        if self.team.size > 1:
            dist.all_reduce(loss)
        self.losses.append(loss.item() / self.team.size)
        self.seconds += time.perf_counter() - begin

    @torch.no_grad()
    def validate(self, data: Text) -> float:
        return self.model.loss(*(t.to(self.team.device) for t in data.validation())).item()


def gradients_apart(trainee: Trainee, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """How far DDP's gradients are from one process's on the whole batch: relative, the worst parameter and rank."""
    whole = copy.deepcopy(trainee.model)
    whole.loss(*(t.to(trainee.team.device) for t in batch)).backward()
    trainee.loss(batch).backward()
    pairs = zip(whole.parameters(), trainee.model.parameters(), strict=True)
    apart = torch.stack([(p.grad - q.grad).norm() / p.grad.norm() for p, q in pairs]).max()
    trainee.optimiser.zero_grad()
    if trainee.team.size > 1:
        dist.all_reduce(apart, dist.ReduceOp.MAX)
    return apart.item()


def train(trainee: Trainee, batches, args: argparse.Namespace) -> None:
    """Progress on rank 0 alone."""
    with Progress({trainee.name: args.steps}) if trainee.team.rank == 0 else contextlib.nullcontext() as progress:
        for step in range(args.steps):
            trainee.step(batches(step))
            if progress:
                progress.update(trainee.name, step + 1, f"loss {trainee.losses[-1]:.3f}")


# ---------------------------------------------------------------------------------------------------- report


def unigram(data: Text) -> float:
    """The held-out loss (nats) of guessing each character by how often training has it, whatever came before."""
    counts = torch.bincount(data.train, minlength=len(data.characters)) + 1.0  # 1: for what training has not
    return cross_entropy(counts.log().expand(len(data.held_out), -1), data.held_out).item()


def setting(args: argparse.Namespace, device: torch.device) -> str:
    layers = "1 layer" if args.layers == 1 else f"{args.layers} layers"
    threads = torch.get_num_threads()
    place = "CUDA" if device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)} each"
    return f"{CELLS[args.cell]}, {layers} of {args.hidden}, batch {args.batch} x {args.length}, {place}"


def report(trainees: list[Trainee], apart: float, data: Text, args: argparse.Namespace) -> bool:
    """Prints the figures; False if something differs where rounding cannot explain it, or nothing was learned."""
    baseline = unigram(data)
    rows = [["frequencies of characters", "", "", f"{baseline:.4f}", ""]]
    for trainee in trainees:
        last = trainee.losses[-max(1, args.steps // 10) :]
        losses = [f"{loss:.4f}" for loss in (trainee.losses[0], sum(last) / len(last), trainee.validate(data))]
        rows.append([trainee.name, *losses, f"{trainee.seconds:.1f}"])
    header = ["trained by", "first loss", "last tenth's", "held-out loss", "seconds"]
    print_table(f"{setting(args, trainees[0].team.device)}, {args.steps} steps", header, rows)
    faults = []
    if len(trainees) == 2:
        gap = [abs(a - b) for a, b in zip(*(t.losses for t in trainees), strict=True)]
        print(f"Gradients: at most {apart:.1e} apart before training, relative in norm, of every parameter")
        early, most = max(gap[:SAME]), max(gap)
        print(f"Losses:    at most {early:.1e} apart in the first {len(gap[:SAME])} steps, {most:.1e} in all")
        if not apart <= GRADIENTS_LIMIT:
            faults.append(f"gradients are {apart:.1e} apart, expected at most {GRADIENTS_LIMIT:g}")
        if not all(g <= SAME_LIMIT for g in gap[:SAME]):
            faults.append(f"losses differ by more than {SAME_LIMIT:g} in the first {SAME} steps")
    if args.steps > 1 and not all(t.losses[-1] < t.losses[0] for t in trainees):
        faults.append("the loss has not fallen")
    for fault in faults:
        print(f"FAULT: {fault}.")
    return not faults


def draw(trainees: list[Trainee], args: argparse.Namespace, path: Path) -> None:
    """The losses on each other, and their difference."""
    figure = new_figure(10 if len(trainees) == 2 else 6.5, 4.6)
    curve, *difference = figure.subplots(1, len(trainees), squeeze=False)[0]
    steps, reach = range(1, args.steps + 1), args.steps // 60
    looks = [dict(color=OURS, linewidth=4, alpha=0.45), dict(color=THEIRS, linewidth=1.2)]
    for trainee, look in zip(trainees, looks):
        curve.plot(steps, smooth(trainee.losses, reach), label=trainee.name, **look)
    curve.set_xlabel("step")
    curve.set_ylabel("loss, nats per character")
    curve.legend(frameon=False)
    title(curve, f"Loss of the whole batch (mean of {2 * reach + 1} steps)")
    for axes in difference:
        gap = [max(abs(a - b), 1e-8) for a, b in zip(*(t.losses for t in trainees), strict=True)]
        axes.semilogy(steps, gap, ".", color=GREY, markersize=4, clip_on=False)
        axes.set_ylim(1e-8, max(1e-2, 2 * max(gap)))
        axes.set_xlabel("step")
        axes.set_ylabel("nats per character (at the edge: at most 1e-8)")
        title(axes, "Difference at the same step")
    tidy(curve, *difference)
    headline = "One model, one seed, the same batches: " if difference else "A character model: "
    figure.suptitle(f"{headline}{' and '.join(t.name for t in trainees)}\n{setting(args, trainees[0].team.device)}")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    sizes = dict(
        steps="training steps",
        hidden="hidden size",
        layers="layers",
        batch="sequences per batch, all processes together",
        length="characters per sequence",
    )
    top = program("Data-parallel training by DistributedDataParallel.", sizes, FULL, "ddp.png")
    top.add_argument("--cell", choices=CELLS, default="lstm", help="which RNN (default: lstm)")
    return top


def main(argv: list[str] | None = None) -> int:
    args = settle(parser().parse_args(argv), FULL, QUICK)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # TF32 would be the largest difference of all
    data = Text(read_text(None, args.length), args.length)
    batches = data.batches(args.steps, args.batch, args.seed)
    with join() as here:
        trainee = Trainee(here, data, args)
        if here.rank == 0:
            print(
                f"{len(data.train):,} characters to train on. {setting(args, here.device)}, {trainee.name}.", flush=True
            )
        apart = gradients_apart(trainee, batches(0))
        train(trainee, batches, args)
    if here.rank != 0:
        return 0
    trainees = [trainee]
    if here.size > 1:  # alone now: the others have gone, nobody waits in a collective
        trainees.append(Trainee(Team(0, 1, here.device), data, args))
        train(trainees[1], batches, args)
    good = report(trainees, apart, data, args)
    draw(trainees, args, args.output)
    print(f"Picture:   {args.output}")
    return 0 if good else 1


if __name__ == "__main__":
    launch(main)
