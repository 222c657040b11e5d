"""Text in, text out: the answer to a conversation, and text as its tokens arrive."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch

from eagle_fast.config import check_positive
from eagle_fast.messages import shown
from eagle_fast.prompts import Prompt, as_messages, check_messages, encode, render

OF_IDS = ("input_ids", "attention_mask", "log", "return_dict_in_generate")
UNFINISHED = "\ufffd"  # what tokenizers give for the first bytes of a character


class TextStream:
    """Text of tokens that arrive one by one; what does not end a whole character waits for the next.

    All pieces together are the text of all tokens. A few tokens before a new one are decoded along, since tokenizers
    write a token by what stands before it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = self.shown = 0  # of the tokens decoded along; of those whose text is not out yet

    def take(self, token: int) -> str:
        """The text that this token completes, "" where it completes none."""
        self.ids.append(token)
        before, text = self._decode(self.start, self.shown), self._decode(self.start)
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return text[len(before) :]

    @property
    def text(self) -> str:
        """Of all tokens so far."""
        return self._decode(0)

    def rest(self) -> str:
        """What still waits when there are no more tokens."""
        piece = self._decode(self.start)[len(self._decode(self.start, self.shown)) :]
        self.start, self.shown = self.shown, len(self.ids)
        return piece

    def _decode(self, start: int, end: int | None = None) -> str:
        return self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)


def encode_chat(tokenizer: Any, messages: Prompt, /, **template: Any) -> list[int]:
    """Token ids of a conversation up to where the answer begins. template: options of the tokenizer's chat template.

    Raises ValueError for what is no conversation, and for a tokenizer without a chat template.
    """
    if not isinstance(messages, str):
        check_messages(messages)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the tokenizer has no chat template, so this is no chat model: tokenize a text and call eagenerate, on the "
            "command line `eagle-fast generate`, which continues it as it stands"
        )
    return encode(tokenizer, render(tokenizer, as_messages(messages), **template))


class TextMixin:
    """The part of `EaModel` that takes and gives text."""

    tokenizer: Any
    eagenerate: Callable

    def chat(
        self,
        messages: Prompt,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        *,
        max_length: int | None = None,
        reuse_cache: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options,
    ) -> str:
        """The answer to a conversation, without special tokens.

            chat = [{"role": "user", "content": "Name three uses of a brick."}]
            chat.append({"role": "assistant", "content": model.chat(chat, temperature=0.7, seed=1)})

        messages: as transformers' apply_chat_template takes them, or a text, which is a user's one message.
        max_length: of prompt and answer together; None: as long as max_new_tokens makes it.
        reuse_cache: prefill only what the calls before have not, see `eagenerate`, whose the other options are.
        chat_template_kwargs: options of the tokenizer's chat template, such as {"enable_thinking": False}.
        Raises ValueError, besides those of `eagenerate`, for what is no conversation, and for a tokenizer without a
        chat template.
        """
        for name in OF_IDS:
            if name in options:
                raise TypeError(f"chat() takes no {name!r}, since it gives text: call eagenerate")
        if not isinstance(chat_template_kwargs, (dict, NoneType)):
            raise ValueError(f'chat_template_kwargs={shown(chat_template_kwargs)}: pass a dict, as {{"name": value}}')
        (max_new_tokens,) = check_positive(max_new_tokens=max_new_tokens)
        ids = torch.tensor([encode_chat(self.tokenizer, messages, **(chat_template_kwargs or {}))])
        length = ids.shape[1]
        out = self.eagenerate(
            ids,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            max_length=length + max_new_tokens if max_length is None else max_length,
            reuse_cache=reuse_cache,
            **options,
        )
        return self.tokenizer.decode(out[0, length:], skip_special_tokens=True)
