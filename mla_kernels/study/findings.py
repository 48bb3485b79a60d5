"""Every finding of the project, derived from records: README, notebooks and report take theirs from here."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypedDict

import pandas as pd

from mla_kernels.measure.provenance import data_folder, gpu_folder
from mla_kernels.measure.records import Record, RecordError

from .definitions import DEFINITIONS
from .loading import load_all
from .tables import significant, to_markdown

GPU = "h200"
BEGIN, END = "<!-- findings -->", "<!-- /findings -->"


class Finding(TypedDict):
    """``target``: "≥ 0.94", "≤ 8" or empty; ``record``: "h200/roofline"; ``point``: where in it."""

    key: str
    value: float
    unit: str
    target: str
    record: str
    point: str


def findings(records: Iterable[Record] | None = None) -> list[Finding]:
    """Every finding that ``records`` allow, by default those under ``data/``, an H200's first.

    A key that nothing recorded gives is absent. Raises RecordError for a record that cannot be used.
    """
    records = load_all() if records is None else list(records)
    found = []
    for definition in DEFINITIONS:
        candidates = []
        for record in records:
            if not definition.reads(record):
                continue
            source = f"{gpu_folder(record.device.name)}/{record.experiment}"
            try:
                candidates += [(value, source, where) for value, where in definition.derive(record)]
            except LookupError:  # a ceiling or a block that was not measured
                continue
        if candidates:
            value, source, where = definition.choose(candidates, key=lambda candidate: candidate[0])
            found.append(
                Finding(
                    key=definition.key,
                    value=value,
                    unit=definition.unit,
                    target=definition.target,
                    record=source,
                    point=where,
                )
            )
    return found


def is_met(finding: Finding) -> bool | None:
    """Whether the value meets its target; None where there is no target."""
    if not finding["target"]:
        return None
    relation, limit = finding["target"].split()
    return finding["value"] >= float(limit) if relation == "≥" else finding["value"] <= float(limit)


def table(found: Iterable[Finding], *patterns: str) -> pd.DataFrame:
    """Findings as readers see them; those whose key matches one of ``patterns`` (all without any)."""
    rows = [
        {
            "finding": finding["key"],
            "value": significant(finding["value"]),
            "unit": finding["unit"],
            "target": finding["target"],
            "met": {None: "", True: "yes", False: "no"}[is_met(finding)],
            "where": finding["point"],
        }
        for finding in found
        if not patterns or any(fnmatchcase(finding["key"], pattern) for pattern in patterns)
    ]
    return pd.DataFrame(rows, columns=["finding", "value", "unit", "target", "met", "where"])


def markdown(records: list[Record]) -> str:
    """The table of all findings, and a line on each record: device, date, commit."""
    if not records:
        return "Nothing is recorded yet."
    lines = [
        f"- `{record.experiment}`: one {record.device.name}, {record.run.utc:%Y-%m-%d}, "
        f"commit {record.run.commit[:10]}" + (" with uncommitted changes" if record.run.dirty else "")
        for record in records
    ]
    shown = table(findings(records))
    shown["finding"] = "`" + shown["finding"] + "`"
    return to_markdown(shown) + "\n\n" + "\n".join(lines)


def replace_between_markers(text: str, body: str) -> str:
    """``text`` with ``body`` between its markers. Raises ValueError where they are not there once."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the markers {BEGIN} and {END} must be there once")
    return pattern.sub(lambda _: f"{BEGIN}\n{body}\n{END}", text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `findings`."""
    parser.description = "Derive every finding from the records and print them."
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects")
    form.add_argument("--markdown", action="store_true", help="the table of README.md")
    form.add_argument("--update", type=Path, metavar="FILE", help="write that table between FILE's markers")
    parser.add_argument(
        "--data", type=Path, default=data_folder(), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--gpu", help=f"folder of DIR (default: {GPU}, which may be empty)")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, 1 naming file and field of a record that cannot be used, 2 for a missing folder."""
    gpu = args.gpu or GPU
    folder = args.data / gpu
    asked_for = folder if args.gpu else args.data
    if not asked_for.is_dir():
        print(f"error: there is no folder {asked_for}; check --data and --gpu", file=sys.stderr)
        return 2
    try:
        records = load_all(gpu, args.data)
        found = findings(records)
    except RecordError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    elif args.markdown:
        print(markdown(records))
    elif args.update:
        try:
            updated = replace_between_markers(args.update.read_text(), markdown(records))
        except (OSError, ValueError) as problem:
            print(f"error: {args.update}: {problem}", file=sys.stderr)
            return 1
        args.update.write_text(updated)
    elif found:
        print(table(found).to_string(index=False))
    elif records:
        print(f"{len(records)} records under {folder} give no finding")
    else:
        print(f"no records under {folder}")
    return 0
