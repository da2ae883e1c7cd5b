"""RNN, LSTM and GRU as functions of their weights: layers x directions, dropout between layers, PackedSequence.

`lstm`, `gru` and `rnn` check every argument and are public. The modules check theirs (with torch.nn's own texts) and
enter at `run`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn import autograd, frozen, ops, reference, transforms
from fastrnn import recompute as chunks
from fastrnn.plan import DENSE, KERNEL, PACKED, REFERENCE, TORCH, TRANSFORMED, plan, precision
from fastrnn.recording import cuts, slow

_VF = {"rnn_tanh": torch._VF.rnn_tanh, "rnn_relu": torch._VF.rnn_relu, "lstm": torch._VF.lstm, "gru": torch._VF.gru}


# -------------------------------------------------------------------------------------------------- layers x directions


def run(
    cell: str,
    input: Tensor,
    hx,
    weights: list[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    all_states: bool = False,
    packed: Tensor | None = None,
    reset_state=None,
    recompute: bool = False,
    recorder=None,
):
    """A checked call.

    input 3-D, or 2-D packed with batch_sizes (then rows of hx, reset and results are in packed order, and batch_first
    is False); reset (T, B); packed: the weights as `ops.pack` packs them, to be used where a call allows it;
    reset_state as hx; recompute: keep little for backward; recorder: a recording.Recorder that watches the call.
    Returns (output, h_n, c_n, h_all, c_all), None for what there is not.
    """
    h0, c0 = (hx, None) if cell != "lstm" or hx is None else hx
    extended = reset is not None or lengths is not None or all_states
    starts = ()
    if reset is not None and reset_state is not None:
        starts = reset_state if cell == "lstm" else (reset_state, None)
    form = DENSE if batch_sizes is None else PACKED
    route = plan(cell, input, h0, c0, [*weights, *starts] if starts else weights, form, extended)
    if recorder is not None:
        recorder, route = watched(recorder, route, input, h0, c0, weights, *starts)
    if route.path is TORCH:
        return _run_torch(
            cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes
        )

    work = route.work
    if input.dtype != work:
        input = input.to(work)
    if route.cast:
        weights = [w.to(work) for w in weights]
        h0 = None if h0 is None else h0.to(work)
        c0 = None if c0 is None else c0.to(work)
        starts = tuple(None if t is None else t.to(work) for t in starts)
    x = input.transpose(0, 1) if batch_first else input
    if lengths is not None and route.path in (KERNEL, TRANSFORMED) and lengths.device != x.device and not x.is_meta:
        lengths = _onto(lengths, x.device)
    if reset is not None and reset.device != x.device:
        reset = reset.to(x.device)

    D = 2 if bidirectional else 1
    T = x.size(0) if batch_sizes is None else batch_sizes.size(0)
    if recompute:
        recompute = route.path is KERNEL and autograd.needed(x, h0, c0, weights, *starts)
        recompute = recompute and chunks.worthwhile(T)
    call = None
    if recorder is not None:
        call = recorder.begin(cell, T, h0, None if reset is None else cuts(reset, batch_sizes, lengths))
        # Where rows end, the chunks of a sequence are not what is watched of the whole.
        recompute = recompute and batch_sizes is None and lengths is None
    at_once = in_one_call(route, num_layers, dropout, training, all_states, recompute and bidirectional)
    if packed is not None and at_once and not all_states and frozen.usable(route, x, h0, c0, weights, *starts):
        output, h_n, c_n = ops.frozen(packed, input, h0, c0, batch_first, batch_sizes, lengths, reset, *starts)
        return output, h_n, c_n if cell == "lstm" else None, None, None
    if at_once:
        output, h_n, c_n, h_all, c_all = autograd.layers(
            cell, num_layers, x, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_first, all_states,
            precision(work, x.is_cuda), *(starts or (None, None)), recompute,
            None if call is None else call.watcher(),
        )  # fmt: skip
    else:
        per = len(weights) // num_layers
        layers = []
        for k in range(num_layers):
            last = k == num_layers - 1
            h, c, *from_reset = (None if t is None else t[k * D : (k + 1) * D] for t in (h0, c0, *starts))
            found = one_layer(
                route, cell, x, h, c, weights[k * per : (k + 1) * per], batch_sizes, lengths, reset, bidirectional,
                batch_first and last, all_states, recompute, *from_reset,
                watcher=None if call is None else call.watcher(k * D),
            )  # fmt: skip
            layers.append(found)
            x = found[0]
            if dropout and training and not last:
                # torch.nn's call on torch.nn's layout and dtype, so its masks for the same seed.
                x = torch.dropout(x if x.dtype == route.h else x.to(route.h), dropout, True).to(work)
        output = x
        h_n, c_n, h_all, c_all = (None if parts[0] is None else torch.cat(parts) for parts in list(zip(*layers))[1:])
    if batch_first:
        output = output.transpose(0, 1)
    if route.h != work:
        output, h_n = output.to(route.h), h_n.to(route.h)
        h_all = None if h_all is None else h_all.to(route.h)
    return output, h_n, c_n, h_all, c_all


def watched(recorder, route, input, h0, c0, weights, *starts):
    """The recorder that a call is to be watched by, if it is, and the call's route then."""
    if torch._C._are_functorch_transforms_active() or not autograd.needed(input, h0, c0, weights, *starts):
        return None, route
    if slow(input):
        return recorder, route._replace(path=REFERENCE)
    return (None if route.path is TORCH else recorder), route


