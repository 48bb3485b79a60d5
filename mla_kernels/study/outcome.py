"""What became of a notebook, kept as JSON beside the executed notebook."""

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError


class Outcome(BaseModel, extra="forbid"):
    """`seconds` is wall time, `finished` UTC, `error` one line naming the cell, or None."""

    notebook: str
    title: str
    status: Literal["ok", "failed"]
    seconds: float
    finished: datetime
    parameters: dict[str, Any]
    fingerprint: str
    error: str | None = None


def read_outcome(path: Path) -> Outcome | None:
    """The outcome kept at `path`; None where there is none to be read, so that the notebook runs again."""
    try:
        return Outcome.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Keep `outcome` at `path`, whole or not at all."""
    partial = path.with_suffix(".tmp")
    partial.write_text(outcome.model_dump_json(indent=1) + "\n")
    partial.replace(path)
