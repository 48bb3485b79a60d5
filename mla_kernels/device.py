"""Which GPU is here, and what to say when it is not the one a kernel needs."""

import ctypes
import functools

HOPPER = (9, 0)

STILL_WORKS = (
    "without one these still work: mla_kernels.reference (the fp64 oracle, any device), "
    "mla_kernels.portable with TRITON_INTERPRET=1, the compile gate and resource reports, "
    "and every notebook in replay"
)


class DeviceUnavailable(RuntimeError):
    """An operator was called that needs a GPU which is not here."""


@functools.cache
def _capabilities() -> tuple[tuple[int, int], ...]:
    try:
        ctypes.CDLL("libcuda.so.1")  # importing torch only to learn that there is no driver takes seconds
        import torch
    except (OSError, ImportError):
        return ()
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def capability(index: int) -> tuple[int, int]:
    """Compute capability of CUDA device ``index``."""
    return _capabilities()[index]


def hopper_available() -> bool:
    """Whether the current CUDA device runs the native kernels (compute capability 9.0)."""
    if not _capabilities():
        return False
    import torch

    return capability(torch.cuda.current_device()) == HOPPER


def describe() -> str:
    """One line on the GPU at hand and what it can run."""
    if not _capabilities():
        return "no CUDA device: replay, reference and interpreter only"
    import torch

    index = torch.cuda.current_device()
    major, minor = capability(index)
    runs = "native kernels" if (major, minor) == HOPPER else "portable (Triton) operators only, not Hopper"
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}): {runs}"
