"""RNN, LSTM and GRU: torch.nn's classes, with another forward.

Constructors, parameters, initialisation, state_dict, pickling, repr and argument checks are torch.nn's own, by
inheritance. When anything about a call is not plainly right, torch.nn's own forward is called, which raises its own
error (or copes).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import direct, functional
from fastrnn.frozen import Packing, freezable, kept, thaw
from fastrnn.recording import recorder_of
from fastrnn.stepping import steppable

_CELL = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}

# Captured at import: patch() replaces the attribute of the class.
TORCH_FORWARD = {base: base.forward for base in (nn.RNN, nn.LSTM, nn.GRU)}


def _torch_forward(self, input, hx):
    base = nn.LSTM if self.mode == "LSTM" else nn.GRU if self.mode == "GRU" else nn.RNN
    return TORCH_FORWARD[base](self, input, hx)


def _weights(self) -> list[Tensor | None]:
    """The weights as they are now: functional_call, parametrizations, pruning and plain assignment all replace them."""
    parameters = self._parameters
    return [parameters[n] if n in parameters else getattr(self, n, None) for n in self._flat_weights_names]


class Call(NamedTuple):
    """A valid call of a module, in the terms of functional.run. hx has its batch dimension; `weights` is flat."""

    cell: str
    data: Tensor
    hx: Tensor | tuple[Tensor, Tensor] | None
    weights: list[Tensor]
    T: int
    B: int
    packed: bool
    unbatched: bool
    batch_first: bool


def resolve(self, input, hx) -> Call | None:
    """What a call means; None when torch.nn's own forward is to have it, for an error as a rule."""
    packed = isinstance(input, PackedSequence)
    data = input[0] if packed else input
    if not isinstance(data, Tensor):
        return None
    shape = data.shape
    unbatched, batch_first, dim = False, self.batch_first, len(shape)
    if packed:
        if dim != 2:
            return None
        T, B = input[1].size(0), functional.packed_batch(input[1], shape[0])
        batch_first = False
        if B is None:
            return None
    elif dim == 3:
        T, B = (shape[1], shape[0]) if batch_first else (shape[0], shape[1])
    elif dim == 2:
        T, B = shape[0], 1
        data, unbatched, batch_first = data.unsqueeze(1), True, False
    else:
        return None
    weights = _weights(self)
    first = weights[0]
    for w in weights:
        if not isinstance(w, Tensor):
            return None
    if (
        T == 0
        or shape[-1] != self.input_size
        or data.device != first.device
        or (data.dtype != first.dtype and not torch._C._is_any_autocast_enabled())
        or not 0 <= self.dropout <= 1
    ):
        return None
    lstm = self.mode == "LSTM"
    if hx is not None:
        layers = self.num_layers * 2 if self.bidirectional else self.num_layers
        if not lstm:
            hx = _state(hx, layers, B, self.hidden_size, unbatched)
            if hx is None:
                return None
        elif isinstance(hx, (tuple, list)) and len(hx) == 2:
            h = _state(hx[0], layers, B, self.proj_size or self.hidden_size, unbatched)
            c = _state(hx[1], layers, B, self.hidden_size, unbatched)
            if h is None or c is None:
                return None
            hx = (h, c)
        else:
            return None
    return Call(_CELL[self.mode], data, hx, weights, T, B, packed, unbatched, batch_first)


def _state(state, layers, B, width, unbatched: bool) -> Tensor | None:
    """(layers, B, width) from a state as the caller gave it; None if it is not one."""
    if not isinstance(state, Tensor):
        return None
    if unbatched:
        return state.unsqueeze(1) if state.shape == (layers, width) else None
    return state if state.shape == (layers, B, width) else None


