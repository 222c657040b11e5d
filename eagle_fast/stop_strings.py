"""Texts that end a sequence, as transformers looks for them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, StopStringCriteria

from eagle_fast.messages import shown


def check_stop_strings(strings: Any) -> None:
    """ValueError for what is no text, nor a list of them."""
    several = isinstance(strings, (list, tuple)) and len(strings) > 0
    if not all(isinstance(each, str) and each for each in (strings if several else [strings])):
        raise ValueError(f"stop_strings={shown(strings)}: pass a text or a list of texts, none of them empty")


def stop_criterion(tokenizer: Any, strings: Any, name: str = "stop_strings") -> StopStringCriteria:
    """Ends a text behind one of these. name: of the argument that they were given as. Raises ValueError."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is {shown(tokenizer)}: pass the target's tokenizer, for {name}")
    try:
        return StopStringCriteria(tokenizer, strings)
    except Exception as error:  # transformers tries out how the tokenizer joins its tokens
        raise ValueError(
            f"{name}={shown(strings)}: transformers cannot tell how {type(tokenizer).__name__} of this model joins its "
            f"tokens ({type(error).__name__}: {error}); leave {name} out"
        ) from error
