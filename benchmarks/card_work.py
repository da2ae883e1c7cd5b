"""What benchmarks/card.py measures on a GPU, and what is asked of it: plain lists, without torch.

Letters: B rows, T steps, I features, H hidden units, L layers, D directions. A precision is a dtype, or "tf32": float32
as torch has it by default, whose products may round their factors to TF32; "float32" is all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass

PATHS = ("step", "block", "cluster", "grid")
BOTH, TRAINING = ("forward", "training"), ("training",)
CELLS = ("LSTM", "GRU", "RNN")
PRECISIONS = ("tf32", "float32", "bfloat16", "float16")
CUDNN = "cuDNN"
# FlashRNN's dense shapes, in bfloat16.
FLASHRNN = tuple(
    f"LSTM B{B} T{T} H{H} | {mode}"
    for B, T, H in ((16, 1024, 768), (16, 512, 512), (64, 512, 1024))
    for mode in ("forward", "training")
)


@dataclass(frozen=True)
class Work:
    name: str
    group: str  # the stage that measures it: bench, rl or packed
    cell: str
    B: int
    T: int
    I: int
    H: int
    L: int = 1
    D: int = 1
    precisions: tuple[str, ...] = ("tf32",)
    modes: tuple[str, ...] = BOTH
    variant: str = ""  # group packed: "packed" (a PackedSequence is given) or "lengths" (cuDNN has to pack and unpack)
    reset: float = 0.0  # share of (t, b) at which a new episode begins

    @property
    def shape(self) -> str:
        return ",".join(str(getattr(self, letter)) for letter in "BTIHLD")

    def items(self) -> Iterator[str]:
        """The names of what is measured of it."""
        return (f"{self.name} | {precision} | {mode}" for precision in self.precisions for mode in self.modes)


def _works() -> Iterator[Work]:
    two, low, every = ("LSTM", "GRU"), ("bfloat16", "float16"), ("tf32", "float32", "bfloat16", "float16")
    # KernelBench, level 3, problems 35 to 42: six layers, float32.
    for cell in two:
        yield Work(f"{cell} B10 H256 L6", "bench", cell, 10, 512, 128, 256, 6, precisions=("tf32", "float32"))
        yield Work(f"{cell} B10 H256 L6 bi", "bench", cell, 10, 512, 128, 256, 6, 2, precisions=("tf32",))
    for cell in two:
        yield Work(f"{cell} B1 H256", "bench", cell, 1, 512, 256, 256, precisions=("tf32", "float32", "bfloat16"))
        yield Work(f"{cell} B16 H512", "bench", cell, 16, 512, 512, 512, precisions=every if cell == "LSTM" else low)
        yield Work(f"{cell} B64 H1024", "bench", cell, 64, 512, 1024, 1024,
                   precisions=("tf32", *low) if cell == "LSTM" else ("bfloat16",))  # fmt: skip
        yield Work(f"{cell} B16 T1024 H768", "bench", cell, 16, 1024, 768, 768, precisions=low)
    yield Work("RNN B16 H512", "bench", "RNN", 16, 512, 512, 512, precisions=("tf32", "bfloat16"))
    # Small layers, where cuDNN has a kernel for one multiprocessor that loses its breath with the batch.
    for B, H in ((32, 32), (256, 32), (64, 64), (32, 128), (128, 128), (256, 128), (45, 152), (62, 168), (256, 192)):
        yield Work(f"LSTM B{B} H{H}", "bench", "LSTM", B, 256, H, H, precisions=("tf32", "bfloat16"))
    for B, H in ((32, 64), (256, 64), (128, 192)):
        yield Work(f"GRU B{B} H{H}", "bench", "GRU", B, 256, H, H, precisions=("tf32", "bfloat16"))
    # Sizes that no kernel is made for.
    yield Work("LSTM B8 T80 H519 L2", "bench", "LSTM", 8, 80, 519, 519, 2, precisions=("tf32",))
    yield Work("LSTM B20 T35 H1150", "bench", "LSTM", 20, 35, 400, 1150, precisions=("tf32", "bfloat16"))
    # Recurrent reinforcement learning: episodes end and begin inside the sequence.
    for cell in ("GRU", "LSTM"):
        for B, T, I, H in ((256, 128, 32, 512), (4096, 32, 32, 256)):
            yield Work(f"{cell} RL B{B} T{T} H{H}", "rl", cell, B, T, I, H, precisions=("tf32", "bfloat16"),
                       modes=TRAINING, reset=0.03)  # fmt: skip
    for cell in two:
        for B, H in ((32, 256), (64, 512)):
            for variant in ("packed", "lengths"):
                yield Work(f"{cell} B{B} H{H} {variant}", "packed", cell, B, 256, H, H,
                           precisions=("tf32", "bfloat16"), variant=variant)  # fmt: skip


WORKS = tuple(_works())
BY_NAME = {w.name: w for w in WORKS}


def of_item(item: str) -> tuple[Work, str, str]:
    """The workload, precision and mode that an item's name stands for."""
    name, precision, mode = item.split(" | ")
    return BY_NAME[name], precision, mode


