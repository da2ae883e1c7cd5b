"""Options of the suites: which workloads, how many threads, which dtype."""

import pytest
import torch

from fastrnn import workloads


def pytest_addoption(parser):
    group = parser.getgroup("fastrnn")
    group.addoption("--group", choices=("all", *workloads.GROUPS), default="workloads", help="(default: workloads)")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    group.addoption("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    """Every workload in each of its modes, on torch.nn and on fastrnn side by side."""
    if "workload" in metafunc.fixturenames:
        cases = [(w, mode) for w in workloads.select(metafunc.config.getoption("--group")) for mode in w.modes]
        names = [f"{w.name}, {mode}" for w, mode in cases]
        metafunc.parametrize("workload, mode", cases, ids=names, scope="module")


@pytest.fixture(scope="session")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))
