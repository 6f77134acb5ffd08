"""The command line, one command a file."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from advkit.errors import UsageError
from advkit.version import __version__

EPILOG = """\
examples:
  advkit train --model mnist-cnn --data mnist-5k --out m.safetensors
  advkit attack --model m.safetensors --data mnist-5k --threat "linf(0.1)" --out run
  advkit list attacks

Documentation: docs/ in the source; each command has its own --help. Exit codes: 0 done, 1 a gate or check failed, 2 misuse or
stopped.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from advkit.cli import (
        attack,
        benchmark,
        certify,
        compare,
        crosscheck,
        detect,
        doctor,
        gan,
        listing,
        patch,
        profile,
        report,
        tradeoff,
        train,
        transfer,
        universal,
    )

    top = argparse.ArgumentParser(
        prog="advkit",
        description="How far an adversary can push a model, how sure that number is, and what it costs to do better.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"advkit {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        attack,
        certify,
        detect,
        benchmark,
        report,
        compare,
        doctor,
        crosscheck,
        profile,
        train,
        tradeoff,
        transfer,
        patch,
        universal,
        gan,
        listing,
    ):
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, or 2 with one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that a terminal cannot show should not end a run.
            stream.reconfigure(errors="replace")
    try:
        typed = sys.argv[1:] if argv is None else list(argv)
        arguments = parser().parse_args(typed, argparse.Namespace(typed=typed))
        code: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone; what is left to print has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        return _fail("stopped; what was finished and has an --out is kept, and the same command goes on")


def _fail(sentence: str) -> int:
    if sys.stderr is not None:
        print(f"advkit: {' '.join(sentence.split())}", file=sys.stderr)
    return 2
