"""Run the committed notebooks again, in replay and in place: their outputs follow the records."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import yaml

from mla_kernels.measure.provenance import ROOT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument(
        "--notebooks", type=Path, default=ROOT / "notebooks", metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """0; an error in a notebook leaves that notebook and the rest as they were and returns 1."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    from .kernel import ThisInterpreter

    os.environ["MLA_KERNELS_SOURCE"] = "replay"
    for path in sorted(args.notebooks.glob("[0-9][0-9]_*.ipynb")):
        print(f"{path.name} ...", flush=True)
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook, kernel_manager_class=ThisInterpreter, record_timing=False, timeout=300
        )
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"error: {path.name} stopped, it is as it was:\n{error}", file=sys.stderr)
            return 1
        nbformat.write(notebook, path)
        make_canonical(path)
    return 0


def make_canonical(path: Path) -> None:
    """What the pre-commit hook does: outputs and counts stay, timings and versions go."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = (hook for repo in config["repos"] for hook in repo["hooks"])
    options = next(hook["args"] for hook in hooks if hook["id"] == "nbstripout")
    subprocess.run([sys.executable, "-m", "nbstripout", *options, str(path)], check=True)
