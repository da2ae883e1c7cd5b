"""Initialisations for recurrent modules, gate by gate and in place: `fastrnn.init.orthogonal(model)`.

    xavier        w_ih of everything        Glorot and Bengio 2010
    he            w_ih of ReLU RNNs         He et al. 2015
    orthogonal    w_hh of everything        Saxe et al. 2014
    identity      ReLU and tanh RNNs        Le et al. 2015
    forget_bias   LSTM                      Gers et al. 2000, Jozefowicz et al. 2015
    chrono        LSTM and GRU              Tallec and Ollivier 2018

Each takes a module, changes it in place and returns it, so they nest: `forget_bias(orthogonal(xavier(lstm)))`. The
module is an RNN, LSTM, GRU or cell, fastrnn's or torch.nn's, or any nn.Module that holds some. In a holder everything
that the function is for is initialised and the rest left alone; when it holds nothing of that kind, that is an error,
as it is to give such a module itself. All layers and both directions are initialised. What a function does not say that
it sets keeps its values.

torch.nn stores the gates of a weight stacked, w_ih (G*H, I), w_hh (G*H, P), G = 4 for LSTM (i, f, g, o), 3 for GRU
(r, z, n), 1 for RNN; torch.nn.init.xavier_uniform_ on that takes the fan-out for G*H, and orthogonal_ makes only the
stack orthogonal. Here each gate's block of H rows is a matrix by itself.

Random numbers are drawn in float64, from `generator` or, without one, torch's default for the CPU, then rounded: the
same seed gives the same weights in every dtype and on every device. Parametrized weights are set through
`right_inverse`, and it is an error if the module then does not have the values it was to have. A frozen module
(`freeze()`) is frozen no more. A tied parameter is set once. Tensors on the meta device are passed by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from fastrnn.frozen import thaw

__all__ = ["chrono", "forget_bias", "he", "identity", "orthogonal", "xavier"]

_RNN, _LSTM, _GRU = (nn.RNN, nn.RNNCell), (nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell)
_ALL = (*_RNN, *_LSTM, *_GRU)


def xavier(
    module: nn.Module, gain: float = 1.0, *, distribution: str = "uniform", generator: Generator | None = None
) -> nn.Module:
    """Glorot's: each gate's block of w_ih, (H, I), has the variance gain^2 * 2 / (I + H).

    "uniform" draws from U(-a, a), a = gain * sqrt(6 / (I + H)), "normal" from N(0, gain^2 * 2 / (I + H)). In layers
    above the first, I is the width of what the layer below puts out. Sets every w_ih; w_hh (see `orthogonal`), w_hr and
    biases are left.

    Args:
        module: RNN, LSTM, GRU, their cells, or what holds some.
        gain: 1 is the paper's, also for its tanh networks; torch.nn.init.calculate_gain("tanh") is 5/3.
        distribution: "uniform" or "normal".
        generator: where random numbers come from.

    Raises:
        TypeError: nothing there to initialise. ValueError: gain or distribution; a weight that cannot be set.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS
    2010, equation 16.
    """
    _check_number("gain", gain)
    draw = _draw(distribution, generator)
    chosen = _choose(module, "an RNN, LSTM, GRU or cell", lambda m: True)

    def input_block(rows: int, columns: int) -> Tensor:
        return draw((rows, columns), gain * math.sqrt(2 / (rows + columns)))

    return _fill(module, chosen, {"weight_ih": _by_gate(input_block)})


def he(module: nn.Module, *, distribution: str = "normal", generator: Generator | None = None) -> nn.Module:
    """He's, for RNNs with relu: w_ih (H, I) has the variance 2 / I.

    "normal" draws from N(0, 2 / I), the paper's; "uniform" from U(-a, a), a = sqrt(6 / I). The 2 makes up for the half
    that relu sets to zero, so modules with tanh and gates are refused (`xavier` is for those). Sets every w_ih; w_hh
    (see `identity`, `orthogonal`) and biases are left.

    Args:
        module: RNN or RNNCell with nonlinearity "relu", or what holds some.
        distribution: "normal" or "uniform".
        generator: where random numbers come from.

    Raises:
        TypeError: nothing there to initialise. ValueError: distribution; a weight that cannot be set.

    Source: He, Zhang, Ren and Sun, "Delving deep into rectifiers", ICCV 2015, equation 10.
    """
    draw = _draw(distribution, generator)
    chosen = _choose(
        module, 'an RNN or RNNCell with nonlinearity "relu"', lambda m: isinstance(m, _RNN) and m.nonlinearity == "relu"
    )

    def input_block(rows: int, columns: int) -> Tensor:
        return draw((rows, columns), math.sqrt(2 / max(1, columns)))

    return _fill(module, chosen, {"weight_ih": _by_gate(input_block)})


def orthogonal(module: nn.Module, gain: float = 1.0, *, generator: Generator | None = None) -> nn.Module:
    """Each gate's block of w_hh, (H, H), is `gain` times a random orthogonal matrix: all its singular values are gain.

    Drawn uniformly over the orthogonal matrices (QR of a normal matrix, signs by the diagonal of R). With proj_size P
    the blocks are (H, P) with orthonormal columns times gain, and w_hr (P, H), which every path from state to state
    takes too, gets orthonormal rows: P of the H singular values of block @ w_hr are then gain, the others zero. Sets
    every w_hh and w_hr; w_ih and biases are left.

    Args:
        module: RNN, LSTM, GRU, their cells, or what holds some.
        gain: factor of w_hh.
        generator: where random numbers come from.

    Raises:
        TypeError: nothing there to initialise. ValueError: gain; a weight that cannot be set.

    Source: Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", ICLR 2014; for recurrent weights Henaff, Szlam and LeCun, "Recurrent orthogonal networks and long-memory
    tasks", ICML 2016.
    """
    _check_number("gain", gain)
    draw = _draw("normal", generator)
    chosen = _choose(module, "an RNN, LSTM, GRU or cell", lambda m: True)

    def orthonormal(rows: int, columns: int) -> Tensor:
        tall = draw((max(rows, columns), min(rows, columns)), 1.0)
        q, r = torch.linalg.qr(tall)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return q if rows >= columns else q.t()

    makers = {
        "weight_hh": _by_gate(lambda *shape: gain * orthonormal(*shape)),
        "weight_hr": lambda old, m: orthonormal(*old.shape),
    }
    return _fill(module, chosen, makers)


def identity(
    module: nn.Module, scale: float = 1.0, *, input_std: float | None = 1e-3, generator: Generator | None = None
) -> nn.Module:
    """The IRNN: w_hh = scale * identity, biases zero, w_ih from N(0, input_std^2).

    A ReLU RNN then keeps its state and adds its input, as long as nothing turns negative. Also for tanh, whose state
    fades slowly. Sets every parameter of the RNN; with input_std=None, w_ih is left.

    Args:
        module: RNN or RNNCell, or what holds some.
        scale: 1 in the paper; smaller, down to 0.01, where it wanted a short memory.
        input_std: 0.001 in the paper. In layers above the first that makes what comes from below weak, too: None
            leaves w_ih as it is, or as `xavier` or `he` made it.
        generator: where random numbers come from.

    Raises:
        TypeError: nothing there to initialise. ValueError: scale or input_std; a weight that cannot be set.

    Source: Le, Jaitly and Hinton, "A simple way to initialize recurrent networks of rectified linear units",
    arXiv:1504.00941, 2015.
    """
    _check_number("scale", scale)
    draw = _draw("normal", generator)
    chosen = _choose(module, "an RNN or RNNCell", lambda m: isinstance(m, _RNN))
    makers: dict[str, Maker] = {"weight_hh": lambda old, m: torch.zeros_like(old).fill_diagonal_(scale)}
    makers |= dict.fromkeys(("bias_ih", "bias_hh"), lambda old, m: torch.zeros_like(old))
    if input_std is not None:
        _check_number("input_std", input_std, least=0)
        makers["weight_ih"] = lambda old, m: draw(old.shape, input_std)
    return _fill(module, chosen, makers)


def forget_bias(module: nn.Module, value: float = 1.0) -> nn.Module:
    """The biases of every LSTM's forget gate add up to `value`: b_ih of it is `value`, b_hh of it zero.

    The gate is sigmoid(w x + w h + b_ih + b_hh), so at the start about sigmoid(value) of the cell state is kept at each
    step: 0.73 for 1, 0.5 for torch.nn's own biases. (Both set to 1 would add up to 2.) Sets the second quarter of
    every b_ih and b_hh (where the two are one tied parameter, to half of `value`); everything else is left.

    Args:
        module: LSTM or LSTMCell with biases, or what holds some.
        value: what the biases add up to.

    Raises:
        TypeError: nothing there to initialise. ValueError: value; bias=False; a bias that cannot be set.

    Source: Gers, Schmidhuber and Cummins, "Learning to forget: continual prediction with LSTM", Neural Computation 12,
    2000; Jozefowicz, Zaremba and Sutskever, "An empirical exploration of recurrent network architectures", ICML 2015,
    who recommend 1.
    """
    _check_number("value", value)
    chosen = _choose(module, "an LSTM or LSTMCell", lambda m: isinstance(m, _LSTM))
    return _fill_biases(module, chosen, lambda m: {1: value})


def chrono(module: nn.Module, T_max: float, *, generator: Generator | None = None) -> nn.Module:
    """Biases by which units keep their state for 1 to T_max steps, drawn for each unit of every LSTM and GRU.

    With u from U(1, T_max - 1), one for each unit: LSTM has the forget bias log u and the input bias -log u, so that
    the gates are about u / (1 + u) and 1 / (1 + u) and the unit forgets over about 1 + u steps. GRU has the bias log u
    of z, which in torch is the share that is kept (h' = (1 - z) n + z h; the paper's has the opposite sign). Biases are
    sums of b_ih and b_hh: b_ih has the value, b_hh zero (one tied parameter: half). Sets these gates' part of every
    b_ih and b_hh; weights and the other gates' biases are left.

    Args:
        module: LSTM, GRU or their cells with biases, or what holds some.
        T_max: the longest dependency that is expected, in steps, at least 2.
        generator: where random numbers come from.

    Raises:
        TypeError: nothing there to initialise. ValueError: T_max; bias=False; a bias that cannot be set.

    Source: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018, section 3, equation 16.
    """
    _check_number("T_max", T_max, least=2)
    draw = _draw("uniform", generator)
    chosen = _choose(module, "an LSTM, GRU or cell of these", lambda m: isinstance(m, (*_LSTM, *_GRU)))

    def biases(m: nn.Module) -> dict[int, float | Tensor]:
        half = (T_max - 2) / 2  # U(1, T_max - 1) is 1 + half + U(-half, half), of standard deviation half / sqrt(3)
        keep = (1 + half + draw((m.hidden_size,), half / math.sqrt(3))).log()
        return {1: keep, 0: -keep} if isinstance(m, _LSTM) else {1: keep}

    return _fill_biases(module, chosen, biases)


# ------------------------------------------------------------------------------------------------------- what is chosen


def _choose(module, expected: str, fits: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules in `module`, itself included, that are to be initialised."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    recurrent = [m for m in module.modules() if isinstance(m, _ALL)]
    chosen = [m for m in recurrent if fits(m)]
    if isinstance(module, _ALL):
        if module not in chosen:
            raise TypeError(f"module: expected {expected}, or a module that holds some, got {_describe(module)}")
    elif not chosen:
        kinds = ", ".join(sorted({_describe(m) for m in recurrent})) or "no recurrent module"
        raise TypeError(f"module: expected {expected}, or a module that holds some, got one that holds {kinds}")
    return chosen


def _describe(module: nn.Module) -> str:
    name = type(module).__name__
    return f'{name} with nonlinearity "{module.nonlinearity}"' if isinstance(module, _RNN) else name


def _names(module: nn.Module, role: str) -> list[str]:
    """The names of a module's parameters of one role: "weight_ih", "weight_hh", "weight_hr", "bias_ih" or "bias_hh"."""
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith(role)]
    return [] if role == "weight_hr" or (role.startswith("bias") and not module.bias) else [role]


