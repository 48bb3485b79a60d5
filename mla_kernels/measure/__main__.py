"""Command line of the measurements: ``python -m mla_kernels.measure --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mla_kernels.choice import VARIABLE

from . import candidates
from .experiments import EXPERIMENTS
from .freshness import problems, record_files
from .provenance import DATA, ROOT, UnknownCommit, data_folder, gpu_folder
from .records import Record, RecordError, load_record, save_record

UNFINISHED = ".unfinished"  # ending of a record in the making; a whole one ends in .json


class _Stopped(Exception):
    """Nothing more is measured; the exit status."""


def record(arguments: argparse.Namespace) -> int:
    """Measure experiments and write each one's record as it ends."""
    try:
        for name in arguments.experiment or EXPERIMENTS:
            _record(name, arguments)
    except _Stopped as stopped:
        return stopped.args[0]
    return 0


def _record(name: str, arguments: argparse.Namespace) -> tuple[Record, Path]:
    from mla_kernels.device import DeviceUnavailable

    def place(result: Record) -> Path:
        full = arguments.scope == "full"
        home = DATA if full else ROOT / "build" / "records"  # data/ holds whole records only
        return (arguments.out or home / gpu_folder(result.device.name)) / f"{result.experiment}.json"

    unfinished: list[Path] = []

    def keep(result: Record) -> None:
        path = place(result)
        unfinished[:] = [path.with_name(path.name + UNFINISHED)]
        save_record(result, unfinished[0])

    try:
        result = EXPERIMENTS[name].run(
            arguments.scope,
            lambda line: print(line, file=sys.stderr, flush=True),
            limit_seconds=arguments.limit_seconds,
            keep=keep,
        )
    except (DeviceUnavailable, UnknownCommit) as error:
        print(f"error: {error}", file=sys.stderr)
        raise _Stopped(1) from error
    except KeyboardInterrupt:
        print(f"interrupted: the record of {name} is as it was", file=sys.stderr)
        for path in unfinished:
            print(f"what was measured until then is in {path}", file=sys.stderr)
        raise _Stopped(130) from None
    path = place(result)
    save_record(result, path)
    path.with_name(path.name + UNFINISHED).unlink(missing_ok=True)
    failed = [point for point in result.points if point.status == "failed"]
    print(f"{path}: {len(result.points)} points, {len(failed)} failed")
    return result, path


def tune(arguments: argparse.Namespace) -> int:
    """Measure variants of the kernels, write the record with the best table for this GPU, and print it."""
    try:
        result, path = _record("tuning", arguments)
    except _Stopped as stopped:
        return stopped.args[0]
    print("\n".join(candidates.summary(result)))
    print(f"to use this table: export {VARIABLE}={path}")
    return 0


def list_records(arguments: argparse.Namespace) -> int:
    """Name the experiments and the records there are."""
    for name, experiment in EXPERIMENTS.items():
        print(f"{name:12} {experiment.__doc__.splitlines()[0]}")
    paths = record_files(arguments.data)
    if not paths:
        print(f"no records yet under {arguments.data}")
    for path in paths:
        try:
            found = load_record(path)
        except RecordError as error:
            print(f"{path}: unusable ({error.field}: {error.found})")
            continue
        dirty = " with changes" if found.run.dirty else ""
        print(
            f"{path}: {found.device.name}, {found.run.utc:%Y-%m-%d}, commit {found.run.commit[:10]}{dirty}, "
            f"{len(found.points)} points"
        )
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Exit 1, naming file and field, where a record breaks the schema or is of other sources than these."""
    found = problems(arguments.data)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if not found:
        print(f"{arguments.data}: {len(record_files(arguments.data))} records are valid and fresh")
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mla_kernels.measure", description="Measure, tune, list, check."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument(
        "--out", type=Path, metavar="DIR", help="default: data/<gpu>; live: build/records/<gpu>"
    )
    measuring.add_argument(
        "--scope",
        choices=("full", "live", "whole"),
        default="full",
        help="live: what notebooks run; whole: of prefill, all 2,400 configurations (hours)",
    )
    measuring.add_argument(
        "--limit-seconds",
        type=float,
        metavar="N",
        help="leave out what would begin later; the record says so",
    )

    command = commands.add_parser(
        "record", help="measure on this machine's GPU", description=record.__doc__, parents=[measuring]
    )
    command.add_argument(
        "experiment", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}; all"
    )
    command.set_defaults(run=record)

    command = commands.add_parser(
        "tune",
        help="find the best table for this machine's GPU",
        description=tune.__doc__,
        parents=[measuring],
    )
    command.set_defaults(run=tune)

    command = commands.add_parser("list", help="experiments and records", description=list_records.__doc__)
    command.add_argument(
        "--data", type=Path, default=data_folder(), metavar="DIR", help="default: %(default)s"
    )
    command.set_defaults(run=list_records)

    command = commands.add_parser(
        "check", help="schema and freshness of the records", description=check.__doc__
    )
    command.add_argument(
        "--data", type=Path, default=data_folder(), metavar="DIR", help="default: %(default)s"
    )
    command.set_defaults(run=check)

    arguments = parser.parse_args(argv)
    if unknown := sorted(set(getattr(arguments, "experiment", [])) - set(EXPERIMENTS)):
        parser.error(f"unknown experiment {', '.join(unknown)}; choose from {', '.join(EXPERIMENTS)}")
    if getattr(arguments, "scope", None) == "whole" and arguments.experiment != ["prefill"]:
        parser.error("scope whole is of the experiment prefill alone")
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
