"""device_map="auto" of a target that no GPU holds: every layer over several GPUs, where that is possible."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_fast.layers.peer_links import apart
from eagle_fast.loading_ranks import Plan, load_plan, not_taken, plan_of
from eagle_fast.messages import warn_user
from eagle_fast.target.devices import MOST_RANKS
from eagle_fast.target.packing import Bits
from eagle_fast.target.placement import WORKSPACE_BYTES, cache_bytes, free_bytes, head_bytes, plan_placement
from eagle_fast.target.ranks import cut_bytes, cuts_for

SAID = (
    "device_map='auto': the model does not fit on one GPU, and every layer is cut over {gpus} (tensor_parallel), which "
    "work on it together; base_model is a skeleton. tensor_parallel=False spreads whole layers instead"
)


def load_cut_by_itself(
    path: Any, options: dict[str, Any], beside: dict[str, Any], bits: Bits
) -> PreTrainedModel | None:
    """What `load_cut_target` gives with the same arguments over GPUs that are chosen here, and says so; None where the
    target is to be loaded in the ordinary way, which says what is wrong if something is."""
    try:
        found = plan_over_gpus(path, options, beside, bits)
        if found is None:
            return None
        plan, devices = found
        model = load_plan(plan, devices)
    except ValueError:
        return None
    warn_user(SAID.format(gpus=" and ".join(map(str, devices))))
    return model


def plan_over_gpus(
    path: Any, options: dict[str, Any], beside: dict[str, Any], bits: Bits
) -> tuple[Plan, list[torch.device]] | None:  # fmt: skip
    """The target's plan and the GPUs for it: as many as ranks have run on, those with the most room, if they hold what
    one of them does not, and reach each other. ValueError for a target that cannot be cut."""
    count = torch.cuda.device_count()
    if count < MOST_RANKS or isinstance(path, nn.Module) or not_taken(options, beside):
        return None
    plan = plan_of(path, options, bits)
    sizes = plan.packing.model if plan.packing else plan.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a placement that is not taken
        if set(plan_placement(sizes, "auto")) == {""}:
            return None
    room = {torch.device("cuda", index): free_bytes(torch.device("cuda", index)) for index in range(count)}
    devices = sorted(sorted(room, key=lambda gpu: -room[gpu])[:MOST_RANKS], key=lambda gpu: gpu.index)
    needed = [each + WORKSPACE_BYTES for each in cut_bytes(plan.stored, cuts_for(plan.stored, MOST_RANKS))]
    needed = [each + cache_bytes(sizes.config, sizes.dtype) // MOST_RANKS for each in needed]
    head = head_bytes(sizes.config, sizes.dtype)
    needed = [each + head // MOST_RANKS for each in needed]  # its parts, and the whole on the first
    needed[0] += head
    fits = all(each <= room[gpu] for each, gpu in zip(needed, devices, strict=True))
    if not fits or apart(devices) or os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        return None
    return plan, devices
