"""The notebook runner, on small notebooks of its own in real kernels."""

import json
import os
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mla_kernels.measure.provenance import DATA_VARIABLE
from mla_kernels.measure.records import Record, save_record
from mla_kernels.study.__main__ import main
from mla_kernels.study.findings import findings, table
from mla_kernels.study.outcome import read_outcome
from mla_kernels.study.reproduce import fingerprint

# Appends to runs.txt in its working directory, so that a test can count executions.
COUNT = "with open('runs.txt', 'a') as log:\n    log.write('{name}\\n')"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty study in which the user's kernelspec `python3` is one that cannot start."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "broken"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "elsewhere"))  # --data must win; restored at the end
    for name in ("notebooks", "data", "elsewhere"):
        (tmp_path / name).mkdir()
    return tmp_path


def write_notebook(
    study: Path, name: str, *cells: str, parameters: str | None = 'source = "auto"\nrounds = 15'
) -> Path:
    """notebooks/NAME.ipynb: a heading with a formula, the parameters, the counting cell, then `cells`."""
    notebook = new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    notebook.cells = [new_markdown_cell(f"# Title of {name}\n\nBound $\\frac{{a}}{{b}}$.")]
    if parameters is not None:
        notebook.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [new_code_cell(source) for source in (COUNT.format(name=name), *cells)]
    path = study / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def arguments(study: Path, *more: str) -> list[str]:
    return [
        "reproduce",
        *(f"--{name}={study / name}" for name in ("notebooks", "data", "build")),
        *more,
    ]


def runs(study: Path) -> list[str]:
    log = study / "notebooks" / "runs.txt"
    return log.read_text().split() if log.exists() else []


def printed(study: Path, name: str) -> str:
    """All that the cells of an executed notebook printed."""
    cells = nbformat.read(study / "build" / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def test_runs_in_this_interpreter_with_parameters_and_reports(study: Path, tmp_path: Path) -> None:
    write_notebook(study, "00_first", "import sys, os; print(sys.executable, source, rounds, os.getcwd())")
    write_notebook(study, "01_second", "print(source)", parameters='source = "auto"')
    assert main(arguments(study, "-p", "rounds=3", "--source=replay")) == 0
    assert printed(study, "00_first").split() == [sys.executable, "replay", "3", str(study / "notebooks")]
    assert printed(study, "01_second").split() == ["replay"]
    outcome = read_outcome(study / "build" / "notebooks" / "00_first.json")
    assert outcome and outcome.status == "ok" and outcome.parameters == {"rounds": 3, "source": "replay"}
    assert 0 < outcome.seconds < 120
    index = (study / "build" / "report" / "index.html").read_text()
    assert "Title of 00_first" in index and 'href="01_second.html"' in index and 'class="failed"' not in index
    page = (study / "build" / "report" / "00_first.html").read_text()
    assert "<mfrac>" in page and str(study / "notebooks") in page
    assert "<script src" not in page and "cdnjs" not in page


def test_goes_on_after_a_failure_and_names_cell_and_error(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(study, "00_breaks", "raise ValueError('record roofline.json: field b')")
    write_notebook(study, "01_dies", "import os; os._exit(3)")
    write_notebook(study, "02_works")
    assert main(arguments(study)) == 1
    errors = capsys.readouterr().err
    assert "FAILED 00_breaks: cell 3: ValueError: record roofline.json: field b" in errors
    assert "FAILED 01_dies: DeadKernelError" in errors and "02_works" not in errors
    assert runs(study) == ["00_breaks", "01_dies", "02_works"]
    index = (study / "build" / "report" / "index.html").read_text()
    assert index.count('class="failed"') == 2 and index.count('class="ok"') == 1
    assert "ValueError" in (study / "build" / "report" / "00_breaks.html").read_text()
    main(arguments(study))  # failures are run again, the success is not
    assert runs(study)[3:] == ["00_breaks", "01_dies"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("sourc=replay", ["'sourc'", "00_first: source, rounds"]),
        ("rounds=many", ["rounds='many'", "15"]),
        ("source=3", ["source=3", "'auto'"]),
    ],
)
def test_wrong_parameter_stops_before_anything_runs(
    study: Path, capsys: pytest.CaptureFixture[str], setting: str, says: list[str]
) -> None:
    write_notebook(study, "00_first")
    assert main(arguments(study, "-p", setting)) == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in says), errors
    assert not runs(study)


def test_notebook_without_parameters_cell_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_notebook(study, "00_first", parameters=None)
    assert main(arguments(study)) == 2
    assert "00_first.ipynb has 0 cells tagged parameters" in capsys.readouterr().err


