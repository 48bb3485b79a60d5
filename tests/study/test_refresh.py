"""Committed notebooks run again in place, by real kernels."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from mla_kernels.study.__main__ import main

KERNELSPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


def write(path: Path, source: str) -> bytes:
    notebook = new_notebook(metadata={"kernelspec": KERNELSPEC}, cells=[new_code_cell(source)])
    nbformat.write(notebook, path)
    return path.read_bytes()


def test_outputs_are_renewed_and_canonical(tmp_path: Path) -> None:
    path = tmp_path / "00_one.ipynb"
    write(path, "import os; print(os.environ['MLA_KERNELS_SOURCE'])")
    assert main(["refresh", f"--notebooks={tmp_path}"]) == 0
    first = path.read_bytes()
    (cell,) = nbformat.read(path, as_version=4).cells
    assert cell.outputs[0].text == "replay\n" and cell.execution_count == 1
    assert "execution" not in cell.metadata
    assert main(["refresh", f"--notebooks={tmp_path}"]) == 0
    assert path.read_bytes() == first, "a second run changes nothing"


def test_a_broken_notebook_stays_as_it_was(tmp_path: Path, capsys) -> None:
    write(tmp_path / "00_good.ipynb", "print(1)")
    broken = write(tmp_path / "01_broken.ipynb", "raise ValueError('no such record')")
    assert main(["refresh", f"--notebooks={tmp_path}"]) == 1
    assert (tmp_path / "01_broken.ipynb").read_bytes() == broken
    assert "01_broken.ipynb" in (said := capsys.readouterr().err) and "no such record" in said
