"""Norms whose rows do not depend on how many there are.

transformers writes a norm out in PyTorch, and on a GPU the mean over a row is added up in an order that depends on the
number of rows: in 16 bits a token alone and the same token in a tree may come out differently. On the twin every norm
of a kind that `rms_norm` knows is replaced by one that calls it, over the same weight.

Of which kind a norm is, its name does not say. So it is tried, once for each class and width: on a few rows, with a
weight that is made up, in all precisions, against every kind. What is of none stays stock, and so do PyTorch's own
nn.LayerNorm and nn.RMSNorm, whose kernels take a block for each row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from eagle_fast_kernels.rms_norm import MOST_COLUMNS, rms_norm, rms_norm_ref
from torch import Tensor, nn

from eagle_fast.target.anatomy import RowNormParts, row_norm_parts
from eagle_fast.target.fused import share_hooks

# of rows and weight of a trial; the last two: where norms were kept in another precision than the model
PRECISIONS = (
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
)  # fmt: skip
LOUDNESS = (1e-3, 1.0, 100.0)  # of the rows of a trial: the first is about as large as an epsilon
FLIPPED = 0.01  # most 16-bit numbers of a trial that a sum in another order rounds the other way; another kind: a third
TORCHS_OWN = frozenset(vars(nn.Module()))  # attributes


class Kind(NamedTuple):
    """What a norm computes, in the words of `rms_norm`."""

    centered: bool = False
    round_once: bool = False
    plus_one: bool = False


# as Llama's; OLMo 2's, GPT-OSS'; Gemma's; Cohere's
KINDS = (
    Kind(), Kind(round_once=True), Kind(round_once=True, plus_one=True), Kind(centered=True, round_once=True),
)  # fmt: skip


class RowNorm(nn.Module):
    """Stands in for a stock norm."""

    def __init__(self, parts: RowNormParts, kind: Kind):
        super().__init__()
        (self.weight, self.eps), self.kind = parts, kind

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        return normed(rms_norm, hidden_states, self.weight, self.eps, self.kind)


def normed(op: Callable[..., Tensor], x: Tensor, weight: Tensor | None, eps: float, kind: Kind) -> Tensor:
    """`op`, which is `rms_norm` or its twin, over rows x [..., H], in the dtype that stock code gives."""
    settings = {"centered": kind.centered, "round_once": kind.round_once, "plus_one": kind.plus_one}
    if weight is None or kind.round_once or torch.promote_types(x.dtype, weight.dtype) == x.dtype:
        return op(x, weight, eps, **settings)
    return weight * op(x, None, eps, **settings)  # rounded rows in the weight's precision


def use_row_norms(model: nn.Module, touched: set[nn.Module]) -> None:
    """Replace every norm of a known kind in a twin by one that shares its weight.

    touched: modules with hooks or a forward of the user's, which stay stock.
    """
    kinds: dict[Hashable, Kind | None] = {}
    ours: dict[nn.Module, RowNorm] = {}  # one for a norm that several modules hold
    for module in list(model.modules()):
        for name, child in module._modules.items():
            parts = row_norm_parts(child)
            if child is None or child in touched or parts is None:
                continue
            key = _settings(child, parts)
            if key not in kinds:
                kinds[key] = kind_of(child, parts)
            kind = kinds[key]
            if kind is not None:
                if child not in ours:
                    ours[child] = RowNorm(parts, kind)
                    share_hooks(child, ours[child])
                module._modules[name] = ours[child]


def _settings(norm: nn.Module, parts: RowNormParts) -> Hashable:
    """What norms of one kind have in common: class, width, and all that their code may look at."""
    held = [
        (name, value if isinstance(value, (int, float, str, bool, type(None))) else id(value))
        for name, value in vars(norm).items()
        if name not in TORCHS_OWN
    ]
    return type(norm), None if parts.weight is None else parts.weight.shape, tuple(held)


def kind_of(norm: nn.Module, parts: RowNormParts) -> Kind | None:
    """What a stock norm computes on the CPU, rounded where it rounds; None if that is of no known kind."""
    shape = (64,) if parts.weight is None else tuple(parts.weight.shape)
    takes_rows_alone = len(inspect.signature(type(norm).forward).parameters) == 2
    if shape[-1] > MOST_COLUMNS or not takes_rows_alone:
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    loudness = torch.tensor(LOUDNESS, device="cpu", dtype=torch.float32).view(-1, *[1] * len(shape))
    drawn = torch.randn(len(LOUDNESS) + 1, *shape, generator=generator, device="cpu", dtype=torch.float32)
    rows, scale = (drawn[1:] + 0.5) * loudness, drawn[0]
    kinds = list(KINDS)
    for of_rows, of_weight in PRECISIONS:
        x, weight = rows.to(of_rows), None if parts.weight is None else scale.to(of_weight)
        theirs = _stock_result(norm, x, weight)
        kinds = [kind for kind in kinds if _agree(normed(rms_norm_ref, x, weight, parts.eps, kind), theirs)]
    return kinds[0] if kinds else None


def _stock_result(norm: nn.Module, x: Tensor, weight: Tensor | None) -> Any:
    """What the code of a norm makes of x with this weight."""
    trial: Any = copy.copy(norm)
    trial._parameters = {} if weight is None else {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        with torch.no_grad():
            return type(trial).forward(trial, x)
    except Exception:  # of code that nobody here has read: it is no norm of rows
        return None


def _agree(ours: Tensor, theirs: Any) -> bool:
    """Whether two results are the same to the bit, but for sums in another order."""
    if not isinstance(theirs, Tensor) or theirs.dtype != ours.dtype or theirs.shape != ours.shape:
        return False
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    return (ours != theirs).float().mean().item() <= FLIPPED
