"""Ceilings of the card at hand: read-only HBM bandwidth and a large bf16 matmul, in a burst and sustained.

The kernel's own building blocks, the third kind of ceiling, are points of the experiments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from .figures import HBM_READ, MATMUL
from .measurements import Ceiling
from .timing import burst, capture, sustained

READ_BYTES = 4 << 30  # 70 times the L2
MATMUL_SIZE = 8192


@functools.cache
def measure_ceilings(load: bool = True) -> tuple[tuple[Ceiling, ...], tuple[str, ...]]:
    """(ceilings, notes on those that could not be measured). Once per process: about 10 s of GPU time.

    ``load`` False: in a burst alone, 1 s.
    """
    ceilings, notes = [], []
    for name, prepare, work in (
        (HBM_READ, _read_call, {"bytes": READ_BYTES}),
        (MATMUL, _matmul_call, {"flop": 2 * MATMUL_SIZE**3}),
    ):
        try:
            loop = capture(name, [prepare()])
            for measurement in (burst([loop])[name], *([sustained(loop)] if load else [])):
                ceilings.append(Ceiling(name=name, **work, **measurement.model_dump()))
        except Exception as error:  # a record without a ceiling is worth more than no record
            notes.append(f"ceiling {name} not measured: {type(error).__name__}: {error}")
    return tuple(ceilings), tuple(notes)


def _read_call() -> Callable[[], object]:
    import torch

    from mla_kernels.launch import stream_read

    return functools.partial(
        stream_read, torch.empty(READ_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    )


def _matmul_call() -> Callable[[], object]:
    import torch

    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    return functools.partial(torch.matmul, a, b, out=torch.empty_like(a))