def _onto(lengths: Tensor, device: torch.device) -> Tensor:
    """lengths on a device. Nobody waits where they come from memory that is copied before the call returns."""
    at_once = lengths.is_cpu and _values_are_known() and not lengths.is_pinned()
    return lengths.to(device, non_blocking=at_once)


def in_one_call(route, num_layers, dropout, training, all_states, apart=False) -> bool:
    """Whether all layers of a call go to the kernels at once: where nothing has to happen between them."""
    return route.path is KERNEL and (num_layers == 1 or not (all_states or (dropout and training) or apart))


def one_layer(
    route, cell, x, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, all_states,
    recompute=False, *starts, watcher=None,
):  # fmt: skip
    """The results of `ops.layer` on any route but torch's."""
    if route.path is KERNEL:
        return autograd.layers(
            cell, 1, x, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, all_states,
            precision(route.work, x.is_cuda), *(starts or (None, None)), recompute, watcher,
        )  # fmt: skip
    if route.path is TRANSFORMED:
        return transforms.layer(
            cell, x, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, batch_major, all_states, *starts
        )
    T = x.size(0) if batch_sizes is None else batch_sizes.size(0)
    watch = None if watcher is None else watcher.steps(2 if bidirectional else 1, T, x.device)
    with _autocast_off(x):
        output, *states = reference.layer(
            cell, x, h0, c0, weights, batch_sizes, lengths, reset, bidirectional, all_states,
            *(starts or (None, None)), watch=watch,
        )  # fmt: skip
    if batch_major:
        output = output.transpose(0, 1).contiguous().transpose(0, 1)
    return output, *states


def _autocast_off(x: Tensor):
    return torch.autocast(x.device.type, enabled=False)


