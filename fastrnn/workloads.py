"""The frozen, named list of what `python -m fastrnn bench` and the suites in benchmarks/ measure.

Results are compared over time by name, so a name never changes its meaning: tests pin the content of this list.
Letters: B rows, T steps, I features, H hidden units, L layers, D directions, P projection (0: none). Four groups:

workloads   shapes as real projects use them, with where they come from
grid        a thinned grid of sizes, with rows of DeepBench, of the batch-1 audio world and of public issue reports
ragged      rows of different lengths: PackedSequence and lengths=, beside torch.nn on a PackedSequence
reset       training with state resets inside the sequence, beside a loop of one-step calls that zero the state
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

BOTH, INFERENCE, TRAINING = ("inference", "training"), ("inference",), ("training",)


@dataclass(frozen=True)
class Workload:
    name: str
    group: str
    cell: str  # a class of torch.nn
    B: int
    T: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    P: int = 0
    modes: tuple[str, ...] = BOTH
    state: bool = False  # called with the state of the call before
    input_gradient: bool = True  # False: the input is data, and no layer before it learns
    variant: str = ""  # group ragged: "packed", "lengths" or "new lengths" (other lengths at every call)
    reset: float = 0.0  # share of (t, b) at which a new episode begins
    source: str = ""
    note: str = ""

    @property
    def family(self) -> str:
        """RNN, LSTM or GRU, whether sequence class or cell."""
        return self.cell.removesuffix("Cell")

    @property
    def shape(self) -> str:
        return ",".join(str(getattr(self, letter)) for letter in ("BTIHLDP" if self.P else "BTIHLD"))


def _real(name, cell, B, T, I, H, L=1, D=1, **more) -> Workload:
    return Workload(name, "workloads", cell, B, T, I, H, L, D, **more)


# The input is data, so it needs no gradient; one piece of a stream, so the state comes from the piece before.
_DATA = dict(input_gradient=False)
_STEP = dict(state=True)

_CLEANRL = dict(source="vwxyzjn/cleanrl ppo_atari_lstm.py")
_GLUONTS = dict(source="awslabs/gluonts torch DeepAR")
_DARTS = dict(source="unit8co/darts RNNModel defaults")
_AMP = dict(source="sdatkinson/neural-amp-modeler lstm.json")
_RNNOISE = dict(source="xiph/rnnoise train_rnnoise.py")
_CRNN = dict(source="clovaai/deep-text-recognition-benchmark")
_UNMIX = dict(source="sigsep/open-unmix-pytorch")
_HYDROLOGY = dict(source="neuralhydrology, 531 basins", **_DATA)
_NEMO = dict(source="NVIDIA/NeMo fast-conformer transducer predictor")
_FORECASTING = dict(source="sktime/pytorch-forecasting defaults")
_NEURALFORECAST = dict(source="Nixtla/neuralforecast defaults", **_DATA)

WORKLOADS = (
    # Reinforcement learning
    _real("CleanRL PPO, update", "LSTM", 2, 128, 512, 128, **_CLEANRL),
    _real("CleanRL PPO, rollout step", "LSTM", 8, 1, 512, 128, **_CLEANRL, **_STEP),
    _real("recurrent PPO, GRU", "GRU", 8, 128, 64, 128, source="the CleanRL shape on vector observations"),
    _real("torchbeast (IMPALA)", "LSTM", 8, 80, 519, 519, 2, source="facebookresearch/torchbeast monobeast.py"),
    _real("Sample Factory", "GRU", 32, 32, 512, 512, source="alex-petrenko/sample-factory cfg.py"),
    _real("PufferLib", "LSTM", 256, 64, 128, 128, source="PufferAI/PufferLib default.ini"),
    # Forecasting
    _real("DeepAR", "LSTM", 32, 100, 40, 40, 2, **_GLUONTS),
    _real("DeepAR, GRU", "GRU", 32, 100, 40, 40, 2, **_GLUONTS),
    _real("DeepAR, sampling step", "LSTM", 3200, 1, 40, 40, 2, **_GLUONTS, **_STEP),
    _real("darts RNN", "RNN", 32, 24, 1, 25, **_DARTS, **_DATA),
    _real("darts GRU", "GRU", 32, 24, 1, 25, **_DARTS, **_DATA),
    _real("darts LSTM", "LSTM", 32, 24, 1, 25, **_DARTS, **_DATA),
    _real("pytorch-forecasting DeepAR", "LSTM", 64, 48, 16, 10, 2, **_FORECASTING),
    _real("temporal fusion transformer", "LSTM", 128, 168, 16, 16, **_FORECASTING),
    _real("NeuralForecast LSTM", "LSTM", 128, 72, 1, 128, 2, **_NEURALFORECAST),
    _real("NeuralForecast GRU", "GRU", 128, 48, 1, 200, 2, **_NEURALFORECAST),
    _real("hydrology", "LSTM", 256, 365, 32, 128, **_HYDROLOGY),
    _real("hydrology, tutorial", "LSTM", 256, 365, 32, 20, **_HYDROLOGY),
    # Audio
    _real("amp model, one stream", "LSTM", 1, 2048, 1, 18, **_AMP, **_DATA),
    _real("amp model, one stream, GRU", "GRU", 1, 2048, 1, 18, **_AMP, **_DATA),
    _real("amp model, training", "LSTM", 16, 2048, 1, 18, 3, **_AMP, **_DATA, note="T is 40960 there"),
    _real("RNNoise, one stream", "GRU", 1, 500, 256, 256, 3, **_RNNOISE),
    _real("RNNoise, one frame", "GRU", 1, 1, 384, 384, 3, **_RNNOISE, **_STEP),
    _real("RNNoise, training", "GRU", 192, 16, 384, 384, 3, **_RNNOISE, note="T is 2000 there"),
    _real("DeepFilterNet decoder", "GRU", 1, 500, 256, 256, 2, source="Rikorose/DeepFilterNet, 5 s"),
    _real("Open-Unmix, one track", "LSTM", 1, 255, 512, 256, 3, 2, **_UNMIX),
    _real("Open-Unmix, training", "LSTM", 16, 48, 512, 256, 3, 2, **_UNMIX, note="T is 255 there"),
    _real("Silero VAD, one step", "LSTMCell", 1, 1, 128, 128, source="snakers4/silero-vad tuning", **_STEP),
    # Speech, text, images
    _real("icefall encoder, streaming", "LSTM", 1, 10, 512, 1024, 12, P=512, modes=INFERENCE, **_STEP,
          source="k2-fsa/icefall lstm_transducer_stateless2"),
    _real("NeMo predictor, training", "LSTM", 16, 100, 640, 640, **_NEMO),
    _real("NeMo predictor, decoding step", "LSTM", 1, 1, 640, 640, **_NEMO, **_STEP),
    _real("Kokoro speech synthesis", "LSTM", 1, 200, 640, 256, 1, 2, source="hexgrad/kokoro"),
    _real("tts_angular", "LSTM", 64, 10, 40, 768, 3, source="pytorch/benchmark", note="T is 50 there", **_DATA),
    _real("OCR (CRNN), one line", "LSTM", 1, 26, 512, 256, 1, 2, **_CRNN),
    _real("OCR (CRNN), second layer", "LSTM", 1, 26, 256, 256, 1, 2, **_CRNN),
    _real("OCR (CRNN), training", "LSTM", 192, 26, 512, 256, 1, 2, **_CRNN),
    # Without a project's name on them: what tutorials and one-off models look like
    _real("small RNN, one stream", "RNN", 1, 100, 64, 64),
    _real("small RNN, batch", "RNN", 16, 100, 64, 120),
    _real("RNN cell, one step", "RNNCell", 8, 1, 64, 128, **_STEP),
    _real("GRU cell, one step", "GRUCell", 8, 1, 64, 128, **_STEP),
    _real("LSTM cell, one step", "LSTMCell", 32, 1, 512, 256, **_STEP),
)  # fmt: skip


def _grid() -> tuple[Workload, ...]:
    found: dict[str, Workload] = {}

    def add(source, cells, shapes, note="", **more):
        for cell in cells:
            for B, T, I, H, *rest in shapes:
                L, D = (*rest, 1, 1)[:2] if rest else (1, 1)
                sizes = f"B{B} T{T} {f'I{I} ' * (I != H)}H{H}{f' L{L}' * (L > 1)}{' bi' * (D == 2)}"
                w = Workload(f"{cell} {sizes}", "grid", cell, B, T, I, H, L, D, source=source, note=note, **more)
                found.setdefault(w.name, w)

    two, three = ("LSTM", "GRU"), ("RNN", "LSTM", "GRU")
    add("audio, one stream", two, [(1, 2048, 1, 8), (1, 2048, 1, 32), (1, 64, 1, 16), (1, 64, 1, 64),
                                   (1, 64, 24, 24), (1, 64, 40, 40)], **_DATA)  # fmt: skip
    add("audio, one sample", two, [(1, 1, 1, 16)], **_STEP)
    add("reinforcement learning, rollout", two, [(1, 1, 64, 128), (32, 1, 512, 256), (128, 1, 64, 128)], **_STEP)
    add("reinforcement learning, update", two, [(8, 128, 64, 128), (8, 128, 512, 256)])
    add("speech and time series", two, [(8, 128, 64, 64), (32, 128, 64, 64), (64, 512, 64, 64), (8, 128, 128, 128),
                                        (32, 128, 128, 128), (8, 64, 256, 256), (64, 64, 256, 256),
                                        (8, 64, 512, 512)])  # fmt: skip
    add("beside ONNX Runtime and OpenVINO", three, [(1, 100, 64, 64), (16, 100, 128, 128), (64, 50, 512, 512),
                                                    (1, 100, 256, 256), (32, 100, 256, 256),
                                                    (1, 50, 1024, 1024)])  # fmt: skip
    deepbench = "DeepBench, oneDNN benchdnn"
    add(deepbench, ["LSTM"], [(1, 25, 512, 512), (4, 25, 1024, 1024), (2, 8, 1536, 1536), (1, 8, 2048, 2048)],
        modes=INFERENCE)  # fmt: skip
    add(deepbench, ["LSTM"], [(16, 150, 256, 256), (64, 50, 256, 256), (32, 25, 512, 512), (64, 8, 1024, 1024)])
    add(deepbench, ["GRU"], [(32, 16, 1024, 1024)], note="T is 187 there")
    add(deepbench, ["RNN"], [(16, 25, 1760, 1760), (64, 8, 1760, 1760)], note="T is 50 there")
    issue = "pytorch issue 126051: three layers, two directions"
    add(issue, ["LSTM"], [(5, 3, 1, 16, 3, 2), (16, 113, 1, 128, 3, 2)])
    add(issue, ["LSTM"], [(32, 8, 1, 512, 3, 2)], note="T is 87 there")
    add(issue, ["LSTM"], [(32, 2, 1, 1024, 3, 2)], note="T is 227 there")
    add(issue, ["GRU"], [(5, 3, 1, 16, 3, 2), (16, 56, 1, 128, 3, 2)], note="a twin of the LSTM row")
    return tuple(found.values())


GRID = _grid()

# Lengths uniform between T/4 and T.
RAGGED = tuple(
    Workload(f"{cell} B{B} H{H} {variant}", "ragged", cell, B, 100, H, H, variant=variant,
             source="the shape of pytorch issue 149194")
    for cell in ("LSTM", "GRU")
    for B, H in ((8, 64), (16, 128), (32, 128), (32, 256), (64, 512))
    for variant in ("packed", "lengths", "new lengths")
)  # fmt: skip

RESET = tuple(
    Workload(f"{cell} T{T} B{B} H{H} reset", "reset", cell, B, T, H, H, modes=TRAINING, reset=0.05,
             source="recurrent PPO: state * (1 - done) before every step")
    for cell in ("LSTM", "GRU")
    for T, B, H in ((96, 8, 128), (64, 32, 128), (128, 16, 256))
)  # fmt: skip

ALL = WORKLOADS + GRID + RAGGED + RESET
GROUPS = ("workloads", "grid", "ragged", "reset")

# For --quick: about a minute, something of everything.
QUICK = (
    "CleanRL PPO, update",
    "CleanRL PPO, rollout step",
    "DeepAR",
    "darts RNN",
    "darts GRU",
    "amp model, one stream",
    "RNNoise, one stream",
    "OCR (CRNN), one line",
    "small RNN, batch",
    "LSTM B32 T100 H256",
    "GRU B16 H128 lengths",
    "LSTM T96 B8 H128 reset",
)


def select(group: str = "all", cell: str = "all", only: str = "", quick: bool = False) -> list[Workload]:
    """The workloads of a group, of a cell (RNN, LSTM or GRU, cell classes included), with `only` in their name."""
    return [
        w
        for w in ALL
        if (not quick or w.name in QUICK)
        and group in ("all", w.group)
        and cell in ("all", w.family)
        and only.lower() in w.name.lower()
    ]


def fingerprint() -> str:
    """A hash of the whole list: two results are of the same workloads where these agree."""
    return hashlib.sha256(repr([astuple(w) for w in ALL]).encode()).hexdigest()[:16]