def test_unknown_notebook_names_those_there_are(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_notebook(study, "00_first")
    assert main(arguments(study, "--only", "00_frist")) == 2
    assert "'00_frist'" in (errors := capsys.readouterr().err) and "there are: 00_first" in errors


def test_resumes(study: Path) -> None:
    first = write_notebook(study, "00_first")
    write_notebook(study, "01_second")
    assert main(arguments(study)) == 0
    assert main(arguments(study)) == 0
    assert runs(study) == ["00_first", "01_second"]
    write_notebook(study, "00_first", "print('edited')")
    assert main(arguments(study)) == 0
    assert runs(study)[2:] == ["00_first"]
    (study / "build" / "notebooks" / "01_second.json").write_text('{"notebook": "01_sec')  # cut short
    assert main(arguments(study)) == 0
    assert runs(study)[3:] == ["01_second"]
    assert main(arguments(study, "--force", "--only", first.name)) == 0
    assert runs(study)[4:] == ["00_first"]
    index = (study / "build" / "report" / "index.html").read_text()
    assert "Title of 01_second" in index  # the report covers what earlier runs finished


def test_fingerprint_follows_what_a_run_depends_on(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = write_notebook(study, "00_first"), study / "data"
    seen = [fingerprint(path, {}, data)]

    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="earlier output\n")]
    notebook.cells[-1].execution_count = 7
    nbformat.write(notebook, path)
    assert fingerprint(path, {}, data) == seen[0]

    seen.append(fingerprint(path, {"rounds": 3}, data))
    (data / "h200").mkdir()
    (data / "h200" / "roofline.json").write_text("{}")
    seen.append(fingerprint(path, {}, data))
    (data / "h200" / "roofline.json").write_text("{ }")
    seen.append(fingerprint(path, {}, data))
    monkeypatch.setenv("MLA_KERNELS_SOURCE", "a run of another kind")
    seen.append(fingerprint(path, {}, data))
    notebook.cells[-1].source += "\n"
    nbformat.write(notebook, path)
    seen.append(fingerprint(path, {}, data))
    assert len(set(seen)) == len(seen)


def test_interrupt_keeps_what_is_finished(study: Path) -> None:
    write_notebook(study, "00_first")
    write_notebook(study, "01_slow", "import time; time.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-m", "mla_kernels.study", *arguments(study)],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # "&" ignores it
    )
    for _ in range(600):
        if runs(study) == ["00_first", "01_slow"]:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors, errors
    assert sorted(path.name for path in (study / "build" / "notebooks").iterdir()) == [
        "00_first.ipynb",
        "00_first.json",
    ]
    assert "Title of 00_first" in (study / "build" / "report" / "index.html").read_text()


def test_a_bad_record_fails_the_run_but_not_the_report(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a record that comes between two runs makes the notebook run again."""
    write_notebook(study, "00_first")
    assert main(arguments(study)) == main(arguments(study)) == 0
    assert runs(study) == ["00_first"]
    (study / "data" / "h200").mkdir()
    (study / "data" / "h200" / "roofline.json").write_text('{"schema_version": 9}')
    assert main(arguments(study)) == 1
    assert runs(study) == ["00_first", "00_first"]
    errors = capsys.readouterr().err
    assert "FAILED findings: RecordError" in errors and "roofline.json: schema_version" in errors
    index = (study / "build" / "report" / "index.html").read_text()
    assert "Title of 00_first" in index and "roofline.json: schema_version" in index


def test_notebooks_and_report_read_the_folder_given(study: Path, bandwidth: Record) -> None:
    save_record(bandwidth, study / "data" / "h200" / "bandwidth.json")
    replay = "from mla_kernels.study.loading import load\nload('bandwidth', source)"
    write_notebook(study, "00_first", replay)
    assert main(arguments(study, "--source=replay")) == 0
    assert "bandwidth: replay" in printed(study, "00_first")
    index = (study / "build" / "report" / "index.html").read_text()
    shown = table(findings([bandwidth]))
    assert len(shown)
    for row in shown.itertuples(index=False):
        cells = "\n".join(f"      <td>{escape(cell, quote=False)}</td>" for cell in row)
        assert cells in index


def test_without_data_the_environment_names_the_folder(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(study / "data"))
    (study / "data" / "h200").mkdir()
    (study / "data" / "h200" / "roofline.json").write_text("")
    write_notebook(study, "00_first")
    without = [argument for argument in arguments(study) if not argument.startswith("--data")]
    assert main(without) == 1
    assert f"{study}/data/h200/roofline.json: (file): is empty" in capsys.readouterr().err


def test_a_data_folder_that_is_not_there(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_notebook(study, "00_first")
    assert main(arguments(study, f"--data={study / 'dta'}")) == 2
    assert f"no folder {study / 'dta'}" in capsys.readouterr().err and not runs(study)