def _check_number(name: str, value, least: float = -math.inf) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= least):
        expected = "a finite number" if least == -math.inf else f"a finite number of at least {least}"
        raise ValueError(f"{name}: expected {expected}, got {value}")


# ----------------------------------------------------------------------------------------------------------- the values

# From a parameter's value, in float64 on the CPU, and its module to the value it is to have.
Maker = Callable[[Tensor, nn.Module], Tensor]


def _draw(distribution: str, generator: Generator | None) -> Callable[..., Tensor]:
    """draw(shape, std): random numbers of mean zero, in float64, on the CPU."""
    if distribution not in ("uniform", "normal"):
        raise ValueError(f'distribution: expected "uniform" or "normal", got {distribution!r}')
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    device = "cpu" if generator is None else generator.device

    def draw(shape, std: float) -> Tensor:
        fresh = torch.empty(shape, dtype=torch.float64, device=device)
        if distribution == "normal":
            return fresh.normal_(0, std, generator=generator).cpu()
        return fresh.uniform_(-1, 1, generator=generator).mul_(std * math.sqrt(3)).cpu()

    return draw


def _by_gate(block: Callable[[int, int], Tensor]) -> Maker:
    def stacked(old: Tensor, module: nn.Module) -> Tensor:
        H = module.hidden_size
        return torch.cat([block(H, old.size(1)) for _ in range(old.size(0) // H)])

    return stacked


def _fill(module: nn.Module, chosen: list[nn.Module], makers: dict[str, Maker]) -> nn.Module:
    """makers by role."""
    jobs = [(m, name, maker) for m in chosen for role, maker in makers.items() for name in _names(m, role)]
    return _carry_out(module, jobs)


def _fill_biases(module: nn.Module, chosen: list[nn.Module], biases: Callable[[nn.Module], dict]) -> nn.Module:
    """biases(module) -> what b_ih + b_hh of a layer are to be, by the number of the gate."""
    jobs = []
    for m in chosen:
        if not m.bias:
            raise ValueError(f"module: expected biases to set, got a {type(m).__name__} with bias=False")
        for b_ih, b_hh in zip(_names(m, "bias_ih"), _names(m, "bias_hh")):
            share = 0.5 if m._parameters.get(b_ih, b_ih) is m._parameters.get(b_hh, b_hh) else 1.0
            values = {gate: torch.as_tensor(v, device="cpu") for gate, v in biases(m).items()}
            jobs.append((m, b_ih, _placed({gate: share * v for gate, v in values.items()})))
            jobs.append((m, b_hh, _placed({gate: torch.zeros_like(v) for gate, v in values.items()})))
    return _carry_out(module, jobs)


def _placed(values: dict[int, Tensor]) -> Maker:
    def placed(old: Tensor, module: nn.Module) -> Tensor:
        new, H = old.clone(), module.hidden_size
        for gate, value in values.items():
            new[gate * H : (gate + 1) * H] = value
        return new

    return placed


# ------------------------------------------------------------------------------------------------------ setting weights


@torch.no_grad()
def _carry_out(module: nn.Module, jobs: list[tuple[nn.Module, str, Maker]]) -> nn.Module:
    """Each parameter once, however many names it has; nothing is touched when one is found that cannot be set."""
    for m, name, _ in jobs:
        if not parametrize.is_parametrized(m, name) and not isinstance(m._parameters.get(name), Tensor):
            raise ValueError(
                f"{name}: expected a parameter, plain or parametrized, got one that is computed before each forward "
                "(pruning, or the older weight_norm or spectral_norm) or assigned"
            )
    done = set()
    for m, name, maker in jobs:
        parametrized = parametrize.is_parametrized(m, name)
        source = m.parametrizations[name] if parametrized else m._parameters[name]
        if source in done:
            continue
        done.add(source)
        thaw(m)
        old = getattr(m, name)
        if old.is_meta:
            continue
        new = maker(old.to("cpu", torch.float64), m).to(old.device, old.dtype)
        if parametrized:
            _set_parametrized(m, name, new)
        else:
            old.copy_(new)
    return module


def _set_parametrized(module: nn.Module, name: str, value: Tensor) -> None:
    """Through right_inverse; back to what it was if that does not give the value."""
    parametrization = module.parametrizations[name]
    # Not by setattr of the module: torch.nn's RNNs would put `value` into their list of flat weights.
    before = {key: t.clone() for key, t in _tensors(parametrization)}
    trouble = None
    try:
        parametrization.right_inverse(value.clone())
        close = (getattr(module, name) - value).norm() <= torch.finfo(value.dtype).eps ** 0.5 * value.norm()
        trouble = None if close else "that cannot have the values this initialisation gives"
    except (RuntimeError, ValueError) as error:
        trouble = f"that refuses the values: {error}"
    if trouble is not None:
        for key, t in _tensors(parametrization):
            t.copy_(before[key])
        kinds = ", ".join(type(part).__name__ for part in parametrization)
        raise ValueError(
            f"{name}: expected a parameter that can be set, got one with a parametrization ({kinds}) {trouble}"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
