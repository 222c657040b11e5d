"""The activation of a head's MLP. SiLU has a fused product; every other one of transformers runs in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

Activation = Callable[[Tensor], Tensor]
_SILU = ("silu", "swish")


def activation_name(name: Any) -> str:
    """The name as heads are written with it. ValueError for what transformers does not have, or only with weights."""
    if name in _SILU:
        return "silu"
    usable = isinstance(name, str) and name in ACT2FN and not list(ACT2FN[name].parameters())
    if not usable:
        names = ", ".join(each for each in ACT2FN if each not in ("prelu", "xielu"))
        raise ValueError(
            f"the head's hidden_act is {name!r}: supported are {names}; write the one that it was trained with into "
            "its config.json"
        )
    return name


def find_activation(name: str) -> Activation | None:
    """The function of that name; None for SiLU, which `FewRowsLinear.gated` has built in."""
    return None if name in _SILU else ACT2FN[name]


def gated_by(activation: Activation, gate_up: Tensor) -> Tensor:
    """activation(gate) * up [..., I] of gate_up [..., 2I] = gate | up, in at least fp32 like the fused product."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (activation(gate) * up).to(gate_up.dtype)
