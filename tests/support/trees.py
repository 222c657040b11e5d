"""One fixed tree under a prompt, to run through a target."""

import torch

from eagle_fast.decoding.tree import bit_masks
from eagle_fast.layers.attention import TreeStep

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 3, 5, 6, 8]  # 5 leaves, deepest path of 5 nodes
PROMPT = 19  # longer than every window
CHUNK = 8


def paths(parents):
    """The nodes from the root to each node."""
    found = []
    for node, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), node])
    return found


def tree_step(lengths, device):
    own = paths(PARENTS)
    batch = lengths.numel()
    ancestors = bit_masks(own, len(own), device).expand(batch, -1, -1)
    depths = torch.tensor([len(path) - 1 for path in own], device=device).expand(batch, -1)
    return TreeStep(lengths, ancestors, depths)


def prefill(target, tokens, cache):
    features = [target.prefill(part, start * CHUNK, cache) for start, part in enumerate(tokens.split(CHUNK, dim=1))]
    return torch.cat(features, 1)
