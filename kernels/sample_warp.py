"""What the sampler drew a token from: the warped logits, with -inf at what top-k, top-p and min-p removed.

    temperature 0   logits
    otherwise       x = logits / temperature;  x_v = -inf for v not in K, the set that `sample` kept

logits [B, T, V], every setting [B] on the device. For records of what was drawn, between rounds: not a part of them.
Survey and threshold are `sample`'s own kernels, so K is the set that it drew from, ties of top-p included; the rest is
PyTorch. Only min-p may round differently there; a token that was drawn stays in K whatever rounding says.
"""

from __future__ import annotations

import torch
import triton

from . import sample as sampling
from .check import ANY, BY_ROWS, FLOAT32, FLOATS, INT64, MOST_BLOCKS, tensor
from .launch import device_guard, use_triton
from .overlap import dependent_launch
from .sample_ref import GREEDY_TEMPERATURE, warp_ref
from .sample_threshold import threshold


def warp(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """x [B, T, V] float32 of logits [B, T, V] after which `sample` chose tokens [B, T] (any in [0, V) where none was).

    Settings [B] as those of `sample`; the logits' last dimension is contiguous. ValueError for what does not fit.
    """
    num_sequences, num_nodes, _ = tensor("logits", logits, "B T V", FLOATS, layout=BY_ROWS)
    near = ("logits", logits)
    tensor("tokens", tokens, "B T", INT64, (num_sequences, num_nodes), near=near, layout=ANY)
    for name, setting, dtypes in (
        ("temperature", temperature, FLOAT32), ("top_k", top_k, INT64), ("top_p", top_p, FLOAT32),
        ("min_p", min_p, FLOAT32),
    ):  # fmt: skip
        tensor(name, setting, "B", dtypes, (num_sequences,), near=near)
    if num_sequences * num_nodes > MOST_BLOCKS:
        raise ValueError(f"logits has B T = {num_sequences * num_nodes} rows; expected at most {MOST_BLOCKS}")
    sampled = (temperature > GREEDY_TEMPERATURE)[:, None, None]
    x = logits.float() / torch.where(sampled, temperature[:, None, None], 1.0)
    if use_triton(logits):
        least = _least(logits, temperature, top_k, top_p)
        removed = (logits < least) | (torch.exp(x - x.amax(-1, keepdim=True)) < min_p[:, None, None])
    else:
        removed = warp_ref(x, top_k, top_p, min_p) == float("-inf")
    removed.scatter_(-1, tokens[..., None], False)
    return x.masked_fill_(sampled & removed, float("-inf"))


def _least(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[B, T, 1]: the least logit that top-k and top-p keep. Of greedy sequences, anything."""
    num_sequences, num_nodes, vocab_size = logits.shape
    chunk = min(sampling.CHUNK, max(128, triton.next_power_of_2(vocab_size)))
    num_rows, num_chunks = num_sequences * num_nodes, triton.cdiv(vocab_size, chunk)
    best, mass = torch.empty(2, num_rows, num_chunks, dtype=torch.float32, device=logits.device)
    token = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    with device_guard(logits):
        sampling._survey_kernel[(num_chunks, num_rows)](
            best, token, mass, logits, temperature, num_nodes, vocab_size, *logits.stride()[:2],
            GREEDY=GREEDY_TEMPERATURE, CHUNK=chunk, num_warps=sampling.NUM_WARPS, **dependent_launch(logits.device),
        )  # fmt: skip
        return threshold(logits, best, mass, temperature, top_k, top_p).view(num_sequences, num_nodes, 1)
