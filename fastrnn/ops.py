"""torch.ops.fastrnn.*: loads the native library, and describes the operators' arguments and results.

The operators themselves are csrc/ops.cpp; what torch must know of them beside their kernels is fakes.py's.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor


def _load() -> None:
    library = Path(__file__).with_name("_ops.so")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        raise ImportError(f"fastrnn: expected torch 2.11 or newer, got torch {torch.__version__}")
    if not library.exists():
        raise ImportError(
            f"fastrnn: its native library {library.name} was not built: expected it beside {__file__}. "
            "Install the package with `pip install .`, or build in place with `python setup.py build_ext --inplace`"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(f"fastrnn: torch {torch.__version__} could not load {library.name}: {error}") from error


_load()
from fastrnn import _C  # noqa: E402  (links against the library loaded above)

_rejected = _C.build_info()["rejected_environment"]
if _rejected is not None:
    warnings.warn(
        f"FASTRNN_ISA: expected one of {', '.join(_C.isas())} on this machine, got {_rejected!r}; using {_C.isa()}",
        stacklevel=2,
    )

if _C.build_info()["rejected_gpu_path"] is not None:
    warnings.warn(
        f"FASTRNN_GPU_PATH: expected one of {', '.join(_C.gpu_paths())}, got "
        f"{_C.build_info()['rejected_gpu_path']!r}; using the default",
        stacklevel=2,
    )

EXACT, TF32, BF16 = 0, 1, 2  # csrc/problem.h: Precision

# One entry for each cell, from csrc/cells.h: name, gates, slots, x_first, hidden_gate, tape, has_c.
CELLS: dict[str, dict] = {cell["name"]: cell for cell in _C.cells()}


def watched_columns(cell: str) -> dict[str, int]:
    """Where is what of a step of back-propagation that is watched: csrc/problem.h, watched. A gate's name is the first
    of three columns: the sum of its values, how many are low, how many are high."""
    entry = CELLS[cell]
    names = ["rows", "dh", "dh_arrived", "h", *(["dc", "dc_arrived", "c"] if entry["has_c"] else [])]
    columns = {name: i for i, name in enumerate(names)}
    return columns | {f"gate {name}": len(names) + 3 * g for g, name in enumerate(entry["watched"])}


def watched_width(cell: str) -> int:
    return max(watched_columns(cell).values()) + 3


def _operator(overload):
    """Makes the name of a function that only documents an operator the operator itself: no frame, no argument list."""

    def replace(_documented):
        return overload

    return replace


@_operator(torch.ops.fastrnn.layer.default)
def layer(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    bidirectional: bool,
    batch_major: bool,
    all_states: bool,
    save: bool,
    precision: int = 0,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, all its directions, the whole sequence. Not differentiable by itself (autograd.py is).

    On the CPU, or on a CUDA device if the build has kernels for it: all tensors on the one that `input` is on, but
    batch_sizes.

    T steps, B rows, I features, H hidden units, P width of h, D directions, N stored rows.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        input: (T, B, I) of any strides; or packed (N, I) with `batch_sizes`. float32, float64, bfloat16 or float16.
        h0, c0: (D, B, P) and (D, B, H, LSTM only); None is zero. Of input's dtype; or h0, and with it all other states
            that come in or go out, float32 for a 16-bit input.
        weights: for each direction w_ih (G*H, I), w_hh (G*H, P), [b_ih, b_hh (G*H)], [w_hr (P, H)].
        batch_sizes: CPU int64 (T,), never growing.  lengths: int64 or int32 (B,), 0 to T; clamped to that
            on a CUDA device, where nobody reads them.
        reset: bool (T, B); for packed input the rows in packed order.
        batch_major: lay `output` out as a contiguous (B, T, D*P), seen as (T, B, D*P).
        save: write the tape that `layer_backward` needs.
        precision: of float32 products, where the instruction set in use, or the GPU, is the faster for less: 0 exact,
            1 tf32, 2 bf16. Sums, gates and states are float32.
        h_reset, c_reset: like h0 and c0: what states start from where `reset` has cut them; None is zero.

    Returns:
        output (T, B, D*P) or (N, D*P), h_n (D, B, P), c_n (D, B, H), h_all (D, T, B, P), c_all (D, T, B, H), tape.
        What was not asked for, and c of a cell without one, has shape (0,).

    Raises:
        RuntimeError: naming the argument, what was expected, what came.
    """


