"""How the committed notebooks are written: prose first, short cells, small figures, findings at the end."""

import base64

import nbformat
import pytest

from mla_kernels.measure.provenance import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FIGURE_BYTES = 150 * 1024
CODE_LINES = 13  # with the blank lines that the formatter adds

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


@each_notebook
def test_starts_with_a_title_and_prose(path):
    first = cells_of(path)[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and len(first.source) > 300


@each_notebook
def test_cells_are_short(path):
    long = [
        (cell.id, len(cell.source.splitlines()))
        for cell in cells_of(path)
        if cell.cell_type == "code" and len(cell.source.splitlines()) > CODE_LINES
    ]
    assert long == []


@each_notebook
def test_figures_are_small(path):
    images = [
        base64.b64decode(output.data["image/png"])
        for cell in cells_of(path)
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert [len(image) for image in images if len(image) > FIGURE_BYTES] == []
    assert len(images) >= (0 if path.stem.startswith("00") else 5)


@each_notebook
def test_claims_are_asserted_and_findings_close_it(path):
    cells = cells_of(path)
    assert sum("assert " in cell.source for cell in cells if cell.cell_type == "code") >= 4
    tables = [cell for cell in cells if cell.cell_type == "code" and "findings(" in cell.source]
    assert tables and "| finding | value | unit |" in str(tables[-1].outputs)
    assert any("falsify" in cell.source for cell in cells if cell.cell_type == "markdown")
