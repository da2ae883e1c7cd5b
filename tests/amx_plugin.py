"""What cases_on_amx*.py have in common, a plugin of the pytest that amx.py starts: every case has to have multiplied
tiles, or says that it must not.
"""

import os

import amx
import fastrnn._C as _C
import pytest

EMULATED = bool(os.environ.get("FASTRNN_TESTS_EMULATE"))


def pytest_sessionstart():
    assert _C.isa() == amx.TIER and (amx.products() >= 0) == EMULATED, "to be run by test_amx.py"


@pytest.fixture
def no_tiles():
    """For a case that the tier leaves to the kernels beneath it."""


@pytest.fixture(autouse=True)
def by_tiles(request):
    before = amx.products()
    yield
    if EMULATED:
        assert (amx.products() > before) != ("no_tiles" in request.fixturenames), "who multiplied?"