@_operator(torch.ops.fastrnn.stack.default)
def stack(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    bidirectional: bool,
    batch_major: bool,
    num_layers: int,
    saved_from: int,
    precision: int = 0,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Layers on top of each other, in one call. Small layers run as a wavefront over time, on a thread each.

    Arguments as for `layer`, with h0 (L*D, B, P), c0 (L*D, B, H), h_reset and c_reset the same, and the weights of all
    layers. saved_from: the first layer that `stack_backward` is to give gradients of; num_layers for none.

    Returns:
        output (T, B, D*P) or (N, D*P), h_n (L*D, B, P), c_n (L*D, B, H; shape (0,) for a cell without one), and what
        `stack_backward` needs beside the arguments: the tapes and the inputs of the layers from saved_from on, but not
        `input` itself.

    Raises:
        RuntimeError: naming the argument, what was expected, what came.
    """


@_operator(torch.ops.fastrnn.pack.default)
def pack(cell: str, weights: list[Tensor], bidirectional: bool, num_layers: int, precision: int = 0) -> Tensor:
    """The weights of all layers as the kernels of the instruction set in use read them for products of this precision,
    for `frozen`.

    Arguments as for `stack`.

    Returns:
        uint8 (bytes,), 64-byte aligned. Its layout, and so its size, is the kernels' own affair: not for tracing.

    Raises:
        RuntimeError: naming the argument, what was expected, what came.
    """


# The overload's own call does no more than this one, whose frame is 4 % of a step of a small frozen layer.
_frozen = getattr(torch.ops.fastrnn.frozen.default, "_op", torch.ops.fastrnn.frozen.default)


def frozen(
    packed: Tensor,
    input: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`stack` with weights that `pack` has packed, of any number of layers; or, with input (B, I), `step`.

    The other arguments and the results as there, except for input and output (B, T, features) with batch_first; one
    step returns h (B, P), an empty h_n, c (B, H). Not for tracing: the sizes of the results are in the packed bytes
    alone.

    Raises:
        RuntimeError: naming the argument, what was expected, what came; also when the instruction set in use is not
        the one that the weights were packed for.
    """
    # What is left out costs nothing, each None 0.1 us.
    if batch_sizes is None and lengths is None and reset is None:
        if h0 is None and c0 is None and not batch_first:
            return _frozen(packed, input)
        return _frozen(packed, input, h0, c0, batch_first)
    return _frozen(packed, input, h0, c0, batch_first, batch_sizes, lengths, reset, h_reset, c_reset)


@_operator(torch.ops.fastrnn.step.default)
def step(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    save: bool,
    precision: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of one layer and direction, for cells: `layer` without a sequence.

    Args:
        cell: "rnn_tanh", "rnn_relu", "lstm" or "gru".
        input: (B, I). float32, float64, bfloat16 or float16.
        h0, c0: (B, P) and (B, H, LSTM only); None is zero.
        weights: w_ih (G*H, I), w_hh (G*H, P), [b_ih, b_hh (G*H)], [w_hr (P, H)].
        save: write the tape that `layer_backward` needs, as of a layer with T = 1.
        precision: as for `layer`.

    Returns:
        h (B, P), c (B, H), tape. What was not asked for, and c of a cell without one, has shape (0,).

    Raises:
        RuntimeError: naming the argument, what was expected, what came.
    """


@_operator(torch.ops.fastrnn.step_.default)
def step_onto(
    h: Tensor,
    c: Tensor | None,
    cell: str,
    input: Tensor,
    weights: list[Tensor],
    packed: Tensor | None,
    num_layers: int,
    reset: Tensor | None,
    h_reset: Tensor | None,
    c_reset: Tensor | None,
    precision: int = 0,
) -> None:
    """One step of layers of one direction on top of each other, onto h and c themselves.

    Args:
        h, c: (L, B, P) and (L, B, H, LSTM only), or of one layer without L: contiguous, of input's dtype.
        cell, input, precision: as for `step`.
        weights: of all layers; or none, and `packed`: what `pack` made of them.
        reset: bool (B,): rows whose state is what h_reset and c_reset (as h and c; None is zero) say, not h and c.

    Raises:
        RuntimeError: naming the argument, what was expected, what came.
    """


@_operator(torch.ops.fastrnn.layer_backward.default)
def layer_backward(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    tape: Tensor,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_h_all: Tensor | None,
    d_c_all: Tensor | None,
    bidirectional: bool,
    batch_major: bool,
    needs: list[bool],
    precision: int = 0,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    watch: int = 0,
) -> list[Tensor]:
    """Back-propagation through time of `layer`; with a 2-D input and no batch_sizes, of `step`, whose shapes it takes.

    `needs` says which gradients are wanted, in the order input, h0, c0, *weights and, where there are reset states,
    h_reset, c_reset; the result has the same order, with a tensor of shape (0,) for what was not wanted. Where states
    are float32 and input is not, all gradients but that of the output are too. Incoming gradients may be None (zero)
    and of any strides. `batch_major` gives the gradient of the input the layout that it gives `layer`'s output.

    watch (on the CPU): 1, or 2 when d_h_n and d_c_n came back from steps that follow. The result then ends with a
    float64 tensor (D, T, watched_width(cell)): for every step, summed over its rows and units, what `watched_columns`
    names; squares, but for the count of rows and the gates.
    """


@_operator(torch.ops.fastrnn.layer_operands.default)
def layer_operands(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    tape: Tensor,
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    d_h_all: Tensor | None,
    d_c_all: Tensor | None,
    bidirectional: bool,
    batch_major: bool,
    needs: list[bool],
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
) -> list[Tensor]:
    """`layer_backward` without the products of the weights' gradients: what they are products of, for every row.

    needs: of input, h0, c0 and, if wanted, h_reset and c_reset. float32 products are exact.

    Returns:
        The gradients of those, of shape (0,) where not needed; dgates (D, T, B, S*H), the gradients of the
        pre-activations by slots (CELLS says which gate is where); h_prev (D, T, B, P), the state that entered each
        step; and with a projection dh_out (D, T, B, P), the gradient of its result, and h_raw (D, T, B, H), what it
        projects. For packed input N rows in place of T, B. float64 for float64, else float32; zero past a length. So
        the gradient of w_hh is the sum over rows of outer products of dgates and h_prev, and so on.

    Raises:
        RuntimeError: naming the argument, what was expected, what came.
    """


def roles(count: int) -> list[str]:
    """What the `count` weights of one direction are, in order."""
    return ["w_ih", "w_hh", *(["b_ih", "b_hh"] if count > 3 else ()), *(["w_hr"] if count % 2 else ())]


def in_order(t: Tensor, dim: int, order: list[int]) -> Tensor:
    """The slices of `t` at `dim` in an order. Not t[order]: a GPU would wait for the list."""
    if order == sorted(order):
        return t.narrow(dim, 0, len(order))
    return torch.cat([t.narrow(dim, place, 1) for place in order], dim)


def by_gate(cell: str, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Slots (a, b, S, H) as torch's gates (a, b, G*H): those that the input feeds, and those that the state feeds."""
    first, G, hidden_gate = (CELLS[cell][k] for k in ("x_first", "gates", "hidden_gate"))
    order = [hidden_gate.index(gate) for gate in range(G)]
    return slots[:, :, first : first + G].flatten(2), in_order(slots, 2, order).flatten(2)


@_operator(torch.ops.fastrnn.stack_backward.default)
def stack_backward(
    cell: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    saved: list[Tensor],
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    bidirectional: bool,
    batch_major: bool,
    num_layers: int,
    needs: list[bool],
    precision: int = 0,
    h_reset: Tensor | None = None,
    c_reset: Tensor | None = None,
    watch: int = 0,
) -> list[Tensor]:
    """Back-propagation through time for the same arguments as `stack` and what it saved. All else as for
    `layer_backward`; what is watched has L*D for D, and is zero for layers of which no gradient is wanted."""
