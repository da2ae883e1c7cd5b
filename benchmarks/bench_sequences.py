"""The frozen workloads (fastrnn/workloads.py) under pytest-benchmark, for comparing one commit with another.

    pip install pytest pytest-benchmark
    pytest benchmarks/                                  the group "workloads", torch.nn and fastrnn
    pytest benchmarks/ -k "fastrnn and DeepAR"          some of them
    pytest benchmarks/ --group grid --threads 1 --dtype bfloat16
    pytest benchmarks/ -k fastrnn --benchmark-save=before            ... and after a change:
    pytest benchmarks/ -k fastrnn --benchmark-compare --benchmark-compare-fail=median:5%

Here each contender has all its rounds in one go, so a machine that slows down meanwhile falsifies the comparison of the
two. For fastrnn beside torch.nn use `python -m fastrnn bench`, which alternates between them.
"""

import pytest
import torch

import fastrnn
from fastrnn import measure


@pytest.fixture(scope="module")
def case(workload, dtype):
    return measure.Case(workload, dtype)


@pytest.mark.parametrize("contender", ["torch", "fastrnn"])
def bench_sequences(benchmark, case, workload, mode, contender):
    call = case.call(contender, mode)
    benchmark.group = f"{workload.name} ({workload.cell} {workload.shape}), {mode}"
    with torch.set_grad_enabled(mode == "training"):
        call()  # untimed: what only a first call needs
        benchmark(call)
    operations = measure.operations(workload, mode, case.rows)
    benchmark.extra_info.update(
        cell=workload.cell, shape=workload.shape, mode=mode, contender=contender, dtype=str(case.dtype)[6:],
        isa=fastrnn.build_info()["isa"], operations=operations,
    )  # fmt: skip
    if benchmark.stats is not None:  # None under --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info["us_per_step"] = median * 1e6 / (workload.T * workload.L)
        benchmark.extra_info["gflops"] = operations / median * 1e-9