def _run_torch(
    cell, input, h0, c0, weights, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes
):
    """torch.nn's call of torch's implementation."""
    if h0 is None:
        B = int(batch_sizes[0]) if batch_sizes is not None else input.size(0 if batch_first else 1)
        L, w_hh = num_layers * (2 if bidirectional else 1), weights[1]
        h0 = torch.zeros(L, B, w_hh.size(1), dtype=input.dtype, device=input.device)
        if cell == "lstm":
            c0 = torch.zeros(L, B, w_hh.size(0) // 4, dtype=input.dtype, device=input.device)
    hx = (h0, c0) if cell == "lstm" else h0
    common = (list(weights), bias, num_layers, dropout, training, bidirectional)
    if batch_sizes is None:
        found = _VF[cell](input, hx, *common, batch_first)
    else:
        found = _VF[cell](input, batch_sizes, hx, *common)
    return (*found, None, None) if cell == "lstm" else (*found, None, None, None)


# ----------------------------------------------------------------------------------------- arguments that torch has not


def check_lengths(lengths, T, B, unbatched: bool) -> Tensor:
    """`lengths` as (B,). TypeError for what is not an int32 or int64 tensor; ValueError for shape and (CPU) range."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a tensor of int32 or int64, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: expected dtype torch.int32 or torch.int64, got {lengths.dtype}")
    if unbatched:
        if lengths.dim() != 0:
            raise ValueError(f"lengths: expected a 0-d tensor for unbatched input, got shape {tuple(lengths.shape)}")
        lengths = lengths.unsqueeze(0)
    elif lengths.dim() != 1 or lengths.size(0) != B:
        raise ValueError(f"lengths: expected shape (B,) = ({B},), got {tuple(lengths.shape)}")
    # While a graph is captured the values are not there; the operator checks them when it runs.
    if lengths.is_cpu and lengths.numel() and type(lengths) is Tensor and _values_are_known():
        values = lengths.tolist()  # aminmax() and two comparisons of tensors cost ten times as much
        low, high = min(values), max(values)
        if low < 0 or high > T:
            raise ValueError(f"lengths: expected values from 0 to T = {T}, got values from {low} to {high}")
    return lengths


def check_reset(reset, T, B, unbatched: bool, batch_first: bool) -> Tensor:
    """`reset` as (T, B). TypeError for what is not a bool tensor, ValueError for its shape."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a tensor of torch.bool, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset: expected dtype torch.bool, got {reset.dtype}")
    expected, letters = ((T,), "(T,)") if unbatched else ((B, T), "(B, T)") if batch_first else ((T, B), "(T, B)")
    if tuple(reset.shape) != expected:
        raise ValueError(f"reset: expected shape {letters} = {expected}, got {tuple(reset.shape)}")
    return reset.unsqueeze(1) if unbatched else reset.transpose(0, 1) if batch_first else reset


def check_reset_state(cell, state, like: Tensor, layers, B, H, P, unbatched: bool):
    """`reset_state` as hx, (layers, B, width). TypeError for what is no tensor or pair of them; ValueError for shape,
    dtype and device, which are to be those of `like` (the dtype not under autocast)."""
    if cell == "lstm":
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            raise TypeError(f"reset_state: expected a pair (h, c), got {type(state).__name__}")
        parts = (("reset_state[0]", state[0], P), ("reset_state[1]", state[1], H))
    else:
        parts = (("reset_state", state, H),)
    found = []
    for name, t, width in parts:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if unbatched:
            if t.shape != (layers, width):
                raise ValueError(f"{name}: expected shape {(layers, width)}, got {tuple(t.shape)}")
            t = t.unsqueeze(1)
        elif t.shape != (layers, B, width) and t.shape != (layers, 1, width):
            raise ValueError(
                f"{name}: expected shape {(layers, B, width)}, or {(layers, 1, width)} for the same in every row, "
                f"got {tuple(t.shape)}"
            )
        if t.device != like.device:
            raise ValueError(f"{name}: expected device {like.device} as input's, got {t.device}")
        if t.dtype != like.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(f"{name}: expected dtype {like.dtype} as input's, got {t.dtype}")
        found.append(t.expand(layers, B, width))
    return tuple(found) if cell == "lstm" else found[0]


def _values_are_known() -> bool:
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def packed_batch(batch_sizes: Tensor, rows: int):
    """B of a well-formed packed batch of so many rows, else None (torch then says what is wrong, or copes)."""
    if torch.compiler.is_compiling() or type(batch_sizes) is not Tensor:
        return batch_sizes[0].item() if batch_sizes.numel() else None
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        return None
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or sum(sizes) != rows or any(a < b for a, b in zip(sizes, sizes[1:])):
        return None
    return sizes[0]


