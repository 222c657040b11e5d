"""SafeAILab/EAGLE sets the draft tree on the head: its words for it here, and what its scripts call besides."""

from __future__ import annotations

from typing import Any

from eagle_fast.config import TreeConfig

OF_TREE = {"total_tokens": "total_token", "depth": "depth", "top_k": "top_k"}  # the root is not among total_tokens
DRAFTS = (
    "eagle_fast drafts in decoding/draft.py, with caches that belong to a call; what each round accepted is in the "
    "Generation of return_dict_in_generate=True"
)


class Absent:
    """A name of SafeAILab/EAGLE's head that is not here: reading it says so, and so does replacing it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, head: Any, owner: type | None = None):
        raise AttributeError(f"{self.name}: {DRAFTS}")

    def __set__(self, head: Any, value: Any):
        raise AttributeError(f"{self.name} would never be called: {DRAFTS}")


class TreeWords:
    """total_tokens, depth and top_k of a head: what is assigned holds from the next call on of every model that it
    drafts for; read, they are those of the model that it was given last."""

    topK_genrate = Absent()
    topK_generate = Absent()
    stable_kv = Absent()
    tree_buffer = Absent()
    sample = Absent()  # this one and those below of EAGLE's version 1
    repeat_hidden = Absent()
    repeat_kv = Absent()
    reduce_kv = Absent()
    tree: TreeConfig | None = None
    asked: tuple[tuple[str, int], ...] = ()  # (field of TreeConfig, value) in the order of assignment
    heard: int = 0  # how many of them `tree` has

    def _get(self, name: str) -> int:
        field = OF_TREE[name]
        if self.tree is None:
            raise AttributeError(f"{name}: the tree is the model's, and this head has none yet")
        value = dict(self.asked[self.heard :]).get(field, getattr(self.tree, field))
        return value - 1 if name == "total_tokens" else value

    def _set(self, name: str, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r}: use an integer")
        if self.tree is None:
            raise ValueError(f"{name}: the tree is the model's: pass tree=TreeConfig(...) to EaModel")
        self.asked = (*self.asked, (OF_TREE[name], value + 1 if name == "total_tokens" else value))

    @property
    def total_tokens(self) -> int:
        """Nodes that the target verifies, without the root."""
        return self._get("total_tokens")

    @total_tokens.setter
    def total_tokens(self, value: int) -> None:
        self._set("total_tokens", value)

    @property
    def depth(self) -> int:
        return self._get("depth")

    @depth.setter
    def depth(self, value: int) -> None:
        self._set("depth", value)

    @property
    def top_k(self) -> int:
        return self._get("top_k")

    @top_k.setter
    def top_k(self, value: int) -> None:
        self._set("top_k", value)

    def reset_kv(self) -> None:
        """Nothing: a call begins with caches of its own."""

    def init_tree(self) -> None:
        """Nothing: a tree that was set is in force with the next call."""
