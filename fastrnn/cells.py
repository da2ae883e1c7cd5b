"""RNNCell, LSTMCell and GRUCell: torch.nn's classes on the same layer operator, with one step.

As in modules.py, whatever is not plainly right goes to torch.nn's own forward, which raises its own error or copes.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastrnn import autograd
from fastrnn.modules import twin
from fastrnn.plan import KERNEL, SERVED, plan

TORCH_FORWARD = {base: base.forward for base in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)}


_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def name(self) -> str:
    """The cell's name for the operator."""
    if isinstance(self, nn.RNNCell):
        return f"rnn_{self.nonlinearity}"
    return "lstm" if isinstance(self, nn.LSTMCell) else "gru"


def resolve(self, cell: str, input, hx):
    """A valid call as (x (1, B, I), h (1, B, H) or None, c or None, weights); None when torch is to have it."""
    gates, H, I = _GATES.get(cell), self.hidden_size, self.input_size
    if gates is None or not isinstance(input, Tensor) or not H or not I:
        return None
    batched = input.dim() == 2
    if (not batched and input.dim() != 1) or input.size(-1) != I:
        return None
    w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
    weights = [w_ih, w_hh] if b_ih is None and b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    width = gates * H
    for w, shape in zip(weights, ((width, I), (width, H), (width,), (width,))):
        if not isinstance(w, Tensor) or w.shape != shape:
            return None
    h = c = None
    if hx is not None:
        if cell != "lstm":
            h = _state(hx, input, H, batched)
            if h is None:
                return None
        elif isinstance(hx, (tuple, list)) and len(hx) == 2:
            h, c = _state(hx[0], input, H, batched), _state(hx[1], input, H, batched)
            if h is None or c is None:
                return None
        else:
            return None
    return (input.unsqueeze(0) if batched else input[None, None]), h, c, weights


def _state(state, input: Tensor, H: int, batched: bool) -> Tensor | None:
    """(1, B, H) from a state as the caller gave it; None if it is not one."""
    if not isinstance(state, Tensor):
        return None
    if batched:
        return state.unsqueeze(0) if state.shape == (input.size(0), H) else None
    return state[None, None] if state.shape == (H,) else None


def _step(self, input, hx):
    """One step, as (h, c); None when torch is to have the call."""
    cell = name(self)
    call = resolve(self, cell, input, hx)
    if call is None:
        return None
    x, h, c, weights = call
    route = plan(cell, x, h, c, weights, False, False)
    if route.path is not KERNEL:
        return None
    work = route.work
    if route is not SERVED.get(work):
        x, weights = x.to(work), [w.to(work) for w in weights]
        h = None if h is None else h.to(work)
        c = None if c is None else c.to(work)
    _, h, c, _, _ = autograd.layer(cell, x, h, c, weights, None, None, None, False, False, False)
    h = h.squeeze(0)
    c = c if c is None else c.squeeze(0)
    if input.dim() == 1:
        h, c = h.squeeze(0), c if c is None else c.squeeze(0)
    return h, c


def _doc(base: type) -> str:
    return (
        f"torch.nn.{base.__name__} on fastrnn's kernels: the same constructor, parameters, results.\n\n{base.__doc__}"
    )


class RNNCell(nn.RNNCell):
    __doc__ = _doc(nn.RNNCell)

    def forward(self, input, hx=None):
        """h' (B, H) from input (B, I) and hx (B, H) or None; or all without B. Errors are torch.nn.RNNCell's."""
        found = _step(self, input, hx)
        return TORCH_FORWARD[nn.RNNCell](self, input, hx) if found is None else found[0]

    def __prepare_scriptable__(self):
        return twin(self, nn.RNNCell, RNNCell.forward, TORCH_FORWARD[nn.RNNCell])


class LSTMCell(nn.LSTMCell):
    __doc__ = _doc(nn.LSTMCell)

    def forward(self, input, hx=None):
        """(h', c') (B, H) from input (B, I) and hx (h, c) (B, H) or None; or all without B. Errors are torch.nn's."""
        found = _step(self, input, hx)
        return TORCH_FORWARD[nn.LSTMCell](self, input, hx) if found is None else found

    def __prepare_scriptable__(self):
        return twin(self, nn.LSTMCell, LSTMCell.forward, TORCH_FORWARD[nn.LSTMCell])


class GRUCell(nn.GRUCell):
    __doc__ = _doc(nn.GRUCell)

    def forward(self, input, hx=None):
        """h' (B, H) from input (B, I) and hx (B, H) or None; or all without B. Errors are torch.nn.GRUCell's."""
        found = _step(self, input, hx)
        return TORCH_FORWARD[nn.GRUCell](self, input, hx) if found is None else found[0]

    def __prepare_scriptable__(self):
        return twin(self, nn.GRUCell, GRUCell.forward, TORCH_FORWARD[nn.GRUCell])
