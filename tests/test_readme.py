"""README.md keeps its word: its commands work, and the files, targets and names that it mentions exist.

Every line of a ```bash block is a command: `make` is asked for a dry run, a `python -m` command that only
reads is run and any other asked for its --help. A command of no known kind fails: none is left unchecked.
"""

import ast
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = FENCE.sub("", README)
INLINE_CODE = sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PROSE)))
LINKS = sorted(set(re.findall(r"\]\(([^)\s]+)\)", PROSE)))
MADE_BY_MAKE = ("build", ".venv")
# They read records, need no GPU and end within seconds.
CHEAP = [["mla_kernels.study", "findings"], ["mla_kernels.measure", "list"], ["mla_kernels.measure", "check"]]


def blocks(language: str) -> list[str]:
    return [body for tag, body in FENCE.findall(README) if tag == language]


def commands() -> list[str]:
    """The lines of the bash blocks, continued lines joined, comments and prompts removed."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [shlex.join(command) for command in words if command]


def targets() -> set[str]:
    """What the Makefile can be asked for."""
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def succeeds(command: list[str], **variables: str) -> None:
    """Run `command` at the root as a shell would, not as part of the `make` that started the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{shlex.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"


def test_shows_the_two_commands() -> None:
    assert {"make reproduce", "make test"} <= set(commands())


@pytest.mark.parametrize("line", commands())
def test_command(line: str) -> None:
    words = shlex.split(line)
    variables = {}
    while (assignment := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])) and len(words) > 1:
        variables[assignment[1]] = assignment[2]
        words = words[1:]
    match words:
        case ["make", *rest]:
            # a target that is the name of a folder would be "up to date"
            assert {word for word in rest if "=" not in word} <= targets()
            succeeds(["make", "-n", *rest], **variables)
        case ["python" | "python3" | ".venv/bin/python", "-m", "pytest", *rest]:
            succeeds([sys.executable, "-m", "pytest", "--collect-only", "-q", *rest], **variables)
        case ["python" | "python3" | ".venv/bin/python", "-m", *rest]:
            asked = rest if rest[:2] in CHEAP else [*rest[:2], "--help"]
            succeeds([sys.executable, "-m", *asked], **variables)
        case ["bash", script] if (ROOT / script).is_file():
            succeeds(["bash", "-n", script])
        case ["git", "clone", _] | ["cd", _]:
            pass
        case _:
            pytest.fail(f"no check known for this command; add one to {Path(__file__).name}: {line}")


@pytest.mark.parametrize("source", blocks("python"), ids=lambda source: source.split("\n")[0])
def test_python_block_parses_and_its_imports_exist(source: str) -> None:
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


@pytest.mark.parametrize("link", [link for link in LINKS if "://" not in link])
def test_link(link: str) -> None:
    path, _, anchor = link.partition("#")
    assert not path or (ROOT / path).exists()
    if anchor and not path:
        headings = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs


@pytest.mark.parametrize("code", INLINE_CODE)
def test_inline_code(code: str) -> None:
    """Paths, make targets and names of the package exist. Other code is not judged.

    A path begins with a name at the root, or ends like a file of ours, from the root or the package.
    """
    first = code.split("/")[0]
    is_path = re.fullmatch(r"[^\s:]+/[^\s:]*", code) and first not in MADE_BY_MAKE
    ours = (ROOT / first).exists() or re.search(r"\.(py|ipynb|json|cuh?|md|yml|toml)$", code)
    if code.startswith("make "):
        assert code.split()[1] in targets()
    elif code.startswith("python -m "):
        assert importlib.util.find_spec(code.split()[2])
    elif is_path and ours and not code.startswith("/"):
        found = [path for base in (ROOT, ROOT / "mla_kernels") for path in base.glob(code.rstrip("/"))]
        assert found, f"{code} is in the README but not in the tree"
    elif re.fullmatch(r"mla_kernels(\.\w+)+", code):
        pkgutil.resolve_name(code)
