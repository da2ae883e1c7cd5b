"""Two processes that train together: DDP and FSDP2 with fastrnn's modules (cases_distributed.py); examples/ddp.py."""

import argparse
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import EXAMPLES, is_whole_png, load, table

from fastrnn.demo import Text

ddp = load("ddp")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def torchrun(*command, cwd):
    """Two processes on the loopback interface, at a port that the system chooses. Returns its exit code and both ranks'
    output: [(stdout, stderr), ...]."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    logs = cwd / "logs"
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*program, "--redirects", "3", "--log-dir", str(logs), *command],
        cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        code = process.wait(timeout=400)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it takes its processes along
            process.wait(timeout=60)
    ranks = [next(logs.glob(f"*/attempt_0/{rank}")) for rank in range(2)]
    return code, [tuple((folder / f"{name}.log").read_text() for name in ("stdout", "stderr")) for folder in ranks]


# ---------------------------------------------------------------------------------------------------- the library


@pytest.mark.slow
def test_ddp_and_fsdp_are_one_process(tmp_path):
    cases = Path(__file__).with_name("cases_distributed.py")
    code, ranks = torchrun("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(cases), cwd=tmp_path)
    assert code == 0, ranks
    for output, _ in ranks:
        assert int(re.search(r"^(\d+) passed", output, re.M)[1]) >= 30, output
        assert not re.search(r"\d+ (skipped|deselected|xfailed)", output)


# ---------------------------------------------------------------------------------------------------- the example


@pytest.mark.slow
def test_the_example(tmp_path, capsys):
    code, ((output, error), (silent, _)) = torchrun(str(EXAMPLES / "ddp.py"), "--quick", "--seed", "1", cwd=tmp_path)
    assert code == 0, output + error
    assert error == silent == ""
    both, one = table(output, "2 processes, DDP"), table(output, "1 process")
    assert both[1:3] == one[1:3]  # the first loss and the last ones, to the last digit that is printed
    baseline = float(table(output, "frequencies of characters")[1])
    assert math.log(20) < baseline < math.log(60) and float(both[3]) < baseline
    gradients, early = (
        float(re.search(rf"^{name}: +at most (\S+) apart", output, re.M)[1]) for name in ("Gradients", "Losses")
    )
    assert 0 < gradients <= 1e-5 and 0 < early <= 1e-5
    assert is_whole_png(tmp_path / "ddp.png")

    assert ddp.main(["--quick", "--seed", "1", "--output", str(tmp_path / "alone.png")]) == 0
    alone = capsys.readouterr().out
    assert table(alone, "1 process")[:4] == one[:4]
    assert "2 processes" not in alone and "Gradients" not in alone
    assert is_whole_png(tmp_path / "alone.png")
    assert not dist.is_initialized()


BROKEN = """
import os, sys
sys.path.insert(0, {tests!r})
import programs
ddp = programs.load("ddp")
make = ddp.Trainee.__init__

def fails(*arguments):
    if os.environ["RANK"] == "1":
        raise ArithmeticError("the second rank fails, and the first waits for it")
    make(*arguments)

ddp.Trainee.__init__ = fails
sys.exit(ddp.main(["--quick"]))
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_with_an_error(tmp_path):
    program = tmp_path / "broken.py"
    program.write_text(BROKEN.format(tests=str(Path(__file__).parent)))
    code, ((output, _), (_, error)) = torchrun(str(program), cwd=tmp_path)
    assert code == 1
    assert "ArithmeticError: the second rank fails" in error
    assert "Picture" not in output and not list(tmp_path.glob("*.png"))


def test_a_group_is_taken_apart_whatever_happens(monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_PORT=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ZeroDivisionError), ddp.join() as here:
        assert dist.is_initialized() and here[:2] == (0, 1)
        raise ZeroDivisionError
    assert not dist.is_initialized()


@pytest.mark.parametrize("arguments", [["--cell", "tree"], ["--batch", "0"], ["--output", "nowhere/p.png"]], ids=str)
def test_a_bad_argument_is_named(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ddp.main(arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


TEXT = Text("abracadabra simsalabim " * 30, 8)
SMALL = argparse.Namespace(seed=3, cell="lstm", hidden=7, layers=2, batch=5, length=8, steps=4)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_ranks_losses_are_the_batchs(monkeypatch, size):
    """Of parts that are not equal, and with more ranks than rows: the mean over ranks of losses and gradients."""
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda model: model)
    cpu, batch = torch.device("cpu"), TEXT.batches(1, 5, 0)(0)
    alone = ddp.Trainee(ddp.Team(0, 1, cpu), TEXT, SMALL)
    ranks = [ddp.Trainee(ddp.Team(rank, size, cpu), TEXT, SMALL) for rank in range(size)]
    parts = [trainee.team.part(batch[0]) for trainee in ranks]
    assert torch.cat(parts, 1).equal(batch[0])
    sizes = [part.size(1) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    losses = []
    for trainee in (alone, *ranks):
        trainee.model.double()
        losses.append(trainee.loss(batch))
        losses[-1].backward()
    assert abs(sum(losses[1:]) / size - losses[0]) <= 1e-14 * losses[0]
    for p, *others in zip(*(trainee.model.parameters() for trainee in (alone, *ranks)), strict=True):
        mean = sum(q.grad for q in others) / size
        assert (mean - p.grad).norm() <= 1e-13 * p.grad.norm()


def test_the_baseline_knows_nothing_of_the_held_out_text():
    text = Text("aab" * 100 + "c" * 34, 8)
    assert text.decode(text.held_out[:1].tolist()) == "c"
    counts = {"a": 201.0, "b": 101.0, "c": 1 + (len(text.train) - 300)}
    expected = math.log(sum(counts.values()) / counts["c"])
    assert abs(ddp.unigram(text) - expected) <= 1e-5


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda a, b: None, None),
        (lambda a, b: b.losses.__setitem__(1, 3.0), "losses differ"),
        (lambda a, b: b.losses.__setitem__(1, math.nan), "losses differ"),
        (lambda a, b: a.losses.__setitem__(-1, 9.0), "has not fallen"),
    ],
    ids=["nothing", "another loss", "not a number", "no progress"],
)
def test_what_the_report_would_notice(change, fault, capsys):
    trainees = [ddp.Trainee(ddp.Team(0, 1, torch.device("cpu")), TEXT, SMALL) for _ in range(2)]
    for trainee in trainees:
        trainee.losses = [4.0, 3.5, 3.2, 3.0]
    change(*trainees)
    assert ddp.report(trainees, 1e-7, TEXT, SMALL) is (fault is None)
    output = capsys.readouterr().out
    assert fault in output if fault else "FAULT" not in output
    trainees[0].losses = trainees[1].losses = [4.0, 3.5, 3.2, 3.0]
    assert not ddp.report(trainees, 1e-3, TEXT, SMALL)
    assert "FAULT: gradients are 1.0e-03 apart" in capsys.readouterr().out
