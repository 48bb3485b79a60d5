"""Notebook parameters: what a notebook's `parameters` cell offers, and checking what is asked of it.

papermill itself only warns about a name that a notebook does not have.
"""

import argparse
import ast
from pathlib import Path
from typing import Any

import nbformat


class ParameterError(ValueError):
    """A parameter that no notebook has or of another type than its default; a notebook without any."""


def parse_setting(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` as (name, value); a VALUE that is no Python literal is a string.

    Raises argparse.ArgumentTypeError on anything else.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def defaults_of(notebook: Path) -> dict[str, Any]:
    """Name and default of each parameter: the assignments in the one cell tagged `parameters`.

    Raises ParameterError if there is not exactly one such cell, or a default is no literal.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook.name} has {len(tagged)} cells tagged parameters, needs one")
    defaults: dict[str, Any] = {}
    for statement in ast.parse(tagged[0].source).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError:
            raise ParameterError(f"{notebook.name}: the default of {name!r} must be a literal") from None
    return defaults


def _fits(value: Any, default: Any) -> bool:
    if default is None or type(value) is type(default):
        return True
    if isinstance(default, float):
        return type(value) is int
    return isinstance(default, list | tuple) and isinstance(value, list | tuple)


def assign(notebooks: list[Path], settings: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """For each notebook those of `settings` that it has.

    Raises ParameterError for a name that none of them has (a misspelling) or a value of another type than the
    default's (an int passes for a float, a tuple for a list).
    """
    known = {notebook: defaults_of(notebook) for notebook in notebooks}
    for name, value in settings.items():
        having = [notebook for notebook in notebooks if name in known[notebook]]
        if not having:
            offers = "; ".join(
                f"{notebook.stem}: {', '.join(known[notebook]) or 'none'}" for notebook in notebooks
            )
            raise ParameterError(f"no notebook has a parameter {name!r}. Known: {offers}")
        for notebook in having:
            default = known[notebook][name]
            if not _fits(value, default):
                raise ParameterError(
                    f"{notebook.stem}: {name}={value!r} is {type(value).__name__}, "
                    f"but the default {default!r} is {type(default).__name__}"
                )
    return {
        notebook: {name: value for name, value in settings.items() if name in known[notebook]}
        for notebook in notebooks
    }