def _permute(t: Tensor | None, dim: int, order: Tensor | None) -> Tensor | None:
    return t if t is None or order is None else t.index_select(dim, order)


def run_packed(
    cell: str, sequence, hx, weights, bias, num_layers, dropout, training, bidirectional, reset, all_states,
    packed=None, reset_state=None, recompute=False, recorder=None,
):  # fmt: skip
    """`run` for a PackedSequence whose fields are valid, in the caller's row order throughout."""
    data, batch_sizes, order, back = sequence

    def sorted_rows(state):
        if state is None:
            return None
        return tuple(_permute(t, 1, order) for t in state) if cell == "lstm" else _permute(state, 1, order)

    output, h_n, c_n, h_all, c_all = run(
        cell, data, sorted_rows(hx), weights, bias, num_layers, dropout, training, bidirectional, False, batch_sizes,
        None, _permute(reset, 1, order), all_states, packed, sorted_rows(reset_state), recompute, recorder,
    )  # fmt: skip
    return (
        PackedSequence(output, batch_sizes, order, back),
        _permute(h_n, 1, back),
        _permute(c_n, 1, back),
        _permute(h_all, 2, back),
        _permute(c_all, 2, back),
    )


def results(cell: str, found, unbatched: bool, all_states: bool):
    """From `run`'s flat tuple to what a module returns."""
    output, h_n, c_n, h_all, c_all = found
    if unbatched:
        output, h_n = output.squeeze(1), h_n.squeeze(1)
        c_n = None if c_n is None else c_n.squeeze(1)
        h_all = None if h_all is None else h_all.squeeze(2)
        c_all = None if c_all is None else c_all.squeeze(2)
    if cell != "lstm":
        return (output, h_n, h_all) if all_states else (output, h_n)
    return (output, (h_n, c_n), (h_all, c_all)) if all_states else (output, (h_n, c_n))


# ----------------------------------------------------------------------------------------------------- public functions


