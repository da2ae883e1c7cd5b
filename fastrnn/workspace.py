"""The memory that the kernels keep between calls, and how to give it back."""

from __future__ import annotations

from fastrnn import _C


def workspace_bytes() -> int:
    """Bytes of memory that the CPU kernels keep for later calls, all threads together.

    That is scratch memory, at most 64 MiB for each living Python (or other) thread that has called a kernel, and memory
    for what backward needs, for the gradients of weights and for larger scratch, at most 256 MiB for the whole process.
    What a running kernel uses is not counted, nor what belongs to a graph whose backward is still to come. Tensors
    never lie in scratch memory.
    """
    return _C.workspace_bytes()


def release_workspace() -> int:
    """Gives that memory back to the system; returns how many bytes it was.

    Safe at any time and from any thread: what a running kernel uses, or a graph whose backward is still to come, stays.
    Results do not depend on it; the next calls take fresh memory, which makes them slower.
    """
    return _C.release_workspace()
