"""`eagle-fast chat` in a terminal, keys sent and screen read, and out of a pipe."""

import json
import os
import re
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from shell_pairs import COMMAND, ENVIRONMENT, eagle_fast, write_pair
from terminal import CTRL_C, CTRL_D, Terminal
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle_fast.shell.chat import ROOM, warm_up
from eagle_fast.shell.screen import Screen

NEW = 24
LONG = 30_000  # tokens: minutes
SUMMARY = r"(\d+) tokens, [\d.]+ tokens/s, tau ([\d.]+), drafts right by depth [\d ]+ %"
REUSED = SUMMARY + r", (\d+) of (\d+) prompt tokens from the cache\n"
GREEN = "\x1b[32m"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("endless"), stops=False)


@pytest.fixture(scope="module")
def expected(pair):
    """The answer of transformers alone to a conversation."""
    tokenizer, model = AutoTokenizer.from_pretrained(pair[1]), AutoModelForCausalLM.from_pretrained(pair[1])

    def answer(*turns, new=NEW):
        chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def open_chat(pair, *options):
    return Terminal([*COMMAND, "chat", *pair, *options], **ENVIRONMENT)


def ask(chat, text, until):
    """Send a line; what the screen shows behind its echo, in lines."""
    chat.wait_for("> ")
    chat.line(text)
    shown = chat.wait_for(until)
    return shown.partition("\n")[2].splitlines()


def test_a_conversation_in_a_terminal(pair, expected):
    first = expected("w5 w17 w40")
    with open_chat(pair, "--max-new-tokens", str(NEW)) as chat:
        assert "/help" in chat.wait_for(r"on \w+ CPU.*\n")
        answer, *_, summary = ask(chat, "w5 w17 w40", SUMMARY + r"\n")
        assert answer == first
        assert "from the cache" not in summary
        assert float(re.search(SUMMARY, summary)[2]) > 1.5
        answer, *_, summary = ask(chat, "w7", REUSED)
        assert answer == expected("w5 w17 w40", first, "w7")
        reused, length = map(int, re.search(REUSED, summary + "\n").group(3, 4))
        assert NEW < reused < length
        ask(chat, "/undo", "taken back: w7")
        assert ask(chat, "w7", REUSED)[0] == answer
        assert ask(chat, "/retry", REUSED)[0] == answer
        ask(chat, "/reset", "a new conversation")
        assert ask(chat, "w5 w17 w40", SUMMARY)[0] == first
        assert GREEN not in chat.raw
        chat.wait_for("> ")
        chat.send(CTRL_D)
        assert chat.end() == 0


def test_commands(pair, expected, tmp_path):
    file = tmp_path / "kept.jsonl"
    with open_chat(pair, "--max-new-tokens", str(NEW), "--system", "w9") as chat:
        listed = "\n".join(ask(chat, "/help", "Ctrl-C stops an answer"))
        assert all(
            f"/{name}" in listed for name in ("reset", "undo", "retry", "set", "colors", "plain", "save", "quit")
        )
        ask(chat, "/system", "no system message")
        ask(chat, "/nonsense", "there is no command /nonsense: /help lists them")
        ask(chat, "/retry", "there is nothing to answer again")
        ask(chat, "/set temperature -1", "temperature=-1.0: use 0")
        ask(chat, "/set top_k many", "top_k is a whole number, not 'many'")
        ask(chat, "/set max_new_tokens 5", "temperature=0.0, .*max_new_tokens=5")
        assert ask(chat, "w5 w17 w40", SUMMARY)[0] == expected("w5 w17 w40", new=5)
        ask(chat, "/set max-new-tokens 24", "max_new_tokens=24")
        ask(chat, "/plain", "decoding without the head")
        summary = ask(chat, "/retry", r"\d+ tokens, [\d.]+ tokens/s.*\n")
        assert summary[0] == expected("w5 w17 w40")
        assert "tau" not in summary[-1]
        ask(chat, "/plain", "decoding with the head")
        ask(chat, "/stats", "all answers: 29 tokens")
        ask(chat, "/history", "user: w5 w17 w40")
        ask(chat, f"/save {file}", "added to")
        ask(chat, "/quit", "")
        assert chat.end() == 0
    (line,) = file.read_text().splitlines()
    assert [each["role"] for each in json.loads(line)["messages"]] == ["user", "assistant"]


def test_accepted_drafts_are_green_when_asked_for(pair, expected):
    with open_chat(pair, "--max-new-tokens", str(NEW)) as chat:
        ask(chat, "/colors", "accepted drafts are green")
        begun = len(chat.raw)
        answer = ask(chat, "w5 w17 w40", SUMMARY)[0]
        assert answer == expected("w5 w17 w40")
        words = re.findall(r"\x1b\[32m *(w\d+)", chat.raw[begun:])
        assert NEW / 3 < len(words) < NEW, "those of the target itself are not"
        ask(chat, "/colors", "no colours")
        begun = len(chat.raw)
        ask(chat, "/retry", SUMMARY)
        assert GREEN not in chat.raw[begun:]


