"""Where a record comes from: run, CUDA sources, device, software."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from .power import meter
from .records import Device, Kernel, Run, Software, Source

if TYPE_CHECKING:
    from mla_kernels.compiler import KernelConfig

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
DATA_VARIABLE = "MLA_KERNELS_DATA"
COMMIT_VARIABLE = "MLA_KERNELS_COMMIT"


def data_folder() -> Path:
    """Where records are read from: the folder ``MLA_KERNELS_DATA`` names, else ``data/``."""
    return Path(os.environ.get(DATA_VARIABLE) or DATA)


class UnknownCommit(RuntimeError):
    """A record must name the tree it measured, and neither git nor the environment does."""


@functools.cache
def commit() -> tuple[str, bool]:
    """(hash, dirty) of this source tree: from git, else ``MLA_KERNELS_COMMIT`` ("<hash>" or "<hash>-dirty").

    Changes under ``data/`` do not make it dirty: recording writes there. Raises UnknownCommit.
    """
    try:
        if Path(_git("rev-parse", "--show-toplevel")) == ROOT:
            return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--", ".", ":(exclude)data"))
    except (OSError, subprocess.CalledProcessError):
        pass
    named = os.environ.get(COMMIT_VARIABLE, "")
    if match := re.fullmatch(r"([0-9a-f]{7,40})(-dirty)?", named):
        return match[1], match[2] is not None
    raise UnknownCommit(
        f"{ROOT} is no git checkout and {COMMIT_VARIABLE} is {named!r}, so a record could not say what it "
        f"measured; set {COMMIT_VARIABLE} to the commit's hash (7 to 40 hex digits), or to hash-dirty"
    )


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True)
    return result.stdout.strip()


def sources_at(revision: str, folder: Path) -> Path:
    """The CUDA sources of a commit, unpacked into ``folder``: where they are. Raises UnknownCommit."""
    archive = folder / "sources.tar"
    try:
        _git("archive", f"--output={archive}", revision, "mla_kernels/cuda")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnknownCommit(f"git has no commit {revision} of {ROOT}: fetch the whole history") from error
    with tarfile.open(archive) as unpacked:
        unpacked.extractall(folder, filter="data")
    return folder / "mla_kernels" / "cuda"


@functools.cache
def _run_identity() -> tuple[str, datetime.datetime]:
    utc = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return f"{utc:%Y%m%dT%H%M%SZ}-{commit()[0][:7]}", utc


def run_section(command: str) -> Run:
    """``command`` repeats the measurement. Records of one process share id and time. Raises UnknownCommit."""
    identity, utc = _run_identity()
    revision, dirty = commit()
    return Run(id=identity, utc=utc, commit=revision, dirty=dirty, command=command)


def source_section(
    further: Sequence[KernelConfig] = (), shipped: Sequence[KernelConfig] | None = None
) -> Source:
    """Digest and resources of every kernel that an operator can launch (``shipped``, by default what decode
    can), and of ``further`` ones.

    Compiled here if not cached, several at once.
    """
    from mla_kernels.compiler import compile_kernel, resource_report, source_digest
    from mla_kernels.decode import shipped_configs
    from mla_kernels.launch import STREAM_READ

    def describe(config: KernelConfig) -> Kernel:
        compiled = compile_kernel(config)
        report = resource_report(compiled)
        return Kernel(
            name=config.name,
            source=config.source,
            digest=source_digest(config.source),
            options=list(compiled.options),
            cubin_sha256=compiled.sha256,
            registers=report.registers,
            stack_bytes=report.stack_bytes,
            shared_bytes=report.shared_bytes,
        )

    launched = shipped_configs() if shipped is None else shipped
    configs = {config.name: config for config in (*launched, STREAM_READ, *further)}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        return Source(kernels=list(threads.map(describe, configs.values())))


def device_section() -> Device:
    """The GPU that torch uses. Raises RuntimeError (from torch) where there is none."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    read = meter().read
    limit_mw = read(lambda nvml, handle: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return Device(
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=read(lambda nvml, handle: nvml.nvmlSystemGetDriverVersion()) or "unknown",
        sms=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        sm_clock_max_mhz=read(
            lambda nvml, handle: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
        ),
        mem_clock_max_mhz=read(
            lambda nvml, handle: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
        ),
        power_limit_w=None if limit_mw is None else limit_mw / 1e3,
    )


def software_section() -> Software:
    from mla_kernels.compiler import nvrtc_version

    return Software(
        python=platform.python_version(),
        torch=_version("torch"),
        cupy=_version("cupy-cuda13x") or _version("cupy"),
        nvrtc=nvrtc_version(),
        triton=_version("triton"),
        platform=f"{platform.system()}-{platform.machine()}",
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_folder(device_name: str) -> str:
    """Folder of a GPU's records: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia")).strip("-")
