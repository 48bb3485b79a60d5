"""Loading: where a record comes from, and every way in which one is refused."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError

from mla_kernels.measure import experiments
from mla_kernels.measure.provenance import DATA_VARIABLE, ROOT, commit
from mla_kernels.measure.records import RecordError, save_record
from mla_kernels.study import loading
from mla_kernels.study.kernel import ThisInterpreter
from mla_kernels.study.loading import load, load_all, resolve_source


@pytest.fixture
def data(tmp_path, monkeypatch, roofline):
    """A data folder that holds one record, and is the one that is replayed."""
    save_record(roofline, tmp_path / "h200" / "roofline.json")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    monkeypatch.delenv(loading.SOURCE_VARIABLE, raising=False)
    return tmp_path


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_another_gpus_record_stands_in_and_says_so(data, roofline, capsys):
    device = roofline.device.model_copy(update={"name": "NVIDIA H100 80GB HBM3"})
    other = roofline.model_copy(update={"experiment": "paging", "device": device})
    save_record(other, data / "h100-80gb-hbm3" / "paging.json")
    save_record(roofline.model_copy(update={"device": device}), data / "h100-80gb-hbm3" / "roofline.json")
    assert load("paging", "replay") == other
    assert "NVIDIA H100" in capsys.readouterr().out
    assert load("roofline", "replay") == roofline  # its own comes first
    assert [record.device.name for record in load_all()] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    assert loading.load_recorded(["paging", "roofline"], "replay") == [other, roofline]


def test_replay_says_what_it_is(data, roofline, capsys):
    assert load("roofline", "replay") == roofline
    line = capsys.readouterr().out
    assert "roofline: replay" in line and "NVIDIA H200" in line
    assert "2026-01-01" in line and "0123456789" in line and line.count("\n") == 1


def test_a_record_of_uncommitted_changes_says_so(data, roofline, capsys):
    run = roofline.run.model_copy(update={"dirty": True})
    save_record(roofline.model_copy(update={"run": run}), data / "h200" / "roofline.json")
    load("roofline", "replay")
    assert "with uncommitted changes" in capsys.readouterr().out


def test_load_all_reads_one_gpu_and_what_it_has_none_of(data, roofline):
    assert load_all() == load_all("h100") == [roofline]
    assert load_all(data=data / "h200") == []


def test_a_notebook_may_go_on_without_what_is_not_recorded_yet(data, roofline, capsys):
    assert loading.load_recorded(["roofline", "bandwidth"], "replay") == [roofline]
    assert "bandwidth: no record of h200 yet" in capsys.readouterr().out


def test_but_not_with_a_record_that_cannot_be_used(data):
    (data / "h200" / "bandwidth.json").write_text("{")
    with pytest.raises(RecordError, match=r"bandwidth\.json"):
        loading.load_recorded(["roofline", "bandwidth"], "replay")


def stale(path):
    kernels = json.loads(path.read_text())["source"]["kernels"]
    kernels[1]["digest"] = "0" * 64
    edit(path, source={"kernels": kernels})


@pytest.mark.parametrize(
    "damage, field",
    [
        (Path.unlink, "(file)"),
        (lambda path: path.write_text(""), "(file)"),
        (lambda path: path.write_text(path.read_text()[: path.stat().st_size // 2]), "(file)"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "(file)"),
        (lambda path: edit(path, schema_version=99), "schema_version"),
        (lambda path: edit(path, surprise=1), "surprise"),
        (lambda path: edit(path, device={"name": "NVIDIA H200"}), "device.compute_capability"),
        (lambda path: edit(path, experiment="bandwidth"), "experiment"),
        (lambda path: edit(path, source={"kernels": []}), "source.kernels"),
        (stale, "source.kernels.1.digest"),
    ],
    ids=[
        "missing",
        "empty",
        "truncated",
        "binary",
        "foreign",
        "extra",
        "incomplete",
        "misnamed",
        "unsourced",
        "stale",
    ],
)
def test_what_cannot_be_used_names_file_and_field(data, damage, field):
    path = data / "h200" / "roofline.json"
    damage(path)
    with pytest.raises(RecordError) as refused:
        load("roofline", "replay")
    assert refused.value.path == path and refused.value.field == field
    assert str(path) in str(refused.value) and field in str(refused.value)


@pytest.mark.parametrize("asked", loading.SOURCES)
def test_the_environment_overrides(monkeypatch, asked):
    monkeypatch.setenv(loading.SOURCE_VARIABLE, "replay")
    assert resolve_source(asked) == "replay"
    monkeypatch.setenv(loading.SOURCE_VARIABLE, "live")
    assert resolve_source(asked) == "live"


@pytest.mark.parametrize("hopper, source", [(True, "live"), (False, "replay")])
def test_auto_is_live_on_a_hopper_gpu_alone(monkeypatch, hopper, source):
    monkeypatch.delenv(loading.SOURCE_VARIABLE, raising=False)
    monkeypatch.setattr(loading, "hopper_available", lambda: hopper)
    assert resolve_source() == resolve_source("auto") == source


def test_a_word_that_is_no_source(monkeypatch):
    monkeypatch.delenv(loading.SOURCE_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="source is 'lvie', must be one of auto, live, replay"):
        resolve_source("lvie")
    monkeypatch.setenv(loading.SOURCE_VARIABLE, "Replay")
    with pytest.raises(ValueError, match="MLA_KERNELS_SOURCE is 'Replay'"):
        resolve_source("auto")


def test_replay_and_findings_import_no_torch(data):
    code = (
        "import sys; from mla_kernels.study import bandwidth, findings, roofline, style; "
        "from mla_kernels.study.loading import load; findings.findings([load('roofline', 'replay')]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def live(monkeypatch, tmp_path, roofline):
    """Live measuring with an experiment that counts its runs."""
    revision, dirty = commit()
    now = datetime.datetime.now(datetime.UTC)
    ran = []

    def run(scope, progress):
        ran.append(scope)
        fields = {"commit": revision, "dirty": dirty, "utc": now - state.age}
        return roofline.model_copy(update={"run": roofline.run.model_copy(update=fields)})

    state = SimpleNamespace(ran=ran, age=datetime.timedelta(0), folder=tmp_path)
    monkeypatch.delenv(loading.SOURCE_VARIABLE, raising=False)
    monkeypatch.setattr(loading, "LIVE", tmp_path)
    monkeypatch.setitem(experiments.EXPERIMENTS, "roofline", SimpleNamespace(run=run))
    return state


def test_live_measures_once_for_the_notebooks_of_a_run(live, capsys):
    first, second = load("roofline", "live"), load("roofline", "live")
    assert live.ran == ["live"] and first == second
    assert "roofline: live" in capsys.readouterr().out
    assert len(list(live.folder.glob("*/roofline.json"))) == 1


def test_live_measures_again_after_an_hour(live):
    live.age = datetime.timedelta(hours=2)
    load("roofline", "live")
    load("roofline", "live")
    assert live.ran == ["live", "live"]


def test_live_measures_again_for_another_commit(live, monkeypatch):
    load("roofline", "live")
    monkeypatch.setattr(loading, "commit", lambda: ("f" * 40, False))
    load("roofline", "live")
    assert live.ran == ["live", "live"]


def test_live_replaces_a_broken_record(live):
    load("roofline", "live")
    (path,) = live.folder.glob("*/roofline.json")
    path.write_text("{")
    load("roofline", "live")
    assert live.ran == ["live", "live"] and json.loads(path.read_text())


def test_live_needs_an_experiment_of_that_name(live):
    with pytest.raises(ValueError, match="no experiment 'verification'"):
        load("verification", "live")


def test_a_misspelled_parameter_stops_the_notebook(tmp_path):
    """papermill itself only warns."""
    cell = nbformat.v4.new_code_cell('source = "auto"', metadata={"tags": ["parameters"]})
    check = "from mla_kernels.study.loading import check_parameters\ncheck_parameters('source')"
    notebook = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell(check)])
    notebook.metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(notebook, tmp_path / "in.ipynb")

    def execute(**parameters):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
            papermill.execute_notebook(
                tmp_path / "in.ipynb",
                tmp_path / "out.ipynb",
                parameters,
                kernel_manager_class=ThisInterpreter,
                progress_bar=False,
            )

    execute(source="replay")
    with pytest.raises(PapermillExecutionError, match="parameter 'sorce' is unknown to this notebook"):
        execute(sorce="replay")
