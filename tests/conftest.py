"""What every test shares: instruction sets, dtypes, seeds, poisoned memory, and the one tolerance rule for numbers.

The rule (see `Rule`) is the only place in the suite that holds a tolerance, but for test_precision.py, where float32
is asked to be less. Everything else is compared bit for bit.
"""

import contextlib
import ctypes
import json
import math
import os
import platform
from pathlib import Path

import fastrnn._C as _C
import hypothesis
import numpy as np
import pytest
import torch

import fastrnn

# Tests that start Python again start it in other folders: let it find the package that is under test.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(fastrnn.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)
ISAS = list(_C.isas())
DEFAULT_ISA = [isa for isa in ISAS if isa != "amx"][-1]  # which has to be asked for
KINDS = ["RNN_TANH", "RNN_RELU", "LSTM", "GRU"]
SIXTEEN = (torch.bfloat16, torch.float16)
DTYPES = [torch.float32, torch.float64, *SIXTEEN]
TINY = {torch.float32: 2e-7, torch.float64: 1e-15, torch.bfloat16: 3e-3, torch.float16: 3e-3}
# An err_torch that no rounding explains: then what the test calls the truth is not, and the rule would hold of itself.
INSANE = {torch.float32: 1e-3, torch.float64: 1e-11, torch.bfloat16: 1.0, torch.float16: 1.0}