def items(group: str) -> list[str]:
    return [item for w in WORKS if w.group == group for item in w.items()]


def fingerprint() -> str:
    return hashlib.sha256(repr([astuple(w) for w in WORKS]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Requirement:
    """A line of the summary: cuDNN's time over that of fastrnn's best path, in every row it is about, is at least
    `ratio`; and `us`, where given, is the most that a step of a layer may take."""

    name: str
    works: tuple[str, ...]
    precisions: tuple[str, ...]
    modes: tuple[str, ...] = BOTH
    ratio: float = 1.0
    us: float | None = None

    def concerns(self, row: dict) -> bool:
        return row["name"] in self.works and row["precision"] in self.precisions and row["mode"] in self.modes

    @property
    def asked(self) -> str:
        return f"ratio >= {self.ratio:g}" + (f", <= {self.us:g} µs" if self.us else "")


def _named(*parts: str, group: str = "bench") -> tuple[str, ...]:
    return tuple(w.name for w in WORKS if w.group == group and any(part in w.name for part in parts))


_FLOAT32, _LOW = ("tf32", "float32"), ("bfloat16", "float16")
_SMALL = tuple(w.name for w in WORKS if w.group == "bench" and w.H <= 192 and w.B >= 32)

_FORWARD = ("forward",)
_SIX = ("LSTM B10 H256 L6", "GRU B10 H256 L6")
# What the project set out for, on an H200.
REQUIREMENTS = (
    Requirement("LSTM, GRU (10, 512, 256), 6 layers, float32 as torch has it", _SIX, ("tf32",), _FORWARD, ratio=5),
    Requirement("the same, training", _SIX, ("tf32",), TRAINING, ratio=4),
    Requirement("the same, bidirectional", _named("B10 H256 L6 bi"), ("tf32",), _FORWARD, ratio=8),
    Requirement("LSTM, GRU (1, 256), bfloat16 and float32", _named("B1 H256"), ("bfloat16", *_FLOAT32), _FORWARD,
                us=0.6),
    Requirement("LSTM (16, 512), bfloat16 and float16", ("LSTM B16 H512",), _LOW, _FORWARD, us=1.1),
    Requirement("LSTM (64, 1024), bfloat16", ("LSTM B64 H1024",), ("bfloat16",), _FORWARD, ratio=3, us=2.2),
    Requirement("LSTM (16, 768), T 1024, float16", ("LSTM B16 T1024 H768",), ("float16",), _FORWARD, ratio=1.2),
    Requirement("H 32 to 192 at B 32 to 256", _SMALL, ("tf32", "bfloat16"), ratio=3),
    Requirement("resets in training, GRU and LSTM, over split-and-pad", _named("RL", group="rl"), ("tf32", "bfloat16"),
                TRAINING, ratio=2),
    Requirement("PackedSequence", _named(" packed", group="packed"), ("tf32", "bfloat16"), ratio=5),
    Requirement("everything in this list: never slower", tuple(BY_NAME), ("tf32", "float32", *_LOW)),
)  # fmt: skip
