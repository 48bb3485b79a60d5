"""Run every notebook, keep what each left behind, and close with a report.

build/notebooks/NAME.ipynb   the executed notebook
build/notebooks/NAME.json    its Outcome
build/report/index.html      the report

A notebook is skipped while nothing that it depends on has changed since it last succeeded (`fingerprint`).
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat

from mla_kernels import device
from mla_kernels.measure.provenance import DATA_VARIABLE, ROOT, data_folder
from mla_kernels.study.outcome import Outcome, read_outcome, write_outcome
from mla_kernels.study.parameters import ParameterError, assign, parse_setting
from mla_kernels.study.report import write_report

PACKAGE = ROOT / "mla_kernels"


def find_notebooks(directory: Path, only: Iterable[str] = ()) -> list[Path]:
    """The NN_*.ipynb of `directory` in order, or those named in `only` (with or without .ipynb).

    Raises FileNotFoundError where there is none, or one is asked for that is not there.
    """
    found = {path.stem: path for path in sorted(directory.glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        raise FileNotFoundError(
            f"no notebook NN_topic.ipynb in {directory}; run from a checkout or give --notebooks"
        )
    wanted = [name.removesuffix(".ipynb") for name in only] or list(found)
    for name in wanted:
        if name not in found:
            raise FileNotFoundError(f"no notebook {name!r} in {directory}; there are: {', '.join(found)}")
    return [found[name] for name in found if name in wanted]


def fingerprint(notebook: Path, parameters: dict[str, Any], data: Path) -> str:
    """sha256 over all that an outcome depends on.

    That is the notebook's cells without outputs, its parameters, the package's sources, the records, the
    versions of what is installed, the variables that steer the package, and the GPU of a live run.
    """
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            raw = part.encode() if isinstance(part, str) else part
            digest.update(len(raw).to_bytes(8, "little") + raw)

    for cell in nbformat.read(notebook, as_version=4).cells:
        add(cell.cell_type, cell.source, json.dumps(cell.metadata.get("tags", [])))
    sources = (path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".cu", ".cuh"})
    for path in [*sorted(sources), *sorted(data.rglob("*.json"))]:
        add(str(path.relative_to(data if path.is_relative_to(data) else PACKAGE)), path.read_bytes())
    add(json.dumps(parameters, sort_keys=True), sys.version)
    add(*sorted(f"{dist.name}=={dist.version}" for dist in importlib.metadata.distributions()))
    add(*sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("MLA_KERNELS_")))
    add(device.describe() if device.hopper_available() else "replay")
    return digest.hexdigest()


def execute(notebook: Path, parameters: dict[str, Any], output: Path) -> str | None:
    """Run `notebook` in a fresh kernel, in its own directory; one line on its error, or None.

    `output` is replaced only at the end, so an interruption leaves the last complete run.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from mla_kernels.study.kernel import ThisInterpreter

    partial = output.with_name(f"{output.stem}.partial.ipynb")
    error = None
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters=parameters,
            cwd=notebook.parent,
            kernel_manager_class=ThisInterpreter,
            progress_bar={"leave": False, "desc": output.stem} if sys.stderr.isatty() else False,
        )
    except PapermillExecutionError as failure:
        error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # the kernel died or never started: the next notebook has its own
        error = f"{type(failure).__name__}: {failure}"
    except KeyboardInterrupt:
        partial.unlink(missing_ok=True)
        raise
    if partial.exists():
        partial.replace(output)
    return error and " ".join(error.split())


def title_of(notebook: Path) -> str:
    """The first heading of a notebook, or its file name."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            if line.startswith("# "):
                return line[2:].strip()
    return notebook.stem


def run_one(notebook: Path, parameters: dict[str, Any], mark: str, output: Path) -> Outcome:
    """Execute `notebook` into `output` and keep its Outcome, with fingerprint `mark`, beside it."""
    kept = output.with_suffix(".json")
    kept.unlink(missing_ok=True)
    start = time.monotonic()
    error = execute(notebook, parameters, output)
    outcome = Outcome(
        notebook=notebook.stem,
        title=title_of(notebook),
        status="failed" if error else "ok",
        seconds=time.monotonic() - start,
        finished=datetime.now(UTC),
        parameters=parameters,
        fingerprint=mark,
        error=error,
    )
    write_outcome(kept, outcome)
    return outcome


def reproduce(
    notebooks: list[Path], settings: dict[str, Any], *, data: Path, build: Path, force: bool = False
) -> list[str]:
    """Run `notebooks` with `settings`, print a line on each, and write the report; the failures, a line each.

    A failing notebook does not stop the others. KeyboardInterrupt passes through, after the report on what is
    finished. Raises ParameterError before anything runs if a setting fits no notebook.
    """
    parameters = assign(notebooks, settings)
    executed = build / "notebooks"
    executed.mkdir(parents=True, exist_ok=True)
    failures = []
    try:
        for number, notebook in enumerate(notebooks, start=1):
            print(f"[{number}/{len(notebooks)}] {notebook.stem:24s} ", end="", flush=True)
            output = executed / notebook.name
            mark = fingerprint(notebook, parameters[notebook], data)
            last = read_outcome(output.with_suffix(".json"))
            if last and last.status == "ok" and last.fingerprint == mark and output.exists() and not force:
                print(f"unchanged since {last.finished:%Y-%m-%d %H:%M} UTC (--force runs it again)")
                continue
            outcome = run_one(notebook, parameters[notebook], mark, output)
            print(f"{outcome.status:6s} {outcome.seconds:6.1f} s  {outcome.error or ''}".rstrip(), flush=True)
            if outcome.error:
                failures.append(f"{notebook.stem}: {outcome.error}")
    finally:
        every = find_notebooks(notebooks[0].parent)
        finished = [last for path in every if (last := read_outcome(executed / f"{path.stem}.json"))]
        index, problem = write_report(finished, executed, build / "report")
        print(f"report: {index}")
    return failures + ([problem] if problem else [])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `reproduce`."""
    parser.description = "Run every notebook and write build/report/index.html."
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NOTEBOOK", help="these alone, e.g. 00_start_here"
    )
    parser.add_argument(
        "-p",
        dest="settings",
        action="append",
        default=[],
        type=parse_setting,
        metavar="NAME=VALUE",
        help="set a notebook parameter; goes to each notebook that has it",
    )
    parser.add_argument(
        "--source",
        choices=["auto", "live", "replay"],
        help="the same as -p source=...: measure now, or use data/",
    )
    parser.add_argument("--force", action="store_true", help="run unchanged notebooks too")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="where they are")
    parser.add_argument("--data", type=Path, default=data_folder(), help="the records they replay")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where results go")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if a notebook failed, 2 if the command line is wrong, 130 after Ctrl-C."""
    settings = dict(args.settings) | ({"source": args.source} if args.source else {})
    data = args.data.resolve()
    os.environ[DATA_VARIABLE] = str(data)  # where the notebooks' kernels and the report read
    try:
        if not data.is_dir():
            raise FileNotFoundError(f"there is no folder {data}; check --data")
        notebooks = find_notebooks(args.notebooks.resolve(), args.only)
        failures = reproduce(notebooks, settings, data=data, build=args.build.resolve(), force=args.force)
    except (FileNotFoundError, ParameterError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; finished notebooks are kept, and the next run goes on from there", file=sys.stderr
        )
        return 130
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0
