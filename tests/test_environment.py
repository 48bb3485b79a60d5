"""pyproject.toml, .ci/lock.txt and environment.yml say the same thing, and the lock leaves nothing open."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rattler import MatchSpec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What `make` installs, by machine, and so what the lock and environment.yml hold (peers is in neither).
EXTRAS = ("gpu", "toolchain", "dev")
# conda-forge's names where they differ from the wheels'.
CONDA_NAME = {
    "cupy-cuda13x": "cupy",
    "matplotlib": "matplotlib-base",
    "nvidia-cuda-cuobjdump": "cuda-cuobjdump",
    "nvidia-cuda-nvdisasm": "cuda-nvdisasm",
    "nvidia-cuda-nvrtc": "cuda-nvrtc",
    "nvidia-cuda-runtime": "cuda-cudart-dev",
    "torch": "pytorch",
}


def declared() -> dict[str, Requirement]:
    """Every requirement of pyproject.toml outside peers, by normalised name."""
    lines = PROJECT["dependencies"] + [
        line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]
    ]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        first = found.setdefault(name, requirement)
        assert first.specifier == requirement.specifier, (
            f"{name}: {first} in one place, {requirement} in another"
        )
    return found


def locked() -> dict[str, str]:
    """Exact version of each package in the lock, by normalised name."""
    pins = {}
    for line in (ROOT / ".ci" / "lock.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    return pins


def conda_specs() -> dict[str, SpecifierSet]:
    """Bounds of each conda line, as py-rattler reads it. A bare `13.0.*` means `==13.0.*`."""
    specs = {}
    for line in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        if isinstance(line, str):
            spec = MatchSpec(line, strict=True)
            bounds = str(spec.version or "")
            specs[line.split()[0]] = SpecifierSet(bounds if bounds[:1] in "<>=!~" else f"=={bounds}")
    return specs


def test_environment_yml_is_pyproject_in_conda_names() -> None:
    expected = {CONDA_NAME.get(name, name): req.specifier for name, req in declared().items()}
    expected |= {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}
    assert conda_specs() == expected
    pip_lines = [
        line["pip"]
        for line in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if isinstance(line, dict)
    ]
    assert pip_lines == [["-e ."]]


def test_lock_pins_every_requirement_within_its_bounds() -> None:
    pins = locked()
    for name, requirement in declared().items():
        assert name in pins, f"{name} is in pyproject.toml but not in .ci/lock.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement}, but the lock has {pins[name]}"


def test_lock_is_complete() -> None:
    """Nothing that an installed package asks for in turn is left open."""
    pins = locked()
    open_names, seen = set(), set()
    queue = [(name, frozenset(req.extras)) for name, req in declared().items()]
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in pins:
            open_names.add(name)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # belongs to another kind of machine
            continue
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                queue.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert not open_names
    assert len(seen) > len(declared())


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that make sets up")
def test_make_installed_the_locked_versions() -> None:
    pins = locked()
    installed = {canonicalize_name(dist.name): dist.version for dist in metadata.distributions()}
    del installed["mla-kernels"]
    # torch's CPU build has the local version +cpu
    assert {name: version.split("+")[0] for name, version in installed.items()} == {
        name: pins.get(name) for name in installed
    }
