"""What a line that begins with "/" does in a conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from enum import Enum, auto
from typing import NamedTuple

from eagle_fast.shell.answer import summary
from eagle_fast.shell.conversation import Conversation
from eagle_fast.shell.screen import Screen


class Next(Enum):
    """What happens after a line."""

    ASK, QUIT = auto(), auto()


class Command(NamedTuple):
    """run: called with the conversation, the screen and what stands behind the name. Returns a text to be answered,
    or what happens next."""

    argument: str
    meaning: str
    run: Callable[[Conversation, Screen, str], str | Next]


def obey(line: str, conversation: Conversation, screen: Screen) -> str | Next:
    """Do what a line asks for; what is no command is returned, to be answered. Raises ValueError."""
    if not line.startswith("/") or line.startswith("//"):
        return line.removeprefix("/") if line.startswith("//") else line
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        raise ValueError(f"there is no command /{name}: /help lists them; a message that begins with / has two")
    return COMMANDS[name].run(conversation, screen, rest.strip())


def _help(conversation: Conversation, screen: Screen, rest: str) -> Next:
    for name, command in COMMANDS.items():
        screen.note(f"  {f'/{name} {command.argument}':<20} {command.meaning}", "default")
    screen.note("Ctrl-C stops an answer, Ctrl-D leaves; a line that ends with \\ goes on in the next.", "default")
    return Next.ASK


def _reset(conversation: Conversation, screen: Screen, rest: str) -> Next:
    conversation.messages.clear()
    screen.note("a new conversation")
    return Next.ASK


def _undo(conversation: Conversation, screen: Screen, rest: str) -> Next:
    said = conversation.take_back()
    screen.note("there is nothing to take back" if said is None else f"taken back: {said}")
    return Next.ASK


def _retry(conversation: Conversation, screen: Screen, rest: str) -> str | Next:
    said = conversation.take_back()
    if said is None:
        raise ValueError("there is nothing to answer again")
    return said


def _system(conversation: Conversation, screen: Screen, rest: str) -> Next:
    conversation.system = rest or None
    screen.note(f"system: {rest}" if rest else "no system message")
    return Next.ASK


def _set(conversation: Conversation, screen: Screen, rest: str) -> Next:
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    if name:
        conversation.settings = conversation.settings.changed(name.replace("-", "_"), value.strip())
    screen.note(", ".join(f"{name}={value}" for name, value in asdict(conversation.settings).items()))
    return Next.ASK


def _colors(conversation: Conversation, screen: Screen, rest: str) -> Next:
    screen.colors = not screen.colors
    screen.note("accepted drafts are green" if screen.colors else "no colours")
    return Next.ASK


def _plain(conversation: Conversation, screen: Screen, rest: str) -> Next:
    conversation.plain = not conversation.plain
    screen.note("decoding without the head" if conversation.plain else "decoding with the head")
    return Next.ASK


def _stats(conversation: Conversation, screen: Screen, rest: str) -> Next:
    known = summary(conversation.total, conversation.prompt_tokens)
    screen.note(f"all answers: {known}" if conversation.total.rounds else "no answer yet")
    return Next.ASK


def _history(conversation: Conversation, screen: Screen, rest: str) -> Next:
    for message in conversation.prompt:
        screen.note(f"{message['role']}: {message['content']}", "default")
    return Next.ASK


def _save(conversation: Conversation, screen: Screen, rest: str) -> Next:
    if not rest:
        raise ValueError("/save FILE: name a file, as chat.jsonl")
    conversation.save(rest)
    screen.note(f"added to {rest}; `eagle-fast generate --file {rest}` answers its last question")
    return Next.ASK


COMMANDS = {
    "help": Command("", "this list", _help),
    "reset": Command("", "begin a new conversation", _reset),
    "undo": Command("", "take back the last question and its answer", _undo),
    "retry": Command("", "answer the last question again", _retry),
    "system": Command("TEXT", "the system message; without a text, none", _system),
    "set": Command("[NAME VALUE]", "temperature, top_p, top_k, min_p, seed, max_new_tokens; alone, show them", _set),
    "colors": Command("", "accepted drafts in colour, on or off", _colors),
    "plain": Command("", "decode without the head, or with it again", _plain),
    "stats": Command("", "tokens, speed and acceptance of all answers", _stats),
    "history": Command("", "show the conversation", _history),
    "save": Command("FILE", "append the conversation to a .jsonl file", _save),
    "quit": Command("", "leave", lambda conversation, screen, rest: Next.QUIT),
}
