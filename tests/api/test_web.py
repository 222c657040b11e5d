"""The page: what it shows of an answer, and a chat in a headless browser where there is one."""

import argparse
import html
import re
import shutil
import socket
import sys

import pytest
import torch
from chatty import make_tokenizer
from decoders import decoder

from eagle_fast import web
from eagle_fast.commands.web import add_arguments

QUESTION = "w5 w17 w33 w90 w64"


@pytest.fixture(scope="module")
def chat():
    return web.Chat(decoder("llama", torch.device("cpu")), make_tokenizer())


def asked(chat, speculate, **changes):
    settings = {"temperature": 0.0, "max_new_tokens": 24} | changes
    return list(chat.answer([{"role": "user", "content": QUESTION}], speculate, **settings))


def test_marks_and_figures(chat):
    steps = asked(chat, True)
    shown, text, figures = steps[-1]
    assert html.unescape(re.sub(r"<[^>]+>", "", shown)) == text
    rounds, tokens = len(steps), len(text.split())
    # a round's last token is the target's own
    assert sum(len(mark.split()) for mark in re.findall("<mark>(.*?)</mark>", shown)) == tokens - rounds > 0
    assert f"{tokens} tokens in {rounds} rounds: **{tokens / rounds:.2f} a round**" in figures
    assert "\n" not in shown, "a blank line would end the block of HTML"


def test_without_speculation_nothing_is_marked_and_the_text_is_the_same(chat):
    plain, fast = asked(chat, False), asked(chat, True)
    assert plain[-1][1] == fast[-1][1]
    assert len(plain) > len(fast)
    assert not any("<mark>" in shown for shown, _, _ in plain)


def test_text_is_no_markup():
    assert web.marked("<b>&\n\n", False) == "&lt;b&gt;&amp;<br><br>"
    assert web.marked("<b>", True) == "<mark>&lt;b&gt;</mark>"


def test_what_cannot_be_chatted_with_is_said(chat):
    with pytest.raises(ValueError, match="no chat template"):
        web.Chat(chat.model, make_tokenizer(chat=False))


def test_half_a_pair_is_refused():
    pytest.importorskip("gradio", minversion="6")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match="--model needs a draft head: name it with --head"):
        web.run(parser.parse_args(["--model", "somewhere"]))


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", None, "--port .* in use.*choose another one"),
        ("127.0.0.1", 99999, "--port 99999: use a number from 1"),
        ("no.such.host.invalid", 7860, "--host no.such.host.invalid .*choose another one"),
    ],
)
def test_an_address_that_cannot_be_served_is_refused_before_anything_is_loaded(host, port, message, monkeypatch):
    pytest.importorskip("gradio", minversion="6")
    monkeypatch.setattr(web, "load_pair", lambda args: pytest.fail("loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        args = argparse.Namespace(host=host, port=other.getsockname()[1] if port is None else port)
        with pytest.raises(ValueError, match=message):
            web.run(args)


def test_without_gradio_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="pip install 'gradio"):
        web.run(argparse.Namespace())


def test_a_chat_in_a_browser(chat):
    """Two turns and the switch, in headless Chromium."""
    pytest.importorskip("gradio", minversion="6")
    browsers = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    blocks = web.page(chat, "tiny")
    web.launch(blocks, "127.0.0.1", None, prevent_thread_lock=True)
    try:
        with browsers.sync_playwright() as playwright:
            try:
                browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            except browsers.Error as error:
                pytest.skip(f"no browser: {error}"[:200])
            window = browser.new_page()
            window.goto(blocks.local_url)
            box = window.locator("#question textarea")
            box.fill(QUESTION)
            box.press("Enter")
            window.wait_for_selector("#chat mark", timeout=60_000)
            browsers.expect(window.locator("#figures")).to_contain_text("200 tokens in", timeout=60_000)
            window.wait_for_timeout(1000)  # while a call ends, the page takes no other
            window.locator("#speculation input").uncheck()
            marks = window.locator("#chat mark").count()
            box.fill(QUESTION)
            box.press("Enter")
            browsers.expect(window.locator("#chat .eagle")).to_have_count(2, timeout=60_000)
            browsers.expect(window.locator("#figures")).to_contain_text("1.00 a round", timeout=60_000)
            assert window.locator("#chat mark").count() == marks, "the second answer has none"
            browser.close()
    finally:
        blocks.close()
