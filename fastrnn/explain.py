"""Which kernel a call would run, how it would be shared out among threads, and why; and what this build holds."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import nn

from fastrnn import _C, cells, frozen, functional, modules
from fastrnn.ops import TF32
from fastrnn.plan import DENSE, EXACT, KERNEL, PACKED, STEP, TORCH, TRANSFORMED, Route, fp32_precision, plan, precision


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who would compute a call, and why. `print` shows it.

    path: "fastrnn cpu kernel", "fastrnn cuda kernel", "torch" (torch's own implementation) or "reference" (torch
        operations, step by step).
    why: in words.  cell: the cell's name.  dtype: what it computes in (None where torch decides).
    isa: the instruction set of the CPU's kernels, threads: torch's; both None on another path.
    layers: the sizes of each layer.
    splits: how the forward pass of each layer would be shared out among the threads (small layers on top of each
        other as a wavefront), and what its speed is limited by, both by the kernels' cost model; in words. Never more
        threads than the control group's CPU quota. Results do not depend on it. On a GPU: the name of the
        path (step, block, cluster or grid), among how many blocks of threads, and why. Empty where other than the
        kernels compute.
    """

    path: str
    why: str
    cell: str
    dtype: torch.dtype | None
    isa: str | None
    threads: int | None
    layers: tuple[dict[str, int], ...]
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.why}"]
        facts = [self.cell]
        if self.dtype is not None:
            facts.append(str(self.dtype).removeprefix("torch."))
        if self.isa is not None:
            facts += [self.isa, f"{self.threads} thread{'' if self.threads == 1 else 's'}"]
        lines.append("  " + ", ".join(facts))
        for k, sizes in enumerate(self.layers):
            line = f"  layer {k}: " + ", ".join(f"{name} = {size}" for name, size in sizes.items())
            lines.append(f"{line}: {self.splits[k]}" if self.splits else line)
        return "\n".join(lines)


def explain(module: nn.Module, input, hx=None, *, reset=None, lengths=None, all_states=False, reset_state=None) -> Plan:
    """Which implementation `module(input, hx, ...)` would run on this machine, how, and why. Computes nothing.

    Args:
        module: an RNN, LSTM, GRU or cell, of fastrnn or of torch.nn.
        input, hx, reset, lengths, all_states, reset_state: as for the module's forward. The answer depends also on what
            is active now: autocast, function transforms, fastrnn.patch(). It is of a call that is not recorded for
            backward: `recompute` does not show.

    Raises:
        TypeError: `module` is not one of those.
    """
    extended = reset is not None or lengths is not None or bool(all_states) or reset_state is not None
    if isinstance(module, (nn.RNN, nn.LSTM, nn.GRU)):
        return _explain_sequence(module, input, hx, extended, lengths is not None, bool(all_states))
    if isinstance(module, (nn.RNNCell, nn.LSTMCell, nn.GRUCell)):
        return _explain_cell(module, input, hx)
    raise TypeError(f"module: expected an RNN, LSTM, GRU or a cell of one, got {type(module).__name__}")


def _split(cell: str, dtype: torch.dtype, sizes: dict[str, int], threads: int, groups: int, kept: bool) -> str:
    """How a layer would be shared out, in words."""
    if sizes["B"] == 0:
        return "no rows, nothing to compute"
    if groups > 1:
        found = _found(cell, dtype, sizes, 1, kept=kept)
        return f"wavefront over time, {groups} groups of layers side by side; limit: {found['limit']}"
    found = _found(cell, dtype, sizes, threads, kept=kept)
    ways = []
    if found["slices"] > 1:
        ways.append(f"{found['slices']} slices of the batch")
    if found["parts"] > 1:
        ways.append(f"{found['parts']} parts of the hidden units, meeting after each step")
    text = " x ".join(ways)
    if found["directions"] > 1:
        text = "directions side by side" + (f", each in {text}" if text else "")
    if found["ahead"]:
        text = f"{text}, each with a thread more" if text else "one thread for the recurrence, another"
        text += " to project its input ahead"
    return f"{text or 'one thread'}; limit: {found['limit']}"


def _found(
    cell: str, dtype: torch.dtype, sizes: dict[str, int], threads: int, layers: int = 1, kept: bool = False
) -> dict:
    T, B, I, H = (sizes[name] for name in "TBIH")
    P, D = sizes.get("P", H), sizes.get("D", 1)
    narrow = dtype == torch.bfloat16
    return _C.split(cell, dtype == torch.float64, T, B, I, H, P, D, threads, layers, kept, narrow, precision(dtype))


