"""The demo: three decodings of one prompt, what is printed of them, and colours on a terminal only."""

import argparse
import io
import re

import pytest
import torch
from chatty import make_tokenizer
from decoders import decoder, rebuilt

from eagle_fast import demo
from eagle_fast.cli import main
from eagle_fast.commands.demo import add_arguments
from eagle_fast.typewriter import DRAFTED, PLAIN, Typewriter


class Words:
    """A tokenizer whose token n is the word n of a list."""

    words = ("one ", "two ", "three ", "four ", "five ", "\ufffd", "sechs ")

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.words[each] for each in ids)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def arguments(**changes):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([])
    vars(args).update(max_new_tokens=12, device_map="cpu", **changes)
    return args


@pytest.fixture
def small(monkeypatch):
    """The demo with a model of the zoo in place of SmolLM2."""

    def use(model):
        model.tokenizer = make_tokenizer()
        monkeypatch.setattr(demo, "load_pair", lambda args: model)

    return use


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_three_texts_and_how_they_compare(small, capsys, temperature):
    small(rebuilt(decoder("llama", torch.device("cpu"))))
    assert demo.run(arguments(temperature=temperature)) == 0
    out = capsys.readouterr().out
    assert re.search(r"^same text +yes$", out, re.MULTILINE)
    compared = re.findall(r"all (\d+) token ids compared, one by one: equal", out)
    assert len(compared) == (1 if temperature else 2)
    for title in ("with EAGLE", "without the head", "stock generate"):
        assert title in out
    assert "\033" not in out, "colours are for terminals"
    tau = re.search(r"tokens per round \(tau\) +([\d.]+) +1.00 +1.00", out)
    assert tau
    assert float(tau[1]) > 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [(["--temperature", "-1"], "temperature=-1"), (["--max-new-tokens", "0"], "max_new_tokens=0"),
     (["--seed", "-1"], "seed=-1"), (["a\udcff"], "the prompt is no UTF-8")],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_loaded(change, reason, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_pair", lambda args: pytest.fail("loaded"))
    assert main(["demo", *change]) == 2
    assert f"eagle-fast demo: {reason}" in capsys.readouterr().err


def test_a_text_that_is_not_the_same_is_said_to_be(small, capsys):
    """In float32 another text of the stock model fails the demo."""
    model = rebuilt(decoder("llama", torch.device("cpu")))
    stock = model.base_model.generate

    def one_token_off(*args, streamer, **options):
        class Off:
            count = 0

            def put(self, value):
                self.count += 1
                streamer.put(value if self.count != 5 else value + 1)

            def end(self):
                streamer.end()

        return stock(*args, streamer=Off(), **options)

    model.base_model.generate = one_token_off
    small(model)
    assert demo.run(arguments()) == 1
    out = capsys.readouterr().out
    assert not re.search(r"^same text +yes$", out, re.MULTILINE)
    assert "differ from number 4 on" in out


def typed(rounds, out, **options):
    typewriter = Typewriter(Words(), out, **options)
    for ids in rounds:
        typewriter.show(ids)
    typewriter.end()
    return out.getvalue()


def test_drafted_tokens_are_coloured(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    text = typed([[0], [0, 1, 2, 3], [0, 1, 2, 3, 4]], Terminal())
    marked = "".join(re.findall(re.escape(DRAFTED) + "(.+?)" + re.escape(PLAIN), text))
    assert marked == "twothree", "of a round all but the last token"
    assert re.sub(r"\033\[\d+m", "", text) == "one two three four five \n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in typed([[0], [0, 1, 2]], Terminal())


def test_half_a_character_waits():
    assert typed([[0], [0, 5]], io.StringIO()) == "one \n"


def test_lines_break_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    lines = typed([[0, 1], [0, 1, 2, 3, 4]], Terminal(), coloured=False).splitlines()
    assert [line.strip() for line in lines] == ["one two", "three four", "five"]
