"""`python -m fastrnn` from outside: what it prints, what it writes, and what its exit code says."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastrnn

QUICK = ["demo", "--quick", "--steps", "6"]


def run(*arguments, cwd, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "fastrnn", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_info(tmp_path):
    done = run("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert fastrnn.__version__ in done.stdout
    assert fastrnn.build_info()["isa"] in done.stdout
    facts = json.loads(run("info", "--json", cwd=tmp_path).stdout)
    assert facts["isas"] == fastrnn.build_info()["isas"]
    assert facts["torch_running"] == torch.__version__
    assert facts["workspace_bytes"] == 0  # nothing has run


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["info", "--nonsense"],
        ["demo", "--steps", "0"],
        ["demo", "--cell", "xyz"],
        ["demo", "--hidden", "x"],
    ],
    ids=str,
)
def test_a_wrong_command_line_is_exit_code_2(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not arguments or len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("info", "check", "demo"):
        assert command in done.stdout
        assert run(command, "--help", cwd=tmp_path).returncode == 0


def test_check(tmp_path):
    done = run("check", "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_check_notices_wrong_numbers(tmp_path):
    """The verdict is a verdict: with a forward of one cell that is off by 1e-5, the exit code is 1."""
    code = (
        "import sys, fastrnn.functional as F, fastrnn.__main__ as m\n"
        "real = F.run\n"
        "def run(*a, **k):\n"
        "    found = real(*a, **k)\n"
        "    return (found[0] * (1 + 1e-5), *found[1:]) if a[0] == 'gru' else found\n"
        "F.run = run\n"
        "sys.exit(m.main(['check', '--quick']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Verdict: BAD" in done.stdout and "gru float32" in done.stdout


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_demo(cell, tmp_path):
    done = run(*QUICK, "--cell", cell, "--out", "picture.png", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    name = cell.upper()
    assert f"torch.nn.{name}" in done.stdout
    assert f"fastrnn.{name}" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    picture = (tmp_path / "picture.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture.rstrip(b"\0")[-8:-4] == b"IEND"  # whole, not cut


def test_demo_on_a_file(tmp_path):
    (tmp_path / "text.txt").write_text(
        "It was a bright cold day in April, and the clocks were striking thirteen. " * 200
    )
    done = run(*QUICK, "--text", "text.txt", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "text.txt" in done.stdout
    assert (tmp_path / "fastrnn-demo.png").exists()


def test_demo_is_the_same_for_the_same_seed(tmp_path):
    def sample():
        return [
            line for line in run(*QUICK, "--threads", "1", cwd=tmp_path).stdout.splitlines() if line.startswith("  | ")
        ]

    first = sample()
    assert first
    assert sample() == first


@pytest.mark.parametrize("case", ["missing", "empty", "short", "binary", "folder", "no such folder for the picture"])
def test_demo_with_bad_files_is_a_one_line_error(case, tmp_path):
    text = tmp_path / "text.txt"
    if case == "folder":
        text.mkdir()
    elif case != "missing":
        text.write_bytes(
            {"empty": b"", "short": b"hello", "binary": b"\xff\xfe\x00\x80" * 9000}.get(case, b"hello " * 9000)
        )
    arguments = ["--text", str(text)]
    if case.startswith("no such"):
        arguments += ["--out", str(tmp_path / "nowhere" / "picture.png")]
    before = sorted(tmp_path.iterdir())
    done = run(*QUICK, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_ctrl_c_leaves_nothing_behind(seconds, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fastrnn", "demo", "--steps", "100000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a suite that was started in the background has Ctrl-C ignored, and would hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout.readline()  # the first line it prints: it has started
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_inside_of_exec(tmp_path):
    """Where Python would end by the signal, though the interrupt was caught."""
    lines = ["import sys", "from fastrnn.terminal import interrupted", "try:", "    exec('raise KeyboardInterrupt')"]
    for leave, code in (("sys.exit(130)", -signal.SIGINT), ("sys.exit(interrupted())", 130)):
        (tmp_path / "program.py").write_text("\n".join([*lines, "except KeyboardInterrupt:", f"    {leave}"]))
        assert subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, timeout=60).returncode == code


def test_a_reader_that_goes_away(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrnn", "info"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    _, error = process.stderr.read(), process.wait(60)
    assert "Traceback" not in _
    assert error in (0, 1)