hypothesis.settings.register_profile(
    "local",
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("local"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def poison_fresh_memory():
    """Make malloc fill what it hands out with 0x7f bytes: an output nobody wrote is huge, not accidentally zero."""
    if platform.libc_ver()[0] != "glibc":
        return False
    m_perturb, complement = -6, 0x80
    return ctypes.CDLL(None).mallopt(m_perturb, complement) == 1


POISONED = poison_fresh_memory()


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def as_array(x):
    return x if isinstance(x, np.ndarray) else x.detach().cpu().double().numpy()


class Error:
    """Difference of a tensor from the truth (float64, or a long double array), pooled over the draws it is shown."""

    def __init__(self):
        self.difference = self.size = self.largest_difference = self.largest = 0.0
        self.count = 0

    def add(self, x, ref):
        x, ref = as_array(x), as_array(ref)
        assert np.isfinite(ref).all(), "the reference of this test is not finite: the test is wrong"
        self.count += ref.size
        if ref.size:
            difference = np.abs(x - ref)
            self.difference += float((difference**2).sum())
            self.size += float((ref**2).sum())
            self.largest_difference = max(self.largest_difference, float(np.nan_to_num(difference, nan=np.inf).max()))
            self.largest = max(self.largest, float(np.abs(ref).max()))

    def norm(self):
        """Relative error in norm. Against nothing but zeros, anything but exact zeros is wrong."""
        error = math.sqrt(self.difference) / math.sqrt(self.size) if self.size else math.inf if self.difference else 0.0
        return math.inf if math.isnan(error) else error

    def peak(self):
        """Largest difference over largest magnitude."""
        return self.largest_difference / self.largest if self.largest else 0.0 if self.norm() == 0 else math.inf


class Rule:
    """The tolerance rule of architecture.md, section 5, and the record of what it measured.

    Per tensor: relative error in norm `err <= 1.5 * err_torch + tiny`, and three times that for the largest element
    (largest difference over largest magnitude, torch's measured the same way).

    In a tensor of a few elements, or after a cancellation, err_torch is a matter of luck. So a configuration with a
    tensor over its bound is drawn again, with fresh data, and judged by the errors of all draws taken as one tensor, of
    at least four draws and 32 numbers: torch's luck does not repeat, a fault of ours does.
    """

    def __init__(self):
        self.tiny, self.insane = TINY, INSANE
        self.configurations = self.redrawn = 0
        self.by_dtype = {}
        self.worst = {}

    def check(self, draw, dtype, where=""):
        """draw(n) -> ours, torch's in the same dtype, truth: dictionaries of tensors, None for no gradient."""
        __tracebackhide__ = True
        self.configurations += 1
        errors, failures = {}, []
        for attempt in range(32):
            self.add(errors, *draw(attempt), dtype, where)
            if attempt == 0:
                for mine, theirs in errors.values():
                    self.record_ratio(dtype, mine.norm(), theirs.norm())
            failures = list(self.over(errors, dtype))
            if attempt == 0:
                if not failures:
                    break
                self.redrawn += 1
            # No stopping at the first draw that happens to bring the errors below their bounds.
            elif attempt >= 3 and min(mine.count for mine, _ in errors.values() if mine.count) >= 32:
                break
        for name, (mine, theirs) in errors.items():
            self.record_worst(dtype, mine.norm(), theirs.norm(), f"{name} {where}")
        assert not failures, f"{where}\n" + "\n".join(failures)

    def add(self, errors, ours, theirs, truth, dtype, where):
        __tracebackhide__ = True
        assert ours.keys() == theirs.keys() == truth.keys(), (list(ours), list(theirs), list(truth))
        for name, want in truth.items():
            x, y = ours[name], theirs[name]
            if want is None or y is None or x is None:
                assert x is None and y is None and want is None, f"{name}: one of the three has no gradient; {where}"
                continue
            shapes = [tuple(v.shape) for v in (x, y, want)]
            assert shapes[0] == shapes[1] == shapes[2], f"{name}: shape {shapes[0]}, torch's {shapes[1]}; {where}"
            assert x.dtype == dtype, f"{name}: {x.dtype}, expected {dtype}; {where}"
            mine, torchs = errors.setdefault(name, (Error(), Error()))
            mine.add(x, want)
            torchs.add(y, want)

    def over(self, errors, dtype):
        for name, (mine, theirs) in errors.items():
            assert theirs.norm() < self.insane[dtype], (
                f"{name}: torch's error is {theirs.norm()}: the truth is wrong, not torch"
            )
            tiny = self.tiny[dtype]
            bound, peak_bound = 1.5 * theirs.norm() + tiny, 3 * (1.5 * theirs.peak() + tiny)
            if not mine.norm() <= bound:
                yield f"{name}: error {mine.norm():.3e}, torch's {theirs.norm():.3e}, bound {bound:.3e}"
            if not mine.peak() <= peak_bound:
                yield f"{name}: largest element {mine.peak():.3e}, torch's {theirs.peak():.3e}, bound {peak_bound:.3e}"

    def record_ratio(self, dtype, err, err_torch):
        floor = self.tiny[dtype] / 200  # far below one rounding: keeps a lucky exact zero out of the logarithm
        ratio = max(err, floor) / max(err_torch, floor)
        total, count = self.by_dtype.get(dtype, (0.0, 0))
        if math.isfinite(ratio):
            self.by_dtype[dtype] = (total + math.log(ratio), count + 1)

    def record_worst(self, dtype, err, err_torch, where):
        share = err / (1.5 * err_torch + self.tiny[dtype])
        if share > self.worst.get(dtype, (-1.0,))[0]:
            self.worst[dtype] = (share, err, err_torch, where)

    def geometric_mean(self, dtype):
        total, count = self.by_dtype[dtype]
        return math.exp(total / count)


# The random configurations of test_accuracy.py are one suite, whose geometric mean is asserted and reported.
SUITE = Rule()


def pytest_terminal_summary(terminalreporter):
    if not SUITE.configurations:
        return
    terminalreporter.section("tolerance rule over random configurations")
    terminalreporter.line(
        f"{SUITE.configurations} configurations ({SUITE.redrawn} drawn again), ISAs {', '.join(ISAS)}"
    )
    for dtype, (_, count) in SUITE.by_dtype.items():
        share, err, err_torch, where = SUITE.worst[dtype]
        terminalreporter.line(
            f"{dtype_name(dtype):>9}: {count} tensors, "
            f"geometric mean of err / err_torch {SUITE.geometric_mean(dtype):.3f}, "
            f"worst {share:.2f} of its bound (err {err:.2e}, torch {err_torch:.2e}: {where})"
        )


def pytest_collection_modifyitems(config, items):
    """avx512_bf16 differs from avx512 in bfloat16 alone: of tests that go through the tiers, it runs those of that
    dtype (their names tell)."""
    through_tiers = [item for item in items if hasattr(item, "callspec") and "isa" in item.callspec.params]
    left_out = {i for i in through_tiers if i.callspec.params["isa"] == "avx512_bf16" and "bfloat16" not in i.name}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def rule(record_property):
    """A rule of the test's own; what it measured goes into the report (--junitxml, benchmarks/card.py)."""
    rule = Rule()
    yield rule
    for dtype, (share, err, err_torch, where) in rule.worst.items():
        worst = {"share": share, "err": err, "err_torch": err_torch, "where": where}
        worst |= {"ratio": rule.geometric_mean(dtype) if dtype in rule.by_dtype else None}
        record_property(dtype_name(dtype), json.dumps(worst))


@pytest.fixture
def suite():
    return SUITE


# torch's switches for the precision of cuDNN's operators: torch.export reads both, and refuses when they differ.
SWITCHES = {operator: torch._C._get_fp32_precision_getter("cuda", operator) for operator in ("conv", "rnn")}


@pytest.fixture(autouse=True)
def quiet_state():
    """Every test starts from the same seed and the default tier, and leaves torch's switches as it found them."""
    threads, onednn = torch.get_num_threads(), torch._C._get_mkldnn_enabled()
    torch.manual_seed(20240501)
    yield
    _C.set_isa("")
    for operator, setting in SWITCHES.items():
        if torch._C._get_fp32_precision_getter("cuda", operator) != setting:
            torch._C._set_fp32_precision_setter("cuda", operator, setting)
    if torch._C._get_mkldnn_enabled() != onednn:
        torch._C._set_mkldnn_enabled(onednn)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    _C.set_isa(request.param)
    assert _C.isa() == request.param
    yield request.param
    _C.set_isa("")


@contextlib.contextmanager
def shared_out(split, threads):
    """Inside, layers are shared out like this."""
    before = torch.get_num_threads()
    try:
        _C.set_split(split)
        torch.set_num_threads(threads)
        yield
    finally:
        _C.set_split("")
        torch.set_num_threads(before)


def build(kind, *args, module=fastrnn, **kwargs):
    """One of the four cells by torch's mode name, from `fastrnn` or from `torch.nn`."""
    if kind.startswith("RNN"):
        return module.RNN(*args, nonlinearity=kind[4:].lower(), **kwargs)
    return getattr(module, kind)(*args, **kwargs)


def pair(kind, *args, **kwargs):
    """(fastrnn's, torch.nn's) with the same weights."""
    theirs = build(kind, *args, module=torch.nn, **kwargs)
    ours = build(kind, *args, module=fastrnn, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def flat(hidden):
    return list(hidden) if isinstance(hidden, (tuple, list)) else [hidden]


@torch.no_grad()
def decide_relu(module):
    """Give every unit of a relu network a bias that decides its sign, far from zero, whatever the input."""
    for name, p in module.named_parameters():
        if "weight" in name:
            p.mul_(0.1 / p.abs().sum(1).max())
        elif "bias_ih" in name:
            p.copy_(p.sign())
        else:
            p.zero_()


def normal(*shape, dtype=torch.float32, seed=0):
    """Random numbers that are the same in every dtype, up to its rounding."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float32).to(dtype)


def tensors_in(value):
    """Every tensor in a result, PackedSequence's data included, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return [value.data]
    return [t for part in value for t in tensors_in(part)]


def equal(found, expected):
    """Bit for bit: for results that come from the same kernels by another way, as in compiled code."""
    found, expected = tensors_in(found), tensors_in(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.equal(b), (a.double() - b.double()).abs().max()


def with_gradients(outputs, wanted, seed=7):
    """A dictionary of the outputs and of the gradients of `wanted` for random incoming gradients."""
    outs = tensors_in(outputs)
    incoming = [normal(*o.shape, dtype=o.dtype, seed=seed + i) for i, o in enumerate(outs)]
    grads = torch.autograd.grad(outs, wanted, incoming, allow_unused=True)
    named = {f"output {i}": o for i, o in enumerate(outs)}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


def against_torch(rule, make, call, dtype=torch.float32, where=""):
    """The rule for what a module can do. make(torch.nn or fastrnn); call(module, dtype, seed) -> dict."""

    def draw(n):
        results = []
        for nn, kind in ((fastrnn, dtype), (torch.nn, dtype), (torch.nn, torch.float64)):
            torch.manual_seed(n)
            module = make(nn).to(dtype).to(kind)  # the truth has the rounded weights
            torch.manual_seed(100 + n)
            results.append(call(module, kind, 1000 * n))
        return results

    rule.check(draw, dtype, where)
