"""The command ``fisedit-compile``.

Each subcommand is a module of this package with a function ``add_parser(subparsers)``. Its parser sets ``run``, a
function that is called with the parsed arguments. Only ``run`` imports torch and diffusers, so that ``--help`` and a
mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence

from fisedit_compile import __version__
from fisedit_compile.cli import base, bench, blocks, edit, macs, quality, serve
from fisedit_compile.errors import FiseditError

PROGRAM = "fisedit-compile"
SUBCOMMANDS = (edit, base, serve, quality, bench, macs, blocks)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; ``run`` of the arguments that it parses is the function to call."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Edit pictures of a Stable Diffusion U-Net by new words, and recompute only what changes.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default that of the process.

    Returns:
        The exit status: 0; 2 if an argument, a file or a model cannot be used, with the reason on stderr; 130 after
        Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(given)
    args.command_line = shlex.join([PROGRAM, *given])
    try:
        with _log_on_stderr():
            args.run(args)
    except (FiseditError, ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the status that shells give to an interrupted command
    return 0


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the library logs, warnings and what takes long, goes to the terminal, apart from results on stdout."""
    logger, handler = logging.getLogger("fisedit_compile"), _AboveBars()
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _AboveBars(logging.Handler):
    """Writes lines to stderr, above the progress bars that pipelines show there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
