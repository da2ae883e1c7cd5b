"""RNNCell, LSTMCell and GRUCell: torch.nn's classes on the same layer operator, with one step.

As in modules.py, whatever is not plainly right goes to torch.nn's own forward, which raises its own error or copes.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastrnn import autograd, direct, functional, ops
from fastrnn.frozen import Packing, freezable, kept, usable
from fastrnn.modules import twin
from fastrnn.plan import KERNEL, STEP, TORCH, plan, precision
from fastrnn.recording import recorder_of
from fastrnn.stepping import steppable

TORCH_FORWARD = {base: base.forward for base in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)}


_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def name(self) -> str:
    """The cell's name for the operator."""
    if isinstance(self, nn.RNNCell):
        return f"rnn_{self.nonlinearity}"
    return "lstm" if isinstance(self, nn.LSTMCell) else "gru"


def resolve(self, cell: str, input, hx):
    """A valid call as (x (B, I), h (B, H) or None, c or None, weights); None when torch is to have it."""
    gates, H, I = _GATES.get(cell), self.hidden_size, self.input_size
    if gates is None or not isinstance(input, Tensor) or not H or not I:
        return None
    shape = input.shape
    batched = len(shape) == 2
    if (not batched and len(shape) != 1) or shape[-1] != I:
        return None
    weights = []
    width = gates * H
    parameters = self._parameters  # a parametrization takes a weight out of it
    for name, expected in (
        ("weight_ih", (width, I)),
        ("weight_hh", (width, H)),
        ("bias_ih", (width,)),
        ("bias_hh", (width,)),
    ):
        w = parameters[name] if name in parameters else getattr(self, name)
        if isinstance(w, Tensor):
            if w.shape != expected:
                return None
            weights.append(w)
        elif w is not None or expected != (width,):
            return None
    if len(weights) == 3:
        return None
    h = c = None
    if hx is not None:
        state = (shape[0], H) if batched else (H,)
        if cell != "lstm":
            h = hx
        elif isinstance(hx, (tuple, list)) and len(hx) == 2:
            h, c = hx
            if not isinstance(c, Tensor) or c.shape != state:
                return None
        else:
            return None
        if not isinstance(h, Tensor) or h.shape != state:
            return None
    if batched:
        return input, h, c, weights
    return input[None], None if h is None else h[None], None if c is None else c[None], weights


def _forward(self, cell: str, input, hx):
    """One step: h, of an LSTM (h, c)."""
    found = direct.forward(self, cell, False, input, hx)
    if found is not None:
        return found
    found = _step(self, cell, input, hx)
    if found is None:
        base = nn.LSTMCell if cell == "lstm" else nn.GRUCell if cell == "gru" else nn.RNNCell
        return TORCH_FORWARD[base](self, input, hx)
    return found if cell == "lstm" else found[0]


def _step(self, cell: str, input, hx):
    """One step by the operators, as (h, c); None when torch is to have the call."""
    call = resolve(self, cell, input, hx)
    if call is None:
        return None
    x, h, c, weights = call
    route, recorder = plan(cell, x, h, c, weights, STEP, False), recorder_of(self)
    if recorder is not None:
        recorder, route = functional.watched(recorder, route, x, h, c, weights)
    if route.path is TORCH:
        return None
    watcher = None if recorder is None else recorder.begin(cell, 1, h).watcher()
    work = route.work
    if route.cast:
        x, weights = x.to(work), [w.to(work) for w in weights]
        h = None if h is None else h.to(work)
        c = None if c is None else c.to(work)
    packed = kept(self, x)
    if route.path is not KERNEL:
        h, c = (None if t is None else t[None] for t in (h, c))
        _, h, c, *_ = functional.one_layer(
            route, cell, x[None], h, c, weights, None, None, None, False, False, False, watcher=watcher
        )
        h, c = h.squeeze(0), None if c is None else c.squeeze(0)
    elif packed is not None and usable(route, x, h, c, weights):
        h, _, c = ops.frozen(packed, x, h, c)
        c = c if cell == "lstm" else None
    else:
        h, c = autograd.step(cell, x, h, c, weights, precision(work, x.is_cuda), watcher)
    return (h, c) if input.dim() == 2 else (h.squeeze(0), None if c is None else c.squeeze(0))


def _doc(base: type) -> str:
    return (
        f"torch.nn.{base.__name__} on fastrnn's kernels: the same constructor, parameters, results.\n\n{base.__doc__}"
    )


def _packing(self) -> Packing:
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
    return Packing(name(self), [getattr(self, n) for n in names], names, False, 1)


@steppable(_packing, name, layered=False)
@freezable(_packing)
class RNNCell(nn.RNNCell):
    __doc__ = _doc(nn.RNNCell)

    def forward(self, input, hx=None):
        """h' (B, H) from input (B, I) and hx (B, H) or None; or all without B. Errors are torch.nn.RNNCell's."""
        return _forward(self, f"rnn_{self.nonlinearity}", input, hx)

    def __prepare_scriptable__(self):
        return twin(self, nn.RNNCell, RNNCell.forward, TORCH_FORWARD[nn.RNNCell])


@steppable(_packing, name, layered=False)
@freezable(_packing)
class LSTMCell(nn.LSTMCell):
    __doc__ = _doc(nn.LSTMCell)

    def forward(self, input, hx=None):
        """(h', c') (B, H) from input (B, I) and hx (h, c) (B, H) or None; or all without B. Errors are torch.nn's."""
        return _forward(self, "lstm", input, hx)

    def __prepare_scriptable__(self):
        return twin(self, nn.LSTMCell, LSTMCell.forward, TORCH_FORWARD[nn.LSTMCell])


@steppable(_packing, name, layered=False)
@freezable(_packing)
class GRUCell(nn.GRUCell):
    __doc__ = _doc(nn.GRUCell)

    def forward(self, input, hx=None):
        """h' (B, H) from input (B, I) and hx (B, H) or None; or all without B. Errors are torch.nn.GRUCell's."""
        return _forward(self, "gru", input, hx)

    def __prepare_scriptable__(self):
        return twin(self, nn.GRUCell, GRUCell.forward, TORCH_FORWARD[nn.GRUCell])
