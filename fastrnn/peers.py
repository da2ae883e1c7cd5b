"""The other contenders of `python -m fastrnn bench`, for inference: ONNX Runtime and OpenVINO, where installed.

Both get one ONNX graph, written directly from torch.nn's weights: a node LSTM, GRU or RNN for each layer, float32. The
node's definition: https://onnx.ai/onnx/operators/onnx__LSTM.html (GRU, RNN). Both keep the settings they come with,
except for the number of threads, OpenVINO's hint for latency, and the precision.
"""

from __future__ import annotations

import abc
import importlib.util

import torch

# Where torch.nn's gates (LSTM i f g o, GRU r z n) stand in ONNX's order (LSTM i o f c, GRU z r h).
ORDER = {"RNN": [0], "LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}


def _reordered(weight: torch.Tensor, family: str) -> torch.Tensor:
    gates = weight.detach().float().chunk(len(ORDER[family]))
    return torch.cat([gates[i] for i in ORDER[family]])


def onnx_model(module: torch.nn.Module, family: str, T: int, B: int, states: int) -> bytes:
    """The module, of `family` RNN, LSTM or GRU, on T steps of B rows.

    Inputs: X (T, B, I) and, if `states` is 1 or 2, H0 and C0 (L*D, B, H). The first output, Y (T, B, D*H), is what
    torch.nn calls output; with states, those after the last step are outputs too.
    """
    from onnx import TensorProto, helper, numpy_helper

    I, H = module.input_size, module.hidden_size
    L, D = getattr(module, "num_layers", 1), 2 if getattr(module, "bidirectional", False) else 1
    nodes, constants = [], []

    def constant(name, tensor):
        constants.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
        return name

    def parameter(name, layer, d):
        suffix = "" if not hasattr(module, "num_layers") else f"_l{layer}{'_reverse' * d}"
        return getattr(module, name + suffix)

    def stacked(name, layer, *parts):
        """(D, ...): for each direction the named parameters, in ONNX's order, one after the other."""
        both = [torch.cat([_reordered(parameter(p, layer, d), family) for p in parts]) for d in range(D)]
        return constant(name, torch.stack(both))

    x = "X"
    for layer in range(L):
        initial = []
        for kind in ("H", "C")[:states]:
            rows = constant(f"rows{layer}{kind}", torch.arange(layer * D, (layer + 1) * D))
            nodes.append(helper.make_node("Gather", [f"{kind}0", rows], [f"{kind}{layer}_in"], axis=0))
            initial.append(f"{kind}{layer}_in")
        options = {"hidden_size": H, "direction": "bidirectional" if D == 2 else "forward"}
        if family == "GRU":
            options["linear_before_reset"] = 1  # torch.nn's GRU: the bias of the new gate lies inside the reset
        names = [
            stacked(f"W{layer}", layer, "weight_ih"),
            stacked(f"R{layer}", layer, "weight_hh"),
            stacked(f"B{layer}", layer, "bias_ih", "bias_hh"),
        ]
        outputs = [f"Y{layer}_raw", *[f"{kind}{layer}_n" for kind in ("H", "C")[:states]]]
        nodes.append(helper.make_node(family, [x, *names, *([""] if initial else []), *initial], outputs, **options))
        # (T, D, B, H) -> (T, B, D, H) -> (T, B, D*H)
        nodes.append(helper.make_node("Transpose", [outputs[0]], [f"Y{layer}_t"], perm=[0, 2, 1, 3]))
        shape = constant(f"shape{layer}", torch.tensor([T, B, D * H]))
        x = f"Y{layer}" if layer < L - 1 else "Y"
        nodes.append(helper.make_node("Reshape", [f"Y{layer}_t", shape], [x]))

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    kinds = ("H", "C")[:states]
    inputs = [value("X", T, B, I), *[value(f"{kind}0", L * D, B, H) for kind in kinds]]
    results = [value("Y", T, B, D * H), *[value(f"{kind}{n}_n", D, B, H) for n in range(L) for kind in kinds]]
    graph = helper.make_graph(nodes, "rnn", inputs, results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


class Peer(abc.ABC):
    """One workload on one peer. `case` is a measure.Case."""

    name = package = ""
    dtypes = {torch.float32: 1e-3}  # -> the largest difference from torch.nn's output that passes for the same function

    @classmethod
    def missing(cls) -> list[str]:
        """The packages that are not installed."""
        return [name for name in ("numpy", "onnx", cls.package) if importlib.util.find_spec(name) is None]

    @classmethod
    def serves(cls, w, dtype: torch.dtype) -> bool:
        # ONNX's LSTM knows no projection and no resets.
        return dtype in cls.dtypes and not w.P and not w.variant and not w.reset

    def __init__(self, case):
        w = case.w
        hx = () if case.hx is None else case.hx if isinstance(case.hx, tuple) else (case.hx,)
        model = onnx_model(case.modules["torch"], w.family, w.T, w.B, len(hx))
        # A cell's tensors have neither a time nor a layer dimension.
        self.feed = {"X": case.x.float().reshape(w.T, w.B, w.I).numpy()}
        for name, state in zip(("H0", "C0"), hx):
            self.feed[name] = state.float().reshape(w.L * w.D, w.B, w.H).numpy()
        self.tolerance = self.dtypes[case.dtype]
        with torch.no_grad():
            module = case.modules["torch"]
            self.expected = case.output("torch", module, case.x, case.hx).float().reshape(w.T, w.B, -1)
        self.load(model, case.dtype)

    @abc.abstractmethod
    def load(self, model: bytes, dtype: torch.dtype) -> None:
        """Makes the peer's own form of the ONNX model."""

    @abc.abstractmethod
    def run(self):
        """What is timed; returns the output."""

    def difference(self) -> float:
        """The largest, relative to the largest element where that is above 1."""
        found = torch.as_tensor(self.run()).float()
        if found.shape != self.expected.shape:
            return float("inf")
        return float((found - self.expected).abs().max() / self.expected.abs().max().clamp(min=1.0))


class OnnxRuntime(Peer):
    name, package = "ONNX Runtime", "onnxruntime"

    def load(self, model, dtype):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._run = session.run

    def run(self):
        return self._run(None, self.feed)[0]


class OpenVino(Peer):
    name, package = "OpenVINO", "openvino"
    dtypes = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # bfloat16: on float32 tensors, as OpenVINO offers it
    core = None

    def load(self, model, dtype):
        import openvino

        OpenVino.core = OpenVino.core or openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        }
        compiled = self.core.compile_model(self.core.read_model(model, b""), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.output = compiled.output(0)

    def run(self):
        return self.request.infer(self.feed, share_inputs=True, share_outputs=True)[self.output]


PEERS = (OnnxRuntime, OpenVino)
