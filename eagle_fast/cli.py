"""The command `eagle-fast`.

Each subcommand is a module with `add_arguments(parser)` and `run(arguments)`, which returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# name -> (module, imported only when it is asked for; what it does)
COMMANDS = {
    "attach": ("eagle_fast.attach", "a model's folder with a draft head, for transformers serve, lm-eval and others"),
    "demo": ("eagle_fast.demo", "a prompt with and without speculation and by stock generate, on a small real model"),
    "doctor": ("eagle_fast.doctor.command", "what this machine can do, measured, and where a model would go on it"),
    "train": ("eagle_fast.train.command", "train a draft head for any causal language model"),
    "web": ("eagle_fast.web", "a chat in the browser that marks accepted tokens; needs the extra web"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; errors that a user can mend end in one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in COMMANDS:
        return _usage(arguments)
    name = arguments[0]
    module = import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"eagle-fast {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(arguments[1:]))
    except ValueError as error:
        print(f"eagle-fast {name}: {error}", file=sys.stderr)
        return 2


def _usage(arguments: Sequence[str]) -> int:
    listed = "\n".join(f"  {name:<8} {what}" for name, (_, what) in COMMANDS.items())
    text = f"usage: eagle-fast COMMAND ...\n\n{listed}\n\neagle-fast COMMAND --help says more."
    if arguments and arguments[0] in ("-h", "--help"):
        print(text)
        return 0
    wrong = f"eagle-fast: there is no command {arguments[0]!r}\n" if arguments else ""
    print(wrong + text, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
