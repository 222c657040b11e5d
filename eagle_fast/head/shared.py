"""What a head takes from its target where its checkpoint has none of its own: the embedding, and lm_head."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


def targets_rows(what: str, given: Tensor | None, rows: int, columns: int) -> Tensor:
    """The first rows of one of the target's matrices, of which it may have more. ValueError if it does not fit."""
    if not usable(given, rows, columns):
        found = "none" if given is None else f"{list(given.shape)} {given.dtype} on {given.device}"
        raise ValueError(f"the head shares the target's {what}: pass it as {[rows, columns]} floats, got {found}")
    return given.detach()[:rows]


def targets_if_same(own: Tensor, given: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """EAGLE-1 files often repeat the target's matrices: use the target's then, and save the memory."""
    if not usable(given, *own.shape):
        return own
    shared = given.detach()[: len(own)].to(device, dtype)
    return shared if torch.equal(own, shared) else own


def usable(tensor: Tensor | None, rows: int, columns: int) -> TypeGuard[Tensor]:
    """Whether these are that many rows of floats, or more, that can be read."""
    fits = tensor is not None and tensor.dim() == 2 and tensor.shape[0] >= rows and tensor.shape[1] == columns
    return fits and tensor is not None and tensor.is_floating_point() and not tensor.is_meta
