"""`eagle-fast chat`: a conversation in the terminal, or out of a pipe."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from eagle_fast.demo import hardware
from eagle_fast.loading_arguments import load_pair, name_of
from eagle_fast.model import EaModel
from eagle_fast.shell.answer import decode, summary
from eagle_fast.shell.conversation import Conversation
from eagle_fast.shell.screen import Screen
from eagle_fast.shell.settings import settings_of
from eagle_fast.shell.slash import Next, obey
from eagle_fast.text import TextStream, encode_chat


def run(args: argparse.Namespace) -> int:
    conversation, screen = Conversation(settings_of(args), args.system), Screen(args.colors)
    model = load_pair(args)
    encode_chat(model.tokenizer, "hello", **args.chat_template_kwargs)  # before anybody types
    if screen.is_interactive:
        screen.note(f"{name_of(args)} on {hardware(model.target.device)}; /help says what a line can do")
    while True:
        try:
            line = screen.ask()
        except KeyboardInterrupt:
            if not screen.is_interactive:
                raise
            screen.note("\n/quit or Ctrl-D leaves")
            continue
        if line is None:
            return 0
        try:
            said = obey(line.strip(), conversation, screen)
            if said is Next.QUIT:
                return 0
            if isinstance(said, str) and said:
                reply(model, conversation, said, screen, args.chat_template_kwargs)
        except ValueError as error:
            screen.warn(str(error))


def reply(model: EaModel, conversation: Conversation, said: str, screen: Screen, template: dict[str, Any]) -> None:
    """Answer what the user said, and keep both; nothing is kept where there is no answer.

    Ctrl-C ends the answer, which is kept as far as it went, or, out of a pipe, the program.
    """
    conversation.add("user", said)
    stream, statistics, failed = TextStream(model.tokenizer), None, ""
    try:
        prompt = encode_chat(model.tokenizer, conversation.prompt, **template)
        with_head, settings = not conversation.plain, conversation.settings
        with closing(decode(model, prompt, settings, with_head=with_head, reuse_cache=True)) as steps:
            with screen.busy("reading"):
                step = next(steps, None)
            while step is not None:
                statistics = step.statistics
                screen.round(stream, step)
                step = next(steps, None)
    except KeyboardInterrupt:
        if not screen.is_interactive:
            raise
        failed = "stopped"
    except (ValueError, RuntimeError, MemoryError) as error:  # what was asked for, NaN, or no memory
        failed = str(error)
    if stream.ids:
        screen.write(stream.rest() + "\n")
        conversation.add("assistant", stream.text)
    else:
        conversation.take_back()
    if failed:
        screen.warn(failed)
    if statistics is not None:
        conversation.count(statistics, len(prompt))
        screen.note(summary(statistics, len(prompt)))