def lstm(
    input,
    hx,
    weights,
    bias=True,
    num_layers=1,
    dropout=0.0,
    training=False,
    bidirectional=False,
    batch_first=False,
    *,
    reset=None,
    lengths=None,
    all_states=False,
    reset_state=None,
    recompute=False,
):
    """LSTM over a whole sequence: torch.nn.LSTM as a function of its weights. One graph under torch.compile.

    Letters: T steps, B rows, I features, H hidden units, P width of h (proj_size, or H), L layers, D directions.
    Equations and gate order (i, f, g, o) are those of torch.nn.LSTM's docstring.

    Args:
        input: (T, B, I), (B, T, I) if batch_first, (T, I) unbatched, or a PackedSequence. float32, float64, bfloat16
            or float16 (others as far as torch serves them).
        hx: (h0 (L*D, B, P), c0 (L*D, B, H)), without B if unbatched, or None for zeros.
        weights: flat list in the order of torch.nn.LSTM's `_flat_weights`: for each layer, for each direction, w_ih
            (4H, I or D*P), w_hh (4H, P), then b_ih and b_hh (4H) if bias, then w_hr (P, H) if there is a projection.
        bias, num_layers, dropout, training, bidirectional, batch_first: as in torch.nn.LSTM. Dropout acts between
            layers, when training, with torch.nn's masks for the same seed on the CPU.
        reset: bool (T, B), (B, T) if batch_first, (T,) unbatched; (T, B) in the caller's row order for a
            PackedSequence. reset[t], t >= 1, separates step t-1 from step t in both directions, in all layers: states
            start from zero there and no gradient crosses. reset[0] discards hx of the forward directions.
        lengths: int32 or int64 (B,), 0-d unbatched, 0 to T, any order, any device: pack_padded_sequence and back,
            without packing. Not with a PackedSequence.
        all_states: also return the states after every step, time-major: (h (L*D, T, B, P), c (L*D, T, B, H)).
        reset_state: what states start from where `reset` separates steps, instead of zero: (h (L*D, B or 1, P), c (L*D,
            B or 1, H)), without B if unbatched. Differentiable: it may be learned.
        recompute: keep for backward the states at the ends of chunks of steps and the last chunk whole, and run the
            others again there: for long sequences a small part of the memory, for about a third more time. The same
            bits, but for the gradients of weights and reset states, which are added up in another order.

    Returns:
        (output, (h_n, c_n)), or (output, (h_n, c_n), (h_all, c_all)) with all_states. output (T, B, D*P) in input's
        layout, zero past a row's length; h_n (L*D, B, P) and c_n (L*D, B, H) are memory of their own.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    return _checked(
        "lstm", input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, reset, lengths,
        all_states, reset_state, recompute,
    )  # fmt: skip


def gru(
    input,
    hx,
    weights,
    bias=True,
    num_layers=1,
    dropout=0.0,
    training=False,
    bidirectional=False,
    batch_first=False,
    *,
    reset=None,
    lengths=None,
    all_states=False,
    reset_state=None,
    recompute=False,
):
    """GRU over a whole sequence: torch.nn.GRU as a function of its weights (equations there; gate order r, z, n).

    Arguments, layouts and errors as for `lstm`, with hx and reset_state one tensor (L*D, B, H), weights w_ih (3H, ...),
    w_hh (3H, H) [, b_ih, b_hh (3H)] and no projection. Returns (output, h_n), or (output, h_n, h_all (L*D, T, B, H))
    with all_states.
    """
    return _checked(
        "gru", input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, reset, lengths,
        all_states, reset_state, recompute,
    )  # fmt: skip


def rnn(
    input,
    hx,
    weights,
    bias=True,
    num_layers=1,
    dropout=0.0,
    training=False,
    bidirectional=False,
    batch_first=False,
    *,
    nonlinearity="tanh",
    reset=None,
    lengths=None,
    all_states=False,
    reset_state=None,
    recompute=False,
):
    """Elman RNN over a whole sequence: torch.nn.RNN as a function of its weights (equation there).

    nonlinearity: "tanh" or "relu". All else as for `gru`, with weights w_ih (H, ...), w_hh (H, H) [, b_ih, b_hh (H)].
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
    return _checked(
        f"rnn_{nonlinearity}", input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first,
        reset, lengths, all_states, reset_state, recompute,
    )  # fmt: skip


