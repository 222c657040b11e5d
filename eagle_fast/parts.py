"""What a model consists of may be replaced between calls: its tree, its head, the target. The next call has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from eagle_fast.config import TreeConfig
from eagle_fast.decoding.choice import resolved
from eagle_fast.decoding.states import IdleStates
from eagle_fast.head import DraftHead
from eagle_fast.loading import check_pair
from eagle_fast.target import Target
from eagle_fast.target.placement import device_map_of
from eagle_fast.target.rank_files import cut_of
from eagle_fast.target.twin import hooks_of, is_prepared, uncompiled


def where(base_model: Any) -> dict[str, Any]:
    """The device of each module of a model, the embedding first; all its devices where it is cut over ranks."""
    return device_map_of(base_model) if cut_of(base_model) is None else dict(base_model.hf_device_map)


class OfTree:
    """An option of from_pretrained that is no attribute: assigning it says what is."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None):
        raise AttributeError(f"{self.name}: the tree is model.tree")

    def __set__(self, model: Any, value: Any):
        raise AttributeError(
            f"{self.name}={value!r} would change nothing: assign model.tree = TreeConfig(total_token, depth, top_k), "
            "or, in SafeAILab/EAGLE's words, total_tokens, depth and top_k of model.ea_layer"
        )


class PartsMixin:
    """For `EaModel`."""

    base_model: PreTrainedModel
    ea_layer: DraftHead
    target: Target
    states: IdleStates
    _name: str
    _tokenizer: Any
    _tree: TreeConfig
    generate: Callable
    _heard: tuple[int, int] = (0, 0)  # of which head, and how many of the words for its tree
    total_token, depth, top_k = OfTree(), OfTree(), OfTree()

    @property
    def config(self) -> PreTrainedConfig:
        """base_model's."""
        return self.base_model.config

    @property
    def device_map(self) -> dict[str, Any]:
        """Where base_model lies, module by module with the embedding first; {"": device} on one device."""
        return where(self.base_model)

    def _refuse_touched(self) -> None:
        """ValueError for code that was put where rounds would never run it: on this model, whose forward they do not
        call, and in the head, whose modules they go around. `accelerate.prepare` may have its forward."""
        me: Any = self
        if hooks_of(me) or ("forward" in vars(me) and not is_prepared(me)):
            raise ValueError(
                "a hook or a forward was put on the EaModel, whose rounds do not call it: put it on model.base_model, "
                "which is followed"
            )
        for name, module in self.ea_layer.named_modules():
            if hooks_of(module) or "forward" in vars(module):
                what = f"ea_layer.{name}" if name else "ea_layer"
                raise ValueError(
                    f"a hook or a forward was put on {what}, and rounds go around the head's modules: remove it"
                )

    @property
    def tree(self) -> TreeConfig:
        """The draft tree. Another one that is assigned holds from the next call on, and so do total_tokens, depth and
        top_k that are set on `ea_layer`, as scripts for SafeAILab/EAGLE do. ValueError where these don't fit."""
        of, heard = self._heard
        asked = self.ea_layer.asked[heard:] if of == id(self.ea_layer) else ()
        if asked:
            self._settle(replace(self._tree, **dict(asked)))
        return self._tree

    @tree.setter
    def tree(self, value: TreeConfig) -> None:
        check_pair(self.base_model, self.ea_layer, value)
        self._settle(value or TreeConfig())

    def _settle(self, tree: TreeConfig) -> None:
        head, tree = self.ea_layer, resolved(tree)
        sayable = head.config.draft_vocab_size
        if tree.top_k > sayable:
            raise ValueError(
                f"top_k={tree.top_k} is more than the {sayable} tokens that the head can propose: lower top_k"
            )
        self._tree, head.tree, head.heard = tree, tree, len(head.asked)
        self._heard = id(head), head.heard

    def _is_followed(self) -> bool:
        """Whether the last call had these parts."""
        return self._has_its_modules() and self.tree == self.states.tree

    def _has_its_modules(self) -> bool:
        return self.ea_layer is self.states.head and self.target.stock is uncompiled(self.base_model)

    def _look_at_parts(self) -> None:
        """Before parts that were replaced are used: whether they fit, and what is known of them."""
        if self._has_its_modules():
            return
        base_model: Any = self.base_model
        check_pair(base_model, self.ea_layer, self._tree)
        if self._heard[0] != id(self.ea_layer):
            self._settle(self._tree)
        self._lend_generate()
        name = getattr(base_model, "name_or_path", "")
        if name and name != self._name:
            self._name, self._tokenizer = name, None

    def _lend_generate(self) -> None:
        """A skeleton, which has no weights, generates as this model does."""
        if cut_of(self.base_model) is not None:
            self.base_model.generate = self.generate  # type: ignore[assignment]
