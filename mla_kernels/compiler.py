"""CUDA source + configuration -> cubin, through NVRTC; no GPU and no driver needed.

Cubins are cached by content: the file name carries a hash of every source file, the options and the NVRTC
version, so that an edit of any header rebuilds, and ``cupy.RawModule``, which memoizes by path, cannot
hand out an old one. A manifest beside each cubin holds its sha256; a cubin that does not match it is compiled
again.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path

CUDA_DIR = Path(__file__).parent / "cuda"
ARCH = "sm_90a"  # WGMMA and setmaxnreg do not exist in plain sm_90


class CompileError(RuntimeError):
    """NVRTC rejected a kernel; the message holds its log."""


class ToolMissing(RuntimeError):
    """A program of the CUDA toolchain is needed and not installed."""


@dataclass(frozen=True)
class KernelConfig:
    """One cubin: a file of ``cuda/``, its macros, a readable name unique to that pair; and its launch."""

    source: str
    defines: tuple[tuple[str, int], ...]
    name: str
    shared_bytes: int  # dynamic shared memory of the launch
    threads: int  # a block
    programmatic: bool = True  # may start before the kernel ahead of it in the stream has ended


@dataclass(frozen=True)
class CompiledKernel:
    config: KernelConfig
    path: Path  # the cubin
    sha256: str
    options: tuple[str, ...]
    compile_seconds: float  # what NVRTC took when the cubin was made
    cached: bool  # it was there already
    log: str  # NVRTC's and ptxas's words


@dataclass(frozen=True)
class ResourceReport:
    """What the compiler made of a kernel, read from the cubin itself."""

    registers: int  # a thread, at launch (setmaxnreg moves them between warpgroups later)
    stack_bytes: int
    shared_bytes: int  # static + dynamic
    local_loads: int  # LDL: spills or a register array with a run-time index
    local_stores: int
    hgmma: int  # tensor-core instructions
    utmaldg: int  # TMA loads
    instructions: int

    @property
    def code_bytes(self) -> int:
        """16 an instruction."""
        return 16 * self.instructions


def cache_directory() -> Path:
    """``MLA_KERNELS_CACHE``, or ``mla_kernels`` under the user's cache directory."""
    if explicit := os.environ.get("MLA_KERNELS_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mla_kernels"


def source_files(source: str, folder: Path | None = None) -> list[Path]:
    """The kernel file and every header it includes, directly or not, in order of first use."""
    folder = folder or CUDA_DIR
    found: list[Path] = []

    def visit(path: Path) -> None:
        if path in found:
            return
        if not path.is_file():
            raise CompileError(f"{path.name}: no such file in {folder}")
        found.append(path)
        for header in re.findall(r'^\s*#include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            visit(folder / header)

    visit(folder / source)
    return found


_NOISE = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/|\s+', re.DOTALL)


def source_digest(source: str) -> str:
    """sha256 of the kernel's sources with comments and white space removed (strings kept)."""
    digest = hashlib.sha256()
    for path in source_files(source):
        digest.update(path.name.encode() + b"\0")
        digest.update(_NOISE.sub(lambda match: match[1] or "", path.read_text()).encode() + b"\0")
    return digest.hexdigest()


@functools.cache
def nvrtc_version() -> str:
    """Version of the NVRTC that compiles, for example ``13.0``."""
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC does not answer ({status}): install the toolchain extra")
    return f"{major}.{minor}"


def compile_options(config: KernelConfig) -> tuple[str, ...]:
    """The options as NVRTC gets them, for records."""
    defines = tuple(f"-D{name}={value}" for name, value in config.defines)
    return (f"-arch={ARCH}", "-std=c++17", *defines)


def compile_kernel(config: KernelConfig, folder: Path | None = None) -> CompiledKernel:
    """The cubin of ``config``, from the cache or compiled now. Concurrent processes compile it once.

    ``folder``: of the sources, if not this tree's.

    Raises:
        CompileError: NVRTC's log.
    """
    options = compile_options(config)
    key = hashlib.sha256("\0".join((nvrtc_version(), *options)).encode())
    for path in source_files(config.source, folder):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    cubin = directory / f"{config.name}-{key.hexdigest()[:24]}.cubin"
    if hit := _cached(config, cubin, options):
        return hit
    with open(cubin.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if hit := _cached(config, cubin, options):
            return hit
        start = time.perf_counter()
        code, log = _nvrtc(config, folder or CUDA_DIR)
        seconds = time.perf_counter() - start
        sha256 = hashlib.sha256(code).hexdigest()
        _replace(cubin, code)
        manifest = {"sha256": sha256, "compile_seconds": seconds, "log": log}
        _replace(cubin.with_suffix(".json"), json.dumps(manifest).encode())
    return CompiledKernel(config, cubin, sha256, options, seconds, cached=False, log=log)


def _cached(config: KernelConfig, cubin: Path, options: tuple[str, ...]) -> CompiledKernel | None:
    try:
        manifest = json.loads(cubin.with_suffix(".json").read_text())
        sha256 = hashlib.sha256(cubin.read_bytes()).hexdigest()
        if sha256 != manifest["sha256"]:
            return None
        return CompiledKernel(
            config, cubin, sha256, options, manifest["compile_seconds"], cached=True, log=manifest["log"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: compile again


_importing = threading.Lock()  # cuda.core's import is not safe when threads race for it


def _nvrtc(config: KernelConfig, folder: Path) -> tuple[bytes, str]:
    with _importing:
        from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=ARCH,
        std="c++17",
        include_path=[str(folder)],
        define_macro=[(name, str(value)) for name, value in config.defines] or None,
        ptxas_options=["-v"],
    )
    log = _Log()
    try:
        program = Program((folder / config.source).read_text(), "c++", options)
        code = program.compile("cubin", logs=log)
    except Exception as error:  # cuda.core raises its own NVRTCError, which carries the log
        raise CompileError(f"{config.name}: {error}") from error
    return bytes(code.code), log.text


class _Log:
    """A text sink: cuda.core writes NVRTC's log to it, as str or bytes by version."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, part: str | bytes) -> None:
        self.text += part.decode(errors="replace") if isinstance(part, bytes) else part


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def resource_report(kernel: CompiledKernel) -> ResourceReport:
    """Registers, stack, shared memory and instruction counts of a cubin (cuobjdump, nvdisasm).

    Raises:
        ToolMissing: neither the toolchain wheels nor a CUDA toolkit is installed.
    """
    usage = _run_tool("cuobjdump", "--dump-resource-usage", str(kernel.path))
    fields = {
        key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage.split("Function", 1)[-1])
    }
    sass = instructions(kernel)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE)
    return ResourceReport(
        registers=fields["REG"],
        stack_bytes=fields["STACK"],
        shared_bytes=fields["SHARED"] + kernel.config.shared_bytes,
        local_loads=opcodes.count("LDL"),
        local_stores=opcodes.count("STL"),
        hgmma=opcodes.count("HGMMA"),
        utmaldg=opcodes.count("UTMALDG"),
        instructions=len(opcodes),
    )


def instructions(kernel: CompiledKernel) -> str:
    """Those of a cubin, as nvdisasm lists them. Raises ToolMissing as ``resource_report`` does."""
    return _run_tool("nvdisasm", "-c", str(kernel.path))


def _run_tool(name: str, *arguments: str) -> str:
    wheel = Path(sysconfig.get_paths()["platlib"]) / "nvidia" / "cu13" / "bin" / name
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    found = next((str(path) for path in (wheel, toolkit) if path.is_file()), None) or shutil.which(name)
    if found is None:
        raise ToolMissing(
            f"{name} not found: pip install nvidia-cuda-{name}, or put a CUDA toolkit's bin on PATH"
        )
    result = subprocess.run([found, *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(f"{name} {' '.join(arguments)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout
