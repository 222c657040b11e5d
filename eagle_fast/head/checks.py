"""What a head's settings may be: rules for numbers, flags and lists, and the fields of config.json that they hold for.

Fields that are only compared with the weights (`hidden_size` and the like) have none: there the weights win.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

MOST = 2**31 - 1


class Rule(NamedTuple):
    """What a value must be, as a test and in words."""

    holds: Callable[[Any], bool]
    wanted: str

    def check_argument(self, name: str, value: Any) -> None:
        """ValueError with both, if it does not hold."""
        if not self.holds(value):
            raise ValueError(f"{name}={reprlib.repr(value)}: use {self.wanted}")

    def check_field(self, name: str, value: Any) -> None:
        """The same for a field of config.json."""
        if not self.holds(value):
            raise ValueError(f"config.json: {name} is {reprlib.repr(value)}: use {self.wanted}")


def plain(value: Any) -> Any:
    """Scalars of numpy and torch as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(holds, value))


def _is_chance(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_acceptance(item: tuple[Any, Any]) -> bool:
    """A temperature, which JSON has as a text, and its table."""
    try:
        temperature = float(item[0])
    except (TypeError, ValueError):
        return False
    rows = item[1]
    return temperature >= 0 and _is_list(rows, lambda row: _is_list(row, _is_chance) and len(row) > 0) and len(rows) > 0


COUNT = Rule(is_count, "a whole number from 1 on")
FLAG = Rule(lambda value: isinstance(value, int) and value in (0, 1), "true or false")
NUMBER = Rule(is_number, "a number")
POSITIVE = Rule(lambda value: is_number(value) and value > 0, "a positive number")
FROM_ONE = Rule(lambda value: is_number(value) and value >= 1, "a number from 1 on")
SHARE = Rule(lambda value: is_number(value) and 0 < value <= 1, "a number above 0, up to 1")
EPSILON = Rule(lambda value: is_number(value) and 1e-30 <= value < 1, "a small positive number, such as 1e-6")
TEXT = Rule(lambda value: isinstance(value, str), "a text")
TEXTS = Rule(lambda value: _is_list(value, TEXT.holds), "a list of texts, one for each layer")
INDICES = Rule(lambda value: _is_list(value, lambda each: is_count(each, 0)), "a list of whole numbers from 0 on")
POSITIVES = Rule(lambda value: _is_list(value, POSITIVE.holds), "a list of positive numbers")

ACCEPTANCE = Rule(
    lambda value: isinstance(value, dict) and all(map(_is_acceptance, value.items())),
    "tables of chances by temperature, as {'0': [[0.7, 0.3], [0.6]]}: a row for each depth, a number for each rank",
)

_FLAGS = (
    "norm_before_residual", "norm_before_fc", "norm_output", "return_hidden_post_norm", "fc_norm", "rope_interleaved",
    "tie_word_embeddings", "use_aux_hidden_state", "use_input_layernorm_in_first_layer", "use_last_layernorm",
    "skip_prenorm", "skip_output_norm", "next_layer_regular", "eh_proj_before_attn",
)  # fmt: skip
_COUNTS = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
    "original_max_position_embeddings", "parallel_draft_step",
)  # fmt: skip
_FIELDS = {
    **dict.fromkeys(_FLAGS, FLAG),
    **dict.fromkeys(_COUNTS, COUNT),
    "acceptance": ACCEPTANCE,
    "rms_norm_eps": EPSILON,
    "eagle_aux_hidden_state_layer_ids": INDICES,
    "feature_layers": INDICES,
    "layer_types": TEXTS,
    "model_type": TEXT,
    "speculators_model_type": TEXT,
}


def check_settings(settings: dict[str, Any]) -> None:
    """ValueError for a field of the flattened config.json that cannot be; flags that are 0 or 1 become booleans."""
    for name, rule in _FIELDS.items():
        if name in settings:
            rule.check_field(name, settings[name])
    settings |= {name: bool(settings[name]) for name in _FLAGS if name in settings}


def index_list(name: str, values: Any) -> tuple[int, ...]:
    """Argument `name`, a sequence of whole numbers of any kind."""
    listed = list(map(plain, values)) if isinstance(values, Sequence) or getattr(values, "ndim", 0) == 1 else values
    INDICES.check_argument(name, listed)
    return tuple(listed)
