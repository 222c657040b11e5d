"""The hidden states that a draft head reads, kept by hooks on a twin's layers while a forward runs."""

from __future__ import annotations

import torch
from torch import nn

from eagle_fast.layers.transfers import Transfers

FINAL = -1  # the last hidden state, after the final norm


class Features:
    """Keeps, on each forward, the hidden states at the boundaries that are asked for, on `device`.

    boundaries: k is the input of decoder layer k, their number the output of the last; none: the last hidden state
    after the final norm (EAGLE-1/2). ValueError for boundaries that do not exist.
    """

    def __init__(
        self, decoder: nn.Module, layers: nn.ModuleList, boundaries: tuple[int, ...], transfers: Transfers,
        device: torch.device,
    ):  # fmt: skip
        self.transfers, self.device = transfers, device
        self.order = boundaries or (FINAL,)
        self.taken: dict[int, torch.Tensor] = {}
        for boundary in set(boundaries):
            if not 0 <= boundary <= len(layers):
                raise ValueError(f"feature layer {boundary}: the target has boundaries 0 to {len(layers)}")
            if boundary == len(layers):
                layers[-1].register_forward_hook(self._keep_output(boundary))
            else:
                layers[boundary].register_forward_pre_hook(self._keep_input(boundary), with_kwargs=True, prepend=True)
        if not boundaries:
            decoder.register_forward_hook(self._keep_output(FINAL))

    def take(self) -> torch.Tensor:
        """[B, T, F] of the running forward."""
        kept = [self.taken[boundary] for boundary in self.order]
        return torch.cat(kept, -1) if len(kept) > 1 else kept[0]

    def clear(self) -> None:
        """The forward is over."""
        self.taken = {}

    def _keep_input(self, boundary: int):
        def hook(module, args, kwargs):
            self._keep(boundary, args[0] if args else kwargs["hidden_states"])

        return hook

    def _keep_output(self, boundary: int):
        def hook(module, args, output):
            self._keep(boundary, output if isinstance(output, torch.Tensor) else output[0])

        return hook

    def _keep(self, boundary: int, hidden: torch.Tensor) -> None:
        self.taken[boundary] = self.transfers.to(hidden, self.device)