def test_ctrl_c_stops_the_answer_and_not_the_program(endless):
    with open_chat(endless, "--max-new-tokens", str(LONG)) as chat:
        chat.wait_for("> ")
        chat.line("w5 w17 w40")
        chat.wait_for(r"(w\d+ ){40}")
        chat.send(CTRL_C)
        stopped = chat.wait_for("stopped\n" + SUMMARY)
        count = int(re.search(SUMMARY, stopped)[1])
        assert 40 <= count < LONG
        ask(chat, "/set max_new_tokens 8", "max_new_tokens=8")
        summary = ask(chat, "w7", REUSED)[-1]  # what was stopped is part of the conversation, and of the cache
        assert int(re.search(REUSED, summary + "\n")[3]) >= count
        chat.wait_for("> ")
        chat.send("half a line")
        chat.wait_for("half a line")
        time.sleep(0.5)  # as long as a hand takes: Python's input() misses a signal that comes while it handles a key
        chat.send(CTRL_C)
        chat.wait_for("/quit or Ctrl-D leaves")
        ask(chat, "w8", REUSED)
        chat.wait_for("> ")
        chat.send(CTRL_D)
        assert chat.end() == 0


def test_ctrl_c_ends_a_command_that_only_answers(endless):
    with Terminal([*COMMAND, "generate", "w5 w17", *endless, "--max-new-tokens", str(LONG)], **ENVIRONMENT) as command:
        command.wait_for(r"(w\d+ ){20}")
        command.send(CTRL_C)
        assert command.end() == 130
    assert "Traceback" not in command.screen


def test_an_error_leaves_the_conversation_as_it_was(pair, expected):
    with open_chat(pair, "--max-new-tokens", str(NEW)) as chat:
        ask(chat, "/set max_new_tokens 4000000000000", "max_new_tokens=4000000000000")
        ask(chat, "w3", "max_new_tokens")
        ask(chat, f"/set max_new_tokens {NEW}", f"max_new_tokens={NEW}")
        assert ask(chat, "w5 w17 w40", SUMMARY)[0] == expected("w5 w17 w40")


def test_a_line_goes_on_behind_a_backslash_and_slashes_can_be_said(pair, expected):
    with open_chat(pair, "--max-new-tokens", str(NEW)) as chat:
        chat.wait_for("> ")
        chat.line("w5 w17\\")
        chat.wait_for("… ")
        chat.line("w40")
        assert expected("w5 w17\nw40") in chat.wait_for(SUMMARY)
        ask(chat, "//set", SUMMARY)
        ask(chat, "/history", "user: /set")


def test_out_of_a_pipe_every_line_is_a_turn(pair, expected):
    first = expected("w5 w17 w40")
    done = eagle_fast("chat", *pair, "--max-new-tokens", NEW, "--colors", stdin="w5 w17 w40\n\nw7\n/undo\nw8")
    assert done.returncode == 0, done.stderr
    second, third = (expected("w5 w17 w40", first, each) for each in ("w7", "w8"))
    assert done.stdout.splitlines() == [first, second, third]
    assert "\x1b" not in done.stdout + done.stderr
    assert len(re.findall(SUMMARY, done.stderr)) == 3
    assert "Loading" not in done.stderr


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as Python reads stdin in most locales, and in C
def test_a_turn_that_is_no_text_does_not_end_the_conversation(pair, expected, errors):
    command = [*COMMAND, "chat", *pair, "--max-new-tokens", str(NEW)]
    environment = os.environ | ENVIRONMENT | {"PYTHONIOENCODING": f"utf-8:{errors}"}
    done = subprocess.run(command, input=b"w5 \xff\nw7\n", capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"the text is no UTF-8" in done.stderr
    assert done.stdout.decode().splitlines() == [expected("w7")]


def test_warming_up_on_a_gpu(capsys):
    """Before the first question; what cannot be is said, and Ctrl-C skips it."""
    asked = []
    model = SimpleNamespace(target=SimpleNamespace(device=torch.device("cuda"), max_positions=None))
    model.warmup = lambda max_length: asked.append(max_length)
    warm_up(model, 1024, Screen())
    warm_up(model, 8192, Screen())
    model.target.max_positions = 1024
    warm_up(model, 1024, Screen())
    assert asked == [ROOM, 2 * 8192, 1024]
    for error in (KeyboardInterrupt(), ValueError("no room")):

        def fail(max_length, error=error):
            raise error

        model.warmup = fail
        warm_up(model, 1024, Screen())
    assert capsys.readouterr().err == "not warmed up: no room\n"
    model.target.device = torch.device("cpu")  # where there is nothing to capture, and a round may take long
    warm_up(model, 1024, Screen())
    assert not capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused_before_anybody_types(tmp_path):
    done = eagle_fast("chat", *write_pair(tmp_path, chat=False))
    assert done.returncode == 2
    assert "no chat template" in done.stderr
