"""What the study can do. Each command is a module of its own with add_arguments(parser) and run(args)."""

import argparse
import importlib
import sys

DESCRIPTION = "Run the notebooks, derive the findings, keep both up to date with the records."
COMMANDS = {
    "reproduce": "run every notebook and write the report",
    "findings": "derive every finding from the records",
    "refresh": "run the committed notebooks again in replay, in place",
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch to the command's module; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m mla_kernels.study", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in argv[:1]:  # the others stay unimported
            try:
                module = importlib.import_module(f"mla_kernels.study.{name}")
            except ModuleNotFoundError as missing:
                if missing.name is None or missing.name.startswith("mla_kernels"):
                    raise
                parser.error(
                    f"{missing.name} is not installed for {sys.executable}; `pip install -e .` adds it"
                )
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