def _on_gpu(cell: str, dtype: torch.dtype, sizes: dict[str, int], device: torch.device) -> str:
    """How a layer would be computed on a GPU, in words."""
    if sizes["B"] == 0:
        return "no rows, nothing to compute"
    T, B, I, H = (sizes[name] for name in "TBIH")
    tf32 = precision(dtype, True) != EXACT
    with torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext():
        found = _C.gpu_plan(
            cell, str(dtype)[6:], tf32, False, T, B, I, H, sizes.get("P", H), sizes.get("D", 1), None
        )  # fmt: skip
    if found["path"] == "step":
        return f"step, one product and one kernel for each step ({found['why']})"
    return (
        f"{found['path']}, {_many(found['groups'], 'group')} of {_many(found['blocks'], 'block')}, "
        f"{_many(found['units'], 'hidden unit')} in each, {_many(found['rows'], 'row')} at a time ({found['why']})"
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _precision(work: torch.dtype, on_gpu: bool) -> str:
    """What comes of torch's switch for the precision of RNNs, when it does not ask for all of float32."""
    if on_gpu:
        return "" if precision(work, True) == EXACT else f"; its products are of numbers rounded to {_TF32}"
    if precision(work) == TF32:
        return "; products of tiles are of two bfloat16 for a number (torch.backends.mkldnn.rnn.fp32_precision)"
    if precision(work) != EXACT:
        return "; its products are of numbers rounded to bfloat16 (torch.backends.mkldnn.rnn.fp32_precision)"
    if work is torch.float32 and fp32_precision() in ("tf32", "bf16"):
        return f"; float32 stays exact: {_C.isa()} would not be faster for less"
    return ""


_TF32 = "TensorFloat-32 (torch.backends.cudnn.rnn.fp32_precision)"


def _gpu(t: torch.Tensor) -> torch.device | None:
    return t.device if t.is_cuda else None


def _path(route: Route, on_gpu: bool) -> str:
    """Who computes a call, in words."""
    if route.path not in (KERNEL, TRANSFORMED):
        return route.path
    return route.path.replace("fastrnn", f"fastrnn {'cuda' if on_gpu else 'cpu'}")


def _plan(
    route: Route, cell: str, layers, in_one_call: bool = False, kept: bool = False, gpu: torch.device | None = None
) -> Plan:
    """in_one_call: all layers go to the kernels at once, and are not ragged. kept: with frozen weights. gpu: the CUDA
    device that the tensors are on."""
    on_gpu = gpu is not None
    kernel = route.path == KERNEL and not on_gpu
    layers, threads = tuple(layers), torch.get_num_threads()
    groups = 1
    if kernel and in_one_call and len(layers) > 1 and layers[0]["B"]:
        groups = _found(cell, route.work, layers[0], threads, len(layers), kept)["groups"]
    splits = ()
    if kernel:
        splits = tuple(_split(cell, route.work, sizes, threads, groups, kept) for sizes in layers)
    elif route.path == KERNEL:
        splits = tuple(_on_gpu(cell, route.work, sizes, gpu) for sizes in layers)
    why = f"{route.reason}; its packed weights are kept (freeze)" if kept else route.reason
    return Plan(
        _path(route, on_gpu),
        why + _precision(route.work, on_gpu) if route.path == KERNEL else why,
        cell,
        None if route.path == TORCH else route.work,
        _C.isa() if kernel or (route.path == TRANSFORMED and not on_gpu) else None,
        threads if kernel else None,
        layers,
        splits,
    )


def _explain_sequence(module, input, hx, extended: bool, ragged: bool, all_states: bool) -> Plan:
    cell = modules._CELL[module.mode]
    D = 2 if module.bidirectional else 1
    sizes = {"H": module.hidden_size, **({"P": module.proj_size} if module.proj_size else {}), "D": D}
    widths = [module.input_size] + [D * (module.proj_size or module.hidden_size)] * (module.num_layers - 1)
    call = modules.resolve(module, input, hx)
    length = {} if call is None else {"T": call.T, "B": call.B}
    layers = [{**length, "I": width, **sizes} for width in widths]
    if type(module).forward is not modules.forward:
        why = f"the forward of {type(module).__name__} is not fastrnn's; see fastrnn.accelerate and fastrnn.patch"
        return _plan(Route(TORCH, why), cell, layers)
    if call is None:
        why = "the arguments do not fit the module, so torch.nn's own forward gets them and raises its error"
        return _plan(Route(TORCH, why), cell, layers)
    h0, c0 = call.hx if cell == "lstm" and call.hx is not None else (call.hx, None)
    route = plan(cell, call.data, h0, c0, call.weights, PACKED if call.packed else DENSE, extended)
    at_once = functional.in_one_call(route, module.num_layers, module.dropout, module.training, all_states)
    kept = (
        at_once
        and not all_states
        and frozen.kept(module, call.data) is not None
        and frozen.usable(route, call.data, h0, c0, call.weights)
    )
    return _plan(route, cell, layers, at_once and not (ragged or call.packed), kept, _gpu(call.data))


def _explain_cell(module, input, hx) -> Plan:
    ours = {nn.RNNCell: cells.RNNCell, nn.LSTMCell: cells.LSTMCell, nn.GRUCell: cells.GRUCell}
    base = next(base for base in ours if isinstance(module, base))
    cell = cells.name(module)
    layers = [{"I": module.input_size, "H": module.hidden_size}]
    if type(module).forward is not ours[base].forward:
        why = f"the forward of {type(module).__name__} is not fastrnn's; see fastrnn.accelerate and fastrnn.patch"
        return _plan(Route(TORCH, why), cell, layers)
    call = cells.resolve(module, cell, input, hx)
    if call is None:
        why = "torch.nn's own forward gets the arguments: they do not fit the module, or hidden_size is 0"
        return _plan(Route(TORCH, why), cell, layers)
    layers = [{"T": 1, "B": call[0].size(0)} | layers[0]]
    route = plan(cell, *call, STEP, False)
    kept = frozen.kept(module, call[0]) is not None and frozen.usable(route, *call)
    return _plan(route, cell, layers, kept=kept, gpu=_gpu(call[0]))


def build_info() -> dict:
    """What this build holds and what it runs on here: a dict of

    version; torch (built for) and torch_running; compiler; cuda_architectures; isas (built in), available (on this
    machine), isa (in use); rejected_environment (a value of FASTRNN_ISA that names no available one, or None); gpu_path
    (what FASTRNN_GPU_PATH asks for: step, block, cluster, grid, auto, torch, or "" for the default); rejected_gpu_path
    (a value of it that is none of these, or None).
    """
    return _C.build_info() | {"torch_running": torch.__version__}
