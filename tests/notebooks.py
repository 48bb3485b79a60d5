"""Every committed notebook: run again as replay and compared output by output, and kept in canonical form."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "notebooks").glob("**/[!.]*.ipynb")
    if ".ipynb_checkpoints" not in path.parts  # what JupyterLab leaves, ignored by git
)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    """The code cells that are not empty."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
    assert [path for path in NOTEBOOKS if not path.name[:2].isdigit() or path.name[2] != "_"] == []


@each_notebook
def test_every_cell_was_run_in_order_without_error(path: Path) -> None:
    """nbval passes over a cell that has no execution count, without a word."""
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    errors = [out.ename for cell in cells for out in cell.outputs if out.output_type == "error"]
    assert errors == []


@each_notebook
def test_has_one_parameters_cell_with_source(path: Path) -> None:
    tags = [tag for cell in code_cells(path) for tag in cell.metadata.get("tags", [])]
    assert tags.count("parameters") == 1
    assert "injected-parameters" not in tags
    (parameters,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert 'source = "auto"' in parameters.source


@each_notebook
def test_is_canonical(path: Path, tmp_path: Path) -> None:
    """What the pre-commit hook would write is what is committed."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (hook,) = [hook for repo in config["repos"] for hook in repo["hooks"] if hook["id"] == "nbstripout"]
    copy = Path(shutil.copy(path, tmp_path))
    subprocess.run([sys.executable, "-m", "nbstripout", *hook["args"], str(copy)], check=True)
    assert copy.read_text() == path.read_text(), f"not canonical; mend it: pre-commit run --files {path.name}"
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@each_notebook
def test_replay_gives_the_committed_outputs(path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"MLA_KERNELS_SOURCE": "replay"}
    done = subprocess.run(
        [*command, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{path.name}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert f"{len(code_cells(path))} passed" in done.stdout.splitlines()[-1]
