"""What a conversation looks like to a model: the tokens around a user's turn, from its own chat template."""

from __future__ import annotations

from typing import NamedTuple

from eagle_fast.decoding.validate import id_list
from eagle_fast.prompts import encode, render
from eagle_fast.target.anatomy import token_settings
from eagle_fast.target.ends import num_rows

PLACEHOLDER = "user-text-goes-here"


class ChatFormat(NamedTuple):
    """Tokens before and after the first user turn. A model without a chat template has no turns: `suffix` is None."""

    prefix: list[int]
    suffix: list[int] | None


def chat_format(tokenizer) -> ChatFormat:
    """The frame of a user's turn, up to where the answer begins."""
    if tokenizer.chat_template is None:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise ValueError("the tokenizer has neither a chat template nor a token to begin with: pass prompts")
        return ChatFormat([start], None)
    rendered = render(tokenizer, [{"role": "user", "content": PLACEHOLDER}])
    before, found, after = rendered.partition(PLACEHOLDER)
    if not found:
        raise ValueError("the tokenizer's chat template does not show the user's text: pass prompts")
    return ChatFormat(encode(tokenizer, before), encode(tokenizer, after))


def stop_ids(model, chat: ChatFormat) -> list[int]:
    """What ends a turn: the model's own end tokens, and the token that the template puts after a user's turn."""
    found: set[int] = set() if chat.suffix is None else {chat.suffix[0]}
    for setting in token_settings(model, "eos_token_id"):
        found |= set(id_list(setting))
    size = num_rows(model.get_output_embeddings())
    return sorted(token for token in found if 0 <= token < size)
