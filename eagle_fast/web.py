"""The page of `eagle-fast web`."""

from __future__ import annotations

import argparse
import html
import socket
import time
from collections.abc import Iterator
from typing import Any

from eagle_fast.commands.demo import PROMPT
from eagle_fast.loading_arguments import load_pair, name_of
from eagle_fast.model import EaModel
from eagle_fast.typewriter import Pieces

Messages = list[dict[str, str]]
STYLE = """
.eagle mark { background: #9fdcc4; color: #10241c; border-radius: 3px; padding: 0 1px; }
.dark .eagle mark { background: #1f6b52; color: #eafff6; }
footer { display: none !important; }
"""
TITLE = (
    "# eagle_fast\n"
    "<mark>Marked</mark> tokens were drafted by the head and accepted by the model; the others are its own."
)
EXAMPLES = (PROMPT, "What is the capital of France?", "Write a haiku about the sea.")


class Chat:
    """Answers messages with one model, as the page wants to show them."""

    def __init__(self, model: EaModel, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("--model: its tokenizer has no chat template, so there is nothing to chat with")
        self.model, self.tokenizer = model, tokenizer

    def answer(
        self, history: Messages, speculate: bool, temperature: float, max_new_tokens: float
    ) -> Iterator[tuple[str, str, str]]:
        """(the answer as HTML, as text, what it took so far) after each round. history ends with a question."""
        ids = self.tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        method = self.model.ea_generate if speculate else self.model.naive_generate
        length = ids.shape[1] + int(max_new_tokens)
        rounds = method(ids, temperature, max_new_tokens=int(max_new_tokens), max_length=length, reuse_cache=True)
        pieces, shown, counts, started = Pieces(self.tokenizer), "", list[int](), time.perf_counter()
        for sequences in rounds:
            new = sequences[0, ids.shape[1] :].tolist()
            shown += "".join(marked(text, drafted) for text, drafted in pieces.take(new))
            counts.append(len(new))
            yield f'<div class="eagle">{shown}</div>', pieces.text, took(counts, time.perf_counter() - started)


def marked(text: str, drafted: bool) -> str:
    """A piece of text as HTML, on one line of source: a blank line would end the block."""
    safe = html.escape(text).replace("\n", "<br>")
    return f"<mark>{safe}</mark>" if drafted and text.strip() else safe


def took(counts: list[int], seconds: float) -> str:
    """counts: tokens so far, after each round."""
    rounds, tokens = len(counts), counts[-1]
    drafted = tokens - rounds
    return (
        f"**{tokens / max(seconds, 1e-9):.1f} tokens/s**, {tokens} tokens in {rounds} rounds: "
        f"**{tokens / rounds:.2f} a round** (tau), {drafted} of them drafted and accepted "
        f"({100 * drafted / max(tokens, 1):.0f}\u00a0%)"
    )


def page(chat: Chat, name: str) -> Any:
    """The page, a gr.Blocks."""
    import gradio as gr

    def ask(question: str, shown: Messages, history: Messages, *settings: Any) -> Iterator[tuple]:
        if not question.strip():
            yield "", shown, history, ""
            return
        history = [*history, {"role": "user", "content": question}]
        shown = [*shown, {"role": "user", "content": question}]
        text, figures = "", ""
        try:
            for answer, text, figures in chat.answer(history, *settings):  # noqa: B007  # the last text is kept
                yield "", [*shown, {"role": "assistant", "content": answer}], history, figures
        except (ValueError, RuntimeError) as error:  # gradio shows no other ones
            raise gr.Error(str(error)) from error
        shown = [*shown, {"role": "assistant", "content": answer}]
        yield "", shown, [*history, {"role": "assistant", "content": text}], figures

    with gr.Blocks(title="eagle_fast", analytics_enabled=False) as blocks:
        gr.Markdown(f"{TITLE}\n\nModel: {name}", elem_classes="eagle")
        history = gr.State([])
        window = gr.Chatbot(height=420, sanitize_html=False, latex_delimiters=[], elem_id="chat", show_label=False)
        figures = gr.Markdown("", elem_id="figures")
        question = gr.Textbox(placeholder="Ask something", show_label=False, submit_btn=True, elem_id="question")
        with gr.Row():
            settings = [
                gr.Checkbox(True, label="speculation", elem_id="speculation"),
                gr.Slider(0, 1.5, 0, step=0.1, label="temperature"),
                gr.Slider(16, 1024, 200, step=8, label="most new tokens"),
            ]
        gr.Examples([[each] for each in EXAMPLES], question)
        question.submit(ask, [question, window, history, *settings], [question, window, history, figures])
        window.clear(lambda: ([], ""), None, [history, figures])
    return blocks


def run(args: argparse.Namespace) -> int:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'gradio>=6,<7'") from error
    check_address(args.host, args.port)
    model = load_pair(args)
    blocks = page(Chat(model, model.tokenizer), name_of(args))
    print(f"the page is at http://{args.host}:{args.port} until Ctrl+C", flush=True)
    launch(blocks, args.host, args.port)
    return 0


def check_address(host: str, port: int) -> None:
    """Before anything is loaded: whether a page can be served there. Raises ValueError."""
    if not 0 < port < 65536:
        raise ValueError(f"--port {port}: use a number from 1 to 65535")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        why = f"no page can be served at --host {host} --port {port} ({error.strerror})"
        raise ValueError(f"{why}: choose another one") from error


def launch(blocks: Any, host: str, port: int | None, **options: Any) -> None:
    """Serve the page, with fonts of the machine that shows it. port: None for one that is free."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(server_name=host, server_port=port, css=STYLE, theme=theme, quiet=True, **options)
