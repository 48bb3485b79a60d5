"""The freshness gate: a record describes the kernels of this tree, or it must be measured again."""

from __future__ import annotations

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mla_kernels.choice import SHIPPED
from mla_kernels.tuning import TILE_TOKENS, pages_of

from . import candidates
from .calls import PrefillWorkload
from .figures import DECODE, query_rows
from .hardware import load_hardware
from .prefill_candidates import prefill_configs, serving_names
from .provenance import DATA, UnknownCommit, sources_at
from .records import Kernel, Point, Record, RecordError, load_record
from .workloads import table_width

if TYPE_CHECKING:
    from mla_kernels.compiler import CompiledKernel

STALE = "measure again with `make record` on a GPU, or check out the commit that was measured"


def check_fresh(record: Record, path: str | os.PathLike) -> None:
    """Raises RecordError where a kernel is not that of this tree, or where there is none.

    It is where its sources have the same digest, or where they compile, as then, to the same machine code:
    what changed was for other instances. The same instructions are enough, since a constant that nothing
    reads changes a cubin, too; but then git must have the commit that was measured, to compile it again.
    """
    from mla_kernels.compiler import CompileError, source_digest

    if not record.source.kernels:
        raise RecordError(path, "source.kernels", "is empty, so the record cannot be tied to a source", STALE)
    changed = []
    for index, kernel in enumerate(record.source.kernels):
        try:
            digest = source_digest(kernel.source)
        except CompileError:
            gone = f"{kernel.source} is no longer in this tree"
            raise RecordError(path, f"source.kernels.{index}.digest", gone, STALE) from None
        if digest != kernel.digest:
            changed.append((index, kernel, digest))
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        compiled = list(threads.map(lambda entry: _compiled(entry[1]), changed))
    for (index, kernel, digest), now in zip(changed, compiled, strict=True):
        if now is None or not _is_what_was_measured(now, kernel, record.run.commit):
            found = (
                f"{kernel.source} was {kernel.digest[:12]}… when measured and is {digest[:12]}… now, and "
                f"{kernel.name} does not compile to the code that was measured"
            )
            raise RecordError(path, f"source.kernels.{index}.digest", found, STALE)


def _compiled(kernel: Kernel) -> CompiledKernel | None:
    """This tree's sources compiled with the kernel's options, None where they do not."""
    from mla_kernels.compiler import CompileError, KernelConfig, compile_kernel

    defines = re.findall(r"^-D(\w+)=(\d+)$", "\n".join(kernel.options), re.MULTILINE)
    config = KernelConfig(
        kernel.source, tuple((name, int(value)) for name, value in defines), kernel.name, 0, 0
    )
    try:
        return compile_kernel(config)
    except (CompileError, ImportError):  # or there is no compiler
        return None


def _is_what_was_measured(now: CompiledKernel, kernel: Kernel, commit: str) -> bool:
    """Whether ``now`` is the cubin measured at ``commit``, or has its instructions."""
    from mla_kernels.compiler import CompileError, ToolMissing, compile_kernel, instructions

    if now.sha256 == kernel.cubin_sha256:
        return True
    try:
        with tempfile.TemporaryDirectory() as folder:
            then = compile_kernel(now.config, sources_at(commit, Path(folder)))
        return then.sha256 == kernel.cubin_sha256 and instructions(then) == instructions(now)
    except (CompileError, ToolMissing, UnknownCommit):
        return False


def check_options(record: Record, path: str | os.PathLike) -> None:
    """Raises RecordError where the record's kernels are not those of this tree, compiled the same way, or one
    that serves its points is missing."""
    from mla_kernels.compiler import compile_options
    from mla_kernels.decode import shipped_configs
    from mla_kernels.launch import STREAM_READ
    from mla_kernels.prefill_tuning import shipped_prefill_configs

    known = (*shipped_configs(), *shipped_prefill_configs(), STREAM_READ)
    now = {config.name: list(compile_options(config)) for config in known}
    measured = {kernel.name: kernel.options for kernel in record.source.kernels}
    prefill = [p for p in record.points if isinstance(p.workload, PrefillWorkload)]
    decode = [p for p in record.points if not isinstance(p.workload, PrefillWorkload)]
    built = candidates.configs((p.implementation, p.workload.dtype) for p in decode)
    built += prefill_configs((p.implementation, p.workload) for p in prefill)
    for config in built:  # there where they could be built
        now[config.name] = list(compile_options(config))
    serving = {_serving(point, record.device.sms) for point in decode if point.implementation == DECODE}
    serving |= {name for point in prefill for name in serving_names(point.workload)}
    for name in sorted(measured.keys() | serving):
        if now.get(name) != measured.get(name):
            changed = (
                f"{name} was compiled with {measured.get(name)} when measured and is with {now.get(name)} now"
            )
            raise RecordError(path, "source.kernels", changed, STALE)


def _serving(point: Point, sms: int) -> str:
    """Name of the kernel that serves a point's workload."""
    workload = point.workload
    pages = -(-table_width(workload) * workload.page_size // TILE_TOKENS)
    come = pages_of(workload.page_size, ragged=False)
    tuning = SHIPPED.serving(query_rows(workload), workload.b, pages, sms, come)
    return tuning.kernel_config(workload.dtype, pages=come).name


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
