"""The simulators of tests/on_host: built of the kernels' own sources, run, and what all of them may say."""

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mla_kernels.compiler import CUDA_DIR

HOST = Path(__file__).parent / "on_host"

DEADLOCK = "nothing moves: a deadlock"
TOO_MANY = "an arrival too many in a phase: the hardware raises an illegal instruction"


@dataclass(frozen=True)
class Fault:
    """Text of one of the sources replaced, and what the simulator may then complain of."""

    before: str
    after: str
    complaints: tuple[str, ...]


def build(
    name: str,
    folder: Path,
    defines: Iterable[tuple[str, int]],
    sources: Path = HOST,
    headers: Path = CUDA_DIR,
) -> Path:
    """``folder/name`` of ``sources/name.cpp`` and the kernels' ``headers``."""
    macros = [f"-D{macro}={value}" for macro, value in defines]
    command = ["g++", "-std=c++17", "-O1", "-w", f"-I{headers}", f"-I{sources}", *macros]
    binary = folder / name
    subprocess.run(
        [*command, "-o", binary, sources / f"{name}.cpp"], check=True, capture_output=True, timeout=120
    )
    return binary


def spoiled(fault: Fault, folder: Path) -> Path:
    """The kernels' sources, in ``folder``, with a fault in the one of them that has its text."""
    headers = folder / "cuda"
    shutil.copytree(CUDA_DIR, headers)
    [path] = [path for path in headers.iterdir() if fault.before in path.read_text()]
    path.write_text(path.read_text().replace(fault.before, fault.after))
    return headers


def play(simulator: Path, cases: int, seed: int = 1) -> str:
    """What it says of random cases."""
    played = subprocess.run([simulator, str(seed), str(cases)], capture_output=True, text=True, timeout=240)
    return played.stdout.strip()
