"""`generate` of a stock model whose folder was written by `eagle-fast attach`: transformers' custom_generate hook.

The folder's custom_generate/generate.py holds `generate = hook("eagle_head")`; `from_pretrained(...,
trust_remote_code=True)` of transformers puts it in the place of the model's own `generate`. What the head is of no use
for, such as beam search, is decoded as without it, with a warning that says why.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import GenerationMixin, PreTrainedModel

from eagle_fast.config import TreeConfig
from eagle_fast.loading import load_head, runs_in_int8
from eagle_fast.messages import warn_user
from eagle_fast.model import EaModel

BY_POSITION = list(inspect.signature(GenerationMixin.generate).parameters)[1:-1]  # without self and **kwargs
PLACE = "_eagle_fast"  # of a model's attributes


class Attached(EaModel):
    """An EaModel that knows whether the call of this thread has begun to decode."""

    def _rounds(self, *args, **options):
        vars(self)["calls"].begun = True
        return super()._rounds(*args, **options)


class Held:
    """What a model keeps its `Attached` in: a copy of the model, or a file of it, makes one of its own."""

    def __init__(self) -> None:
        self.model: Attached | None = None
        self.lock = threading.Lock()

    def __reduce_ex__(self, protocol):
        return Held, ()


def hook(head: str, **options: Any) -> Callable:
    """A `generate` for the model in whose folder, or repository on the hub, the head lies under this name.

    options: total_token, depth, top_k, adaptive and draft_int8, as in `EaModel.from_pretrained`.
    """
    begin = Path.cwd()  # the head is read by the first call, and a program may have gone elsewhere by then

    def generate(*args, model: PreTrainedModel, custom_generate=None, trust_remote_code=None, **given):
        own: Any = type(model)
        stock = functools.partial(own.generate, model)
        given = dict(zip(BY_POSITION, args, strict=False)) | given
        if custom_generate is not None:
            return stock(custom_generate=custom_generate, trust_remote_code=trust_remote_code, **given)
        decoder = _decoder(model, head, begin, options)
        calls = vars(decoder)["calls"]
        calls.begun = False
        try:
            return decoder.generate(**given)
        except (ValueError, TypeError) as error:
            if calls.begun:
                raise
            reason = str(error)
        warn_user(f"decoded without the head: {reason}")
        return stock(**given)

    return generate


def _decoder(model: PreTrainedModel, head: str, begin: Path, options: dict[str, Any]) -> Attached:
    held = vars(model).setdefault(PLACE, Held())  # not by setattr, which would make it a module inside of the model
    with held.lock:
        if held.model is None:
            held.model = _attach(model, _folder(model, head, begin), **options)
        return held.model


def _attach(
    model: PreTrainedModel,
    folder: Path,
    *,
    draft_int8: bool | None = None,
    adaptive: bool | None = None,
    **tree: int,
) -> Attached:
    layer = load_head(str(folder), model)
    if runs_in_int8(layer, draft_int8):
        layer.quantize()
    decoder = Attached(model, layer, tree=TreeConfig(**tree), adaptive=adaptive)
    vars(decoder)["calls"] = threading.local()
    return decoder


def _folder(model: PreTrainedModel, head: str, begin: Path) -> Path:
    name = str(model.name_or_path)
    for place in (Path(name), begin / name):
        if place.is_dir():
            return place / head
    return Path(snapshot_download(name, allow_patterns=f"{head}/*")) / head
