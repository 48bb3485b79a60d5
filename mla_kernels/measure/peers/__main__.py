"""Command line of the peers: ``python -m mla_kernels.measure.peers --help``."""

from __future__ import annotations

import argparse
import functools
import sys

from . import PEERS, PREFILL_PEERS, prepare
from .fetch import FetchError, fetch
from .interface import home


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mla_kernels.measure.peers", description="Fetch, list, compile what others built."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("fetch", help=f"download public wheels, unpack into {home()}")
    command.add_argument(
        "--everything", action="store_true", help="also packages that this Python has (for another machine)"
    )
    commands.add_parser("list", help="peers, where they come from, and why one cannot be used here")
    commands.add_parser("prepare", help="compile what is compiled at the first use (GPU; minutes)")
    arguments = parser.parse_args(argv)
    if arguments.command == "fetch":
        try:
            fetch(everything=arguments.everything, progress=functools.partial(print, flush=True))
        except (FetchError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: `make peers` takes it up again", file=sys.stderr)
            return 130
    elif arguments.command == "prepare":
        missing = [prepare(tuple(PEERS), (dtype,)) for dtype in ("bf16", "fp16")]
        return 1 if any(missing) else 0
    else:
        for name, peer in (PEERS | PREFILL_PEERS).items():
            print(f"{name:20} {peer.source}: {peer.available() or 'ready'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
