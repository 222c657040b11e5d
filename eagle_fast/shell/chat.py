"""Talk to a model in the terminal, decoded with its draft head.

    eagle-fast chat                                      # a small model, made on the first run
    eagle-fast chat --model meta-llama/Llama-3.1-8B-Instruct --head yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
    eagle-fast chat --colors                             # what the head guessed right is green
    eagle-fast chat --temperature 0.7 --top-p 0.9 --system "Answer in one sentence."
    printf 'Name a bird.\\nAnother one.\\n' | eagle-fast chat > answers.txt

After each answer a line says how fast it came, how many tokens a round of the target brought (tau), and which share of
the drafts was right, by depth. Each turn goes on from what the turns before left in the cache. Ctrl-C stops an answer,
Ctrl-D leaves; /help lists what else a line can say: /set temperature 0.7, /retry, /undo, /colors, /plain and others.

Out of a pipe, every line is a turn. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from typing import Any

from eagle_fast.demo import hardware
from eagle_fast.loading_arguments import add_loading_arguments, load_pair, name_of
from eagle_fast.model import EaModel
from eagle_fast.shell.answer import decode, summary
from eagle_fast.shell.conversation import Conversation
from eagle_fast.shell.screen import Screen
from eagle_fast.shell.settings import add_sampling_arguments, settings_of
from eagle_fast.shell.slash import Next, obey
from eagle_fast.text import TextStream, encode_chat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--colors", action="store_true", help="show accepted drafts in green; /colors switches")
    add_template_argument(parser)
    add_sampling_arguments(parser, max_new_tokens=1024, seed=None)
    add_loading_arguments(parser)


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chat-template-kwargs", type=_object, default={}, metavar="JSON",
        help="""options of the model's chat template, as '{"enable_thinking": false}'""",
    )  # fmt: skip


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{text} is no JSON object")
    return found


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
