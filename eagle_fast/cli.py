"""The command `eagle-fast`.

Each subcommand is a module of `commands` with its help and `add_arguments(parser)`, and another one with
`run(arguments)`, which does it and returns the exit code.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version

# name -> (the module that does it, imported when it is to be done; what it does)
COMMANDS = {
    "chat": ("eagle_fast.shell.chat", "talk to a model in the terminal"),
    "generate": ("eagle_fast.shell.generate", "answers to prompts, as text or JSON lines; beside plain decoding"),
    "bench": ("eagle_fast.shell.bench", "the speed-up on this machine, against plain decoding and stock generate"),
    "attach": ("eagle_fast.attach", "a model's folder with a draft head, for transformers serve, lm-eval and others"),
    "demo": ("eagle_fast.demo", "a prompt with and without speculation and by stock generate, on a small real model"),
    "doctor": ("eagle_fast.doctor.command", "what this machine can do, measured, and where a model would go on it"),
    "train": ("eagle_fast.train.command", "train a draft head for any causal language model"),
    "web": ("eagle_fast.web", "a chat in the browser that marks accepted tokens; needs the extra web"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors that a user can mend end in one line and exit code 2, Ctrl-C in 130."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if sys.stdin is None:  # closed
        sys.stdin = io.StringIO()
    elif isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is told of by whoever reads it, in every locale
        sys.stdin.reconfigure(errors="surrogateescape")
    name = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        code = _usage(arguments) if name is None else _run(name, arguments[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as `eagle-fast generate ... | head -1` does
        _leave_stdout()
        return 141
    except OSError as error:  # a file, or stdout, that the system refuses
        print(f"eagle-fast{f' {name}' if name else ''}: {error}", file=sys.stderr)
        with suppress(OSError):
            sys.stdout.flush()
            return 2
        _leave_stdout()
        return 2
    except ValueError as error:
        print(f"eagle-fast {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(name: str, arguments: Sequence[str]) -> int:
    asked = import_module(f"eagle_fast.commands.{name}")
    parser = argparse.ArgumentParser(
        prog=f"eagle-fast {name}",
        description=asked.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asked.add_arguments(parser)
    given = parser.parse_args(arguments)
    return import_module(COMMANDS[name][0]).run(given)


def _leave_stdout() -> None:
    """For what Python still writes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(arguments: Sequence[str]) -> int:
    listed = "\n".join(f"  {name:<8} {what}" for name, (_, what) in COMMANDS.items())
    text = (
        f"usage: eagle-fast COMMAND ...\n\n{listed}\n\n"
        "eagle-fast COMMAND --help says more, with examples; eagle-fast --version names versions."
    )
    if arguments and arguments[0] in ("-h", "--help"):
        print(text)
        return 0
    if arguments and arguments[0] == "--version":
        below = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"eagle-fast {version('eagle-fast')} ({below}, Python {sys.version.split()[0]})")
        return 0
    wrong = f"eagle-fast: there is no command {arguments[0]!r}\n" if arguments else ""
    print(wrong + text, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