def forward(self, input, hx=None, *positional, reset=None, lengths=None, all_states=False, reset_state=None):
    """torch.nn's forward, and what it has not.

    Letters: T steps, B rows, I features, H_out width of the output (proj_size or hidden_size), L layers, D directions.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, (T, I) unbatched, or a PackedSequence.
        hx: h0 (L*D, B, H_out), for LSTM a pair with c0 (L*D, B, hidden_size); without B if unbatched. None is zero.
        reset: bool (T, B), (B, T) if batch_first, (T,) unbatched; (T, B) in the caller's row order for a
            PackedSequence. reset[t], t >= 1, separates step t-1 from step t in both directions and all layers: states
            start from zero there and no gradient crosses. reset[0] discards hx of the forward directions.
        lengths: int32 or int64 (B,), 0-d unbatched, values 0 to T in any order: the result of packing, without
            packing. Input past a length is never read, output past it is zero. Not with a PackedSequence.
        all_states: also return the state after every step, before dropout, time-major whatever batch_first:
            (L*D, T, B, H_out), for LSTM a pair with c (L*D, T, B, hidden_size).
        reset_state: what states start from where `reset` separates steps, instead of zero: like hx, or with B = 1 for
            the same in every row. Differentiable: it may be learned.

    Returns:
        (output, h_n), for LSTM (output, (h_n, c_n)); with all_states the states as a third value.

    Raises:
        torch.nn's own errors for its arguments; TypeError and ValueError for the new ones.
    """
    if positional and not torch.onnx.is_in_onnx_export():  # torch.onnx's older exporter passes the defaults like that
        raise TypeError(
            "reset, lengths, all_states, reset_state: expected keyword arguments, got "
            f"{len(positional)} more positional argument(s)"
        )
    if all_states is not True and all_states is not False:
        raise TypeError(f"all_states: expected a bool, got {type(all_states).__name__}")
    extended = reset is not None or lengths is not None or all_states or reset_state is not None
    if not extended:
        found = direct.forward(self, _CELL[self.mode], True, input, hx)
        if found is not None:
            return found
    call = resolve(self, input, hx)
    if call is None:
        found = _torch_forward(self, input, hx)  # raises, as a rule
        if not extended:
            return found
        raise ValueError(
            "input, hx: expected shapes and dtypes that fit the module, with reset, lengths, all_states or reset_state"
        )
    cell, data, hx, weights, T, B, packed, unbatched, batch_first = call
    if lengths is not None:
        if packed:
            raise ValueError("lengths: expected None with a PackedSequence, which carries its own, got a value")
        lengths = functional.check_lengths(lengths, T, B, unbatched)
    if reset is not None:
        reset = functional.check_reset(reset, T, B, unbatched, batch_first)
    if reset_state is not None:
        layers, H = self.num_layers * 2 if self.bidirectional else self.num_layers, self.hidden_size
        reset_state = functional.check_reset_state(
            cell, reset_state, data, layers, B, H, self.proj_size or H, unbatched
        )

    recompute = getattr(self, "recompute", False)  # torch.nn's own objects, under patch(), have none
    if packed:
        found = functional.run_packed(
            cell, input, hx, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            reset, all_states, kept(self, data), reset_state, recompute, recorder_of(self),
        )  # fmt: skip
    else:
        found = functional.run(
            cell, data, hx, weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            batch_first, None, lengths, reset, all_states, kept(self, data), reset_state, recompute, recorder_of(self),
        )  # fmt: skip
    return functional.results(cell, found, unbatched, all_states)


def twin(self: nn.Module, base: type[nn.Module], forward, torch_forward) -> nn.Module:
    """For torch.jit.script: a module of torch.nn's class `base` that shares parameters, buffers and hooks with `self`.

    forward is fastrnn's, torch_forward torch.nn's. A subclass with a forward of its own is returned as it is.
    """
    if type(self).forward is not forward:
        return self
    kind = base
    if base.forward is not torch_forward:
        # patch() is in force. The name and the module are torch's so that the compiler finds the overloads of forward.
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": torch_forward}
        kind = type(base.__name__, (base,), names)
    other = kind.__new__(kind)
    other.__dict__ = dict(self.__dict__)
    thaw(other)
    if "_flat_weights" in other.__dict__:
        other._flat_weights = list(self._flat_weights)
    return other


def _class_doc(base: type[nn.Module]) -> str:
    return f"""torch.nn.{base.__name__} on fastrnn's kernels: the same constructor, parameters and results.

    recompute (keyword, and attribute): keep for backward the states at the ends of chunks of steps and the last chunk
    whole, and run the others again there: for long sequences a small part of the memory, for about a third more time.
    The same bits, but for the gradients of weights and reset states, which are added up in another order.

    {base.__doc__}"""


def _recomputing(base: type[nn.Module]):
    """The methods of the keyword `recompute`, and its value for objects that were made without it."""

    def __init__(self, *args, recompute: bool = False, **kwargs):
        if recompute is not True and recompute is not False:
            raise TypeError(f"recompute: expected a bool, got {type(recompute).__name__}")
        base.__init__(self, *args, **kwargs)
        self.recompute = recompute

    def extra_repr(self) -> str:
        return base.extra_repr(self) + (", recompute=True" if self.recompute else "")

    return __init__, extra_repr, False


def _cell(self) -> str:
    return _CELL[self.mode]


def _packing(self) -> Packing:
    return Packing(_cell(self), _weights(self), self._flat_weights_names, self.bidirectional, self.num_layers)


@steppable(_packing, _cell, layered=True)
@freezable(_packing)
class RNN(nn.RNN):
    __doc__ = _class_doc(nn.RNN)
    __init__, extra_repr, recompute = _recomputing(nn.RNN)
    forward = forward

    def __prepare_scriptable__(self):
        return twin(self, nn.RNN, RNN.forward, TORCH_FORWARD[nn.RNN])


@steppable(_packing, _cell, layered=True)
@freezable(_packing)
class LSTM(nn.LSTM):
    __doc__ = _class_doc(nn.LSTM)
    __init__, extra_repr, recompute = _recomputing(nn.LSTM)
    forward = forward

    def __prepare_scriptable__(self):
        return twin(self, nn.LSTM, LSTM.forward, TORCH_FORWARD[nn.LSTM])


@steppable(_packing, _cell, layered=True)
@freezable(_packing)
class GRU(nn.GRU):
    __doc__ = _class_doc(nn.GRU)
    __init__, extra_repr, recompute = _recomputing(nn.GRU)
    forward = forward

    def __prepare_scriptable__(self):
        return twin(self, nn.GRU, GRU.forward, TORCH_FORWARD[nn.GRU])
