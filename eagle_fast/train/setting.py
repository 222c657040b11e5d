"""What training works with: the target, its texts' writer, and the sizes that fit the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from eagle_fast.head.config import default_feature_layers
from eagle_fast.prompts import encode_prompt
from eagle_fast.target import Target
from eagle_fast.target.anatomy import Anatomy
from eagle_fast.train.chat import chat_format, stop_ids
from eagle_fast.train.completer import Completer
from eagle_fast.train.openings import OPENINGS
from eagle_fast.train.options import TrainOptions
from eagle_fast.train.writer import Sources, Writer

MAX_ROWS = 2048
CACHE_SHARE = 0.4  # of the free memory, for the keys and values of texts being written


class Setting:
    """A target with its tokenizer, prepared for writing texts and for being learned from."""

    def __init__(self, model: PreTrainedModel, tokenizer, options: TrainOptions, prompts: Sequence[Any] = ()):
        if model.dtype == torch.float16:
            raise ValueError("gradients are too small for float16: load the model with dtype=bfloat16 or float32")
        self.model = model.eval()
        self.tokenizer, self.options = tokenizer, options
        self.target = Target(model, default_feature_layers(Anatomy(model).num_layers))
        self.chat = chat_format(tokenizer)
        self.stop_ids = stop_ids(model, self.chat)
        self.prompts, self.num_too_long = self._fitting([encode_prompt(tokenizer, prompt) for prompt in prompts])
        self.earlier_writings = 0  # of a run that is resumed, so that texts are not written again
        self._writer: Writer | None = None

    @property
    def device(self) -> torch.device:
        return self.target.device

    def _fitting(self, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
        """The prompts that leave room for an answer in a batch, and how many do not."""
        room = min(self.options.batch_tokens, self.target.max_positions or self.options.batch_tokens)
        kept = [prompt for prompt in prompts if 0 < len(prompt) <= room - self.options.max_answer]
        if prompts and not kept:
            raise ValueError(f"no prompt leaves room for an answer of {self.options.max_answer} tokens in {room}")
        return kept, len(prompts) - len(kept)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that a draft vocabulary always has."""
        return [*self.stop_ids, *self.tokenizer.all_special_ids]

    @property
    def writer(self) -> Writer:
        """Made on first use, and kept: texts under way go on when more are wanted."""
        if self._writer is None:
            options = self.options
            encode = self.tokenizer
            sources = Sources(
                self.chat,
                self.prompts,
                [encode(text, add_special_tokens=False).input_ids for text in OPENINGS],
                prompt_share=options.prompt_share,
                opening_share=options.opening_share,
                greedy_share=options.greedy_share,
                max_question=options.max_question,
                max_answer=options.max_answer,
            )
            rows = options.rows or self._rows(sources.max_prompt + sources.max_new)
            seed = 1_000_003 * options.seed + self.earlier_writings
            completer = Completer(self.target, rows, sources.max_prompt, sources.max_new, self.stop_ids, seed)
            self._writer = Writer(completer, sources, seed)
        return self._writer

    def _rows(self, length: int) -> int:
        """Texts to write side by side: what the GPU's memory holds, and few on a CPU."""
        if self.device.type != "cuda":
            return 32
        a_token = sum(shape.token_bytes for shape in self.target.layer_shapes)
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(16, min(MAX_ROWS, int(CACHE_SHARE * free / (a_token * (length + 64))) // 16 * 16))
