"""Moves models between torch.nn and fastrnn in place, and puts fastrnn under torch.nn's own classes.

Conversion changes an object's class and nothing else: same object, same id, parameters, buffers, hooks, mode and
device; modules that are shared stay shared.

Left alone are subclasses of torch.nn's classes written by others (they may rely on what they override) and other
children of torch.nn's RNN bases. `accelerate` names each in the log "fastrnn" at level INFO:
`logging.basicConfig(level=logging.INFO)` shows them.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils import parametrize

from fastrnn import cells, frozen, modules

_log = logging.getLogger("fastrnn")

_PAIRS = (
    (nn.RNN, modules.RNN),
    (nn.LSTM, modules.LSTM),
    (nn.GRU, modules.GRU),
    (nn.RNNCell, cells.RNNCell),
    (nn.LSTMCell, cells.LSTMCell),
    (nn.GRUCell, cells.GRUCell),
)
_TO_FASTRNN = dict(_PAIRS)
_TO_TORCH = {ours: theirs for theirs, ours in _PAIRS}


def _converted_class(module: nn.Module, classes: dict[type, type]) -> type | None:
    """The class that `module` is to have, or None to leave it alone."""
    kind = type(module)
    if kind in classes:
        return classes[kind]
    # torch.nn.utils.parametrize gives each parametrized module a class of its own, with one property for each
    # parametrized tensor, whose only base is the class it had.
    if len(kind.__bases__) == 1 and kind.__bases__[0] in classes and parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        return type(kind.__name__, (classes[kind.__bases__[0]],), own)
    return None


def accelerate(model: nn.Module) -> nn.Module:
    """Makes every torch.nn RNN, LSTM, GRU and cell in `model` fastrnn's, in place. Returns `model`.

    Converts objects of exactly those types, and their parametrized forms; `model` itself may be one. Others that look
    like one are left alone and named in the log "fastrnn" (level INFO).

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    _check(model)
    for name, module in model.named_modules():
        target = _converted_class(module, _TO_FASTRNN)
        if target is not None:
            module.__class__ = target
        elif isinstance(module, (RNNBase, RNNCellBase)) and not isinstance(module, tuple(_TO_TORCH)):
            kind = type(module)
            _log.info("accelerate: left alone %s, a %s.%s", name or "the model", kind.__module__, kind.__qualname__)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: every fastrnn module in `model` becomes torch.nn's again, in place. Returns `model`.

    For tools that ask for exact torch.nn types, such as torch.ao.quantization.quantize_dynamic. Also makes torch.nn
    modules of models that were built from fastrnn's classes.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    _check(model)
    for module in model.modules():
        target = _converted_class(module, _TO_TORCH)
        if target is not None:
            frozen.thaw(module)
            module.__class__ = target
    return model


def _check(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


class _Patch:
    """What `patch` returns: `undo()` takes the patch back, and so does the end of a `with` block."""

    _active = 0  # patches in force, over all threads: torch.nn's classes are global

    def __init__(self):
        self._done = False
        _Patch._active += 1
        if _Patch._active == 1:
            for theirs, ours in _PAIRS:
                theirs.forward = ours.forward
                theirs.__prepare_scriptable__ = ours.__prepare_scriptable__

    def undo(self) -> None:
        """Takes this patch back; torch.nn's own methods return with the last one. Does nothing the second time."""
        if self._done:
            return
        self._done = True
        _Patch._active -= 1
        if _Patch._active == 0:
            for theirs, _ in _PAIRS:
                theirs.forward = _ORIGINAL[theirs]
                del theirs.__prepare_scriptable__

    def __enter__(self) -> _Patch:
        return self

    def __exit__(self, *error) -> None:
        self.undo()


_ORIGINAL = {**modules.TORCH_FORWARD, **cells.TORCH_FORWARD}


def patch() -> _Patch:
    """Puts fastrnn's forward into torch.nn's own RNN, LSTM, GRU and cells, for code that cannot be changed.

    Existing objects, pickles, isinstance and subclasses that do not override forward all keep working, and run on
    fastrnn. As a context manager it undoes itself, also after an exception; as a plain call it holds until `.undo()`
    of what it returned. Patches nest. It acts on the whole process, every thread.
    """
    return _Patch()