def _checked(
    cell,
    input,
    hx,
    weights,
    bias,
    num_layers,
    dropout,
    training,
    bidirectional,
    batch_first,
    reset,
    lengths,
    all_states,
    reset_state,
    recompute,
):
    for name, value in (("all_states", all_states), ("recompute", recompute)):
        if value is not True and value is not False:
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    packed = isinstance(input, PackedSequence)
    data = input[0] if packed else input
    if not isinstance(data, Tensor):
        raise TypeError(f"input: expected a tensor or a PackedSequence, got {type(data).__name__}")
    if packed and data.dim() != 2:
        raise ValueError(f"input: expected packed data of shape (N, I), got {tuple(data.shape)}")
    if not packed and data.dim() not in (2, 3):
        raise ValueError(f"input: expected 2 or 3 dimensions, got shape {tuple(data.shape)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
    D = 2 if bidirectional else 1
    weights = list(weights)
    H, P = _check_weights(cell, data, weights, bias, num_layers, D)

    unbatched = not packed and data.dim() == 2
    if unbatched:
        data, batch_first = data.unsqueeze(1), False
    if packed:
        if lengths is not None:
            raise ValueError("lengths: expected None with a PackedSequence, which carries its own, got a value")
        T, B = input.batch_sizes.size(0), packed_batch(input.batch_sizes, data.size(0))
        if B is None:
            raise ValueError(
                "input: expected batch_sizes that are positive int64, never grow and add up to the "
                f"{data.size(0)} rows of data, got {input.batch_sizes}"
            )
        batch_first = False
    else:
        T, B = (data.size(1), data.size(0)) if batch_first else (data.size(0), data.size(1))
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    hx = _check_hx(cell, hx, num_layers * D, B, H, P, unbatched)
    if lengths is not None:
        lengths = check_lengths(lengths, T, B, unbatched)
    if reset is not None:
        reset = check_reset(reset, T, B, unbatched, batch_first)
    if reset_state is not None:
        reset_state = check_reset_state(cell, reset_state, data, num_layers * D, B, H, P, unbatched)
    if packed:
        found = run_packed(
            cell, input, hx, weights, bias, num_layers, dropout, training, bidirectional, reset, all_states, None,
            reset_state, recompute,
        )  # fmt: skip
    else:
        found = run(
            cell, data, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first, None, lengths,
            reset, all_states, None, reset_state, recompute,
        )  # fmt: skip
    return results(cell, found, unbatched, all_states)


def _check_weights(cell, data, weights, bias, num_layers, D) -> tuple:
    G = ops.CELLS[cell]["gates"]
    per = 4 if bias else 2
    count = num_layers * D
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    # Compared one by one: under torch.compile(dynamic=True) num_layers may be symbolic, and `in` is not traced then.
    if len(weights) != per * count and not (cell == "lstm" and len(weights) == (per + 1) * count):
        expected = f"{per * count} or {(per + 1) * count}" if cell == "lstm" else f"{per * count}"
        raise ValueError(
            f"weights: expected {expected} tensors for {num_layers} layer(s), {D} direction(s), bias={bias}, "
            f"got {len(weights)}"
        )
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"weights[{i}]: expected a tensor, got {type(w).__name__}")
    per = len(weights) // count
    if weights[1].dim() != 2 or weights[1].size(0) % G:
        raise ValueError(f"weights[1]: expected w_hh of shape ({G}*H, P), got {tuple(weights[1].shape)}")
    GH, P = weights[1].shape
    H = GH // G
    if per % 2 == 0 and P != H:
        raise ValueError(f"weights[1]: expected w_hh of shape ({G}*H, H) = ({GH}, {H}), got ({GH}, {P})")
    names = ("w_ih", "w_hh", "b_ih", "b_hh") if bias else ("w_ih", "w_hh")
    names = (*names, "w_hr") if per % 2 else names
    for i, w in enumerate(weights):
        name = names[i % per]
        into = data.size(-1) if i < D * per else D * P
        expected = {"w_ih": (GH, into), "w_hh": (GH, P), "w_hr": (P, H)}.get(name, (GH,))
        if tuple(w.shape) != expected:
            raise ValueError(f"weights[{i}]: expected {name} of shape {expected}, got {tuple(w.shape)}")
        if w.dtype != weights[0].dtype or (w.dtype != data.dtype and not torch._C._is_any_autocast_enabled()):
            raise ValueError(f"weights[{i}]: expected dtype {data.dtype} as input's, got {w.dtype}")
        if w.device != data.device:
            raise ValueError(f"weights[{i}]: expected device {data.device} as input's, got {w.device}")
    return H, P


def _check_hx(cell, hx, layers, B, H, P, unbatched):
    if hx is None:
        return None
    if cell == "lstm":
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(f"hx: expected a pair (h0, c0) or None, got {type(hx).__name__}")
        states, names, widths = tuple(hx), ("hx[0]", "hx[1]"), (P, H)
    else:
        states, names, widths = (hx,), ("hx",), (H,)
    checked = []
    for t, name, width in zip(states, names, widths):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        expected = (layers, width) if unbatched else (layers, B, width)
        if tuple(t.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(t.shape)}")
        checked.append(t.unsqueeze(1) if unbatched else t)
    return tuple(checked) if cell == "lstm" else checked[0]
