"""fastrnn: torch.nn's RNN, LSTM, GRU and their cells on fused kernels, the whole sequence in one operator.

fastrnn.RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell   torch.nn's classes, drop-in
fastrnn.functional.rnn, lstm, gru                    the same as functions of their weights
fastrnn.accelerate, restore, patch                   existing models and other people's code
fastrnn.init                                         initialisations that know the gates
fastrnn.jacobian_spectrum                            how long states and gradients last: Lyapunov exponents
fastrnn.explain, build_info                          what runs, how, and why
fastrnn.probe                                        what gradients, states and gates do over time, in training
fastrnn.workspace_bytes, release_workspace           memory kept between calls
"""

from importlib import metadata as _metadata

from fastrnn import functional, init
from fastrnn.cells import GRUCell, LSTMCell, RNNCell
from fastrnn.convert import accelerate, patch, restore
from fastrnn.explain import Plan, build_info, explain
from fastrnn.modules import GRU, LSTM, RNN
from fastrnn.probe import Probe, probe
from fastrnn.spectrum import Spectrum, jacobian_spectrum
from fastrnn.workspace import release_workspace, workspace_bytes

__all__ = [
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "Plan",
    "Probe",
    "RNN",
    "RNNCell",
    "Spectrum",
    "accelerate",
    "build_info",
    "explain",
    "functional",
    "init",
    "jacobian_spectrum",
    "patch",
    "probe",
    "release_workspace",
    "restore",
    "workspace_bytes",
]

try:
    __version__ = _metadata.version("fastrnn")
except _metadata.PackageNotFoundError:  # run from a source tree that was built in place
    __version__ = build_info()["version"]
