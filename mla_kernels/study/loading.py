"""Records for the notebooks: replayed from ``data/``, or measured now on a Hopper GPU.

Environment: ``MLA_KERNELS_SOURCE`` (auto, live, replay) overrides what a notebook asks for;
``MLA_KERNELS_DATA`` names a folder to replay instead of ``data/``. Replaying imports no torch.
"""

from __future__ import annotations

import ast
import datetime
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from mla_kernels.device import hopper_available
from mla_kernels.measure.freshness import check_fresh
from mla_kernels.measure.provenance import ROOT, commit, data_folder, gpu_folder
from mla_kernels.measure.records import Record, RecordError, load_record, save_record

SOURCES = ("auto", "live", "replay")
SOURCE_VARIABLE = "MLA_KERNELS_SOURCE"
LIVE = ROOT / "build" / "live"
REUSE = datetime.timedelta(hours=1)  # so that the notebooks of one run measure an experiment once


def resolve_source(source: str = "auto") -> Literal["live", "replay"]:
    """What ``source`` means on this machine. Raises ValueError for a word that is none of ``SOURCES``."""
    wanted = os.environ.get(SOURCE_VARIABLE) or source
    if wanted not in SOURCES:
        name = SOURCE_VARIABLE if wanted != source else "source"
        raise ValueError(f"{name} is {wanted!r}, must be one of {', '.join(SOURCES)}")
    if wanted == "auto":
        return "live" if hopper_available() else "replay"
    return wanted


def load(experiment: str, source: str = "auto", gpu: str = "h200") -> Record:
    """The record of an experiment, checked; prints one line on what it is.

    ``source``: "replay" reads ``data/<gpu>/<experiment>.json``, or where that GPU has none another's, as the
    line says; "live" measures on this machine's GPU, or takes what the same commit measured within the hour;
    "auto" is live on a Hopper GPU, else replay.

    Raises RecordError, naming file and field, for a record that is missing, broken, of another schema or of
    other kernels than this tree's; DeviceUnavailable for "live" without a Hopper GPU.
    """
    how = resolve_source(source)
    path, record = _measure(experiment) if how == "live" else _replay(experiment, gpu)
    print(describe(record, how, path))
    return record


def load_recorded(experiments: Iterable[str], source: str = "auto", gpu: str = "h200") -> list[Record]:
    """``load`` of each experiment, but a line instead of an error for one that a replay has no record of yet.

    A record that is there and cannot be used still raises RecordError.
    """
    records = []
    for experiment in experiments:
        path = _record_path(experiment, gpu)
        if resolve_source(source) == "replay" and not path.exists():
            print(f"{experiment}: no record of {gpu} yet; `make record` on such a GPU makes it")
        else:
            records.append(load(experiment, source, gpu))
    return records


def load_all(gpu: str = "h200", data: Path | None = None) -> list[Record]:
    """Every record of one GPU under ``data``, and another's of each experiment that it has none of; checked,
    by name. Raises RecordError as ``load`` does."""
    folder = data or data_folder()
    names = {path.stem for path in folder.glob("*/*.json")}
    return [_checked(_record_path(name, gpu, folder)) for name in sorted(names)]


def _record_path(experiment: str, gpu: str, data: Path | None = None) -> Path:
    """The record of that GPU, else of the first other that has one, else where it would be."""
    folder = data or data_folder()
    own = folder / gpu / f"{experiment}.json"
    others = sorted(folder.glob(f"*/{experiment}.json"))
    return own if own.exists() or not others else others[0]


def describe(record: Record, how: str, path: Path) -> str:
    """One line: experiment, live or replay, device, date, commit, points."""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    run = record.run
    changed = " with uncommitted changes" if run.dirty else ""
    return (
        f"{record.experiment}: {how} of {len(record.points)} points on one {record.device.name}, "
        f"measured {run.utc:%Y-%m-%d} at commit {run.commit[:10]}{changed} ({shown})"
    )


def check_parameters(*known: str) -> None:
    """Raises NameError for a parameter, set from outside, that is not one of the notebook's ``known``.

    papermill injects parameters as a cell that begins "# Parameters", and only warns of a misspelled name.
    """
    from IPython import get_ipython

    shell = get_ipython()
    for cell in shell.user_ns["In"] if shell else []:
        if not cell.startswith("# Parameters\n"):
            continue
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in known:
                raise NameError(
                    f"parameter {node.id!r} is unknown to this notebook; it has {', '.join(known)}"
                )


def _checked(path: Path) -> Record:
    record = load_record(path)
    if record.experiment != path.stem:
        raise RecordError(path, "experiment", f"is {record.experiment!r}, the file's name says {path.stem!r}")
    check_fresh(record, path)
    return record


def _replay(experiment: str, gpu: str) -> tuple[Path, Record]:
    path = _record_path(experiment, gpu)
    return path, _checked(path)


def _measure(experiment: str) -> tuple[Path, Record]:
    import torch

    from mla_kernels.measure.experiments import EXPERIMENTS

    if experiment not in EXPERIMENTS:
        raise ValueError(f"no experiment {experiment!r} to measure; there are {', '.join(EXPERIMENTS)}")
    folder = gpu_folder(torch.cuda.get_device_name()) if torch.cuda.is_available() else "none"
    path = LIVE / folder / f"{experiment}.json"
    record = _kept(path)
    if record is None:
        record = EXPERIMENTS[experiment].run("live", _progress_line())
        save_record(record, path)
    return path, record


def _kept(path: Path) -> Record | None:
    """The live record of this commit, if it is not older than ``REUSE``."""
    try:
        record = _checked(path)
    except RecordError:
        return None
    young = datetime.datetime.now(datetime.UTC) - record.run.utc < REUSE
    return record if young and (record.run.commit, record.run.dirty) == commit() else None


def _progress_line() -> Callable[[str], None]:
    """Shows progress in a notebook as one line that is written over."""
    from IPython.display import TextDisplayObject, display

    class Line(TextDisplayObject):
        def __repr__(self) -> str:
            return self.data

    handle = display(Line("measuring"), display_id=True)
    return (lambda text: handle.update(Line(text))) if handle else print
