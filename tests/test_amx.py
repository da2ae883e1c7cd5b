"""The tier "amx": tests/cases_on_amx*.py in processes of their own, where AMX is the machine's or emulated (amx.py)."""

import platform
import re
import sys

import amx
import fastrnn._C as _C
import pytest

LEAST = {"cases_on_amx.py": 351, "cases_on_amx_edges.py": 137}  # cases, or so many are no longer collected


@pytest.fixture(scope="module")
def preload(tmp_path_factory):
    """The emulator, compiled; "" where the machine has AMX."""
    if amx.TIER in _C.isas():
        return ""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("AMX is of x86-64, and the emulator of Linux")
    if amx.BENEATH not in _C.isas():
        pytest.skip("the tier has AVX-512's bfloat16 instructions beside AMX's, which this machine has not")
    try:
        return amx.build(tmp_path_factory.mktemp("amx"))
    except RuntimeError as why:
        pytest.skip(str(why))


@pytest.mark.slow
@pytest.mark.parametrize("cases", LEAST)
def test_the_tier(preload, cases):
    done = amx.run_tests(preload, cases)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-3000:]
    summary = done.stdout.rstrip().splitlines()[-1]
    found = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", summary)}
    assert found["passed"] >= LEAST[cases], found
    assert not found.keys() & {"failed", "skipped", "error", "errors", "deselected"}, found


def test_the_tier_has_to_be_asked_for(preload):
    """Nobody has measured it on a machine that has AMX."""
    code = "import fastrnn; i = fastrnn.build_info(); print(i['isa'], *i['isas'])"
    done = amx.run_python(preload, "-c", code, FASTRNN_ISA="")
    isa, *isas = done.stdout.split()
    assert isa == amx.BENEATH and isas[-1] == amx.TIER, done.stdout + done.stderr
