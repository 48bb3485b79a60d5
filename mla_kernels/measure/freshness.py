"""The freshness gate: a record describes the kernels of this tree, or it must be measured again."""

from __future__ import annotations

import os
from pathlib import Path

from . import candidates
from .hardware import load_hardware
from .provenance import DATA
from .records import Record, RecordError, load_record

STALE = "measure again with `make record` on a GPU, or check out the commit that was measured"


def check_fresh(record: Record, path: str | os.PathLike) -> None:
    """Raises RecordError where a kernel's source digest is not that of this tree, or where there is none."""
    from mla_kernels.compiler import CompileError, source_digest

    if not record.source.kernels:
        raise RecordError(path, "source.kernels", "is empty, so the record cannot be tied to a source", STALE)
    for index, kernel in enumerate(record.source.kernels):
        field = f"source.kernels.{index}.digest"
        try:
            digest = source_digest(kernel.source)
        except CompileError:
            raise RecordError(path, field, f"{kernel.source} is no longer in this tree", STALE) from None
        if digest != kernel.digest:
            changed = f"{kernel.source} was {kernel.digest[:12]}… when measured and is {digest[:12]}… now"
            raise RecordError(path, field, changed, STALE)


def check_options(record: Record, path: str | os.PathLike) -> None:
    """Raises RecordError where the record's kernels are not those of this tree, compiled the same way."""
    from mla_kernels.compiler import compile_options
    from mla_kernels.decode import shipped_configs
    from mla_kernels.launch import STREAM_READ

    now = {config.name: list(compile_options(config)) for config in (*shipped_configs(), STREAM_READ)}
    measured = {kernel.name: kernel.options for kernel in record.source.kernels}
    points = ((point.implementation, point.workload.dtype) for point in record.points)
    for config in candidates.configs(points):  # there where they could be built
        if config.name in measured:
            now[config.name] = list(compile_options(config))
    for name in sorted(now.keys() | measured.keys()):
        if now.get(name) != measured.get(name):
            changed = (
                f"{name} was compiled with {measured.get(name)} when measured and is with {now.get(name)} now"
            )
            raise RecordError(path, "source.kernels", changed, STALE)


def record_files(data: Path = DATA) -> list[Path]:
    """Every record under ``data``: one folder for each GPU."""
    return sorted(data.glob("*/*.json"))


def problems(data: Path = DATA) -> list[RecordError]:
    """What is wrong under ``data``: schema and freshness of the records, schema of the hardware table."""
    found = []
    for path in record_files(data):
        try:
            record = load_record(path)
            check_fresh(record, path)
            check_options(record, path)
        except RecordError as error:
            found.append(error)
    try:
        load_hardware(data / "hardware.json")
    except RecordError as error:
        found.append(error)
    return found
