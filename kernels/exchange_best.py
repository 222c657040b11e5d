"""The k best tokens after each row, of a draft vocabulary that is cut over ranks: `lm_head_topk` on each, then this.

n ranks, R rows, k candidates of a row, M rows of a mailbox, W words of one.

    y [R, k], tokens [R, k]     the best of a rank's part, in descending order
    sums [R, 2]                 its largest y, and its sum of exp(y - that)
    scores = y - log sum over all parts of exp(y), of the k best of all ranks

Each rank pushes k words a row into every rank's memory, the order of y above the token, and one word of both sums. No
word is NOTHING, which a place holds where none has come: as rows of `exchange.py` they say themselves that they have,
and so are the rules by which an exchange is launched. Sums are merged in rank order, and ties go to the lower rank,
then to the better place: all ranks end with the same bits, and with the tokens of one device, whose vocabulary is that
of all ranks side by side.

Bytes: 11 words a row each way, 900 for a beam of 10; one launch a rank, whose time is the way over the link.
Left out: more candidates than a beam has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .check import FLOAT32, INT64, tensor, whole
from .exchange import LOOKS, NOTHING, Mailbox, _check_gpu, _give_up, _looks_left
from .launch import device_guard
from .order_key import ABSENT, order_key, order_value, pack_ref, take_best, unpack_ref
from .overlap import after_earlier_kernels, dependent_launch

MOST_K = 16  # candidates of a row
WORDS = MOST_K + 1  # W


class Candidates(NamedTuple):
    """Where one rank finds the candidates of the others, and how it reaches theirs: beside its `Mailbox`."""

    words: Tensor  # [n, 2, M, W] int64, by who pushed them, in turns
    addresses: tuple[int, ...]  # of `words` of all ranks

    def clear(self) -> None:
        """As if no rank had ever pushed anything."""
        self.words.fill_(NOTHING.value)


@triton.jit
def _load_words(words_ptr, places, mask):
    """(words there, which of them have not come yet)."""
    words = tl.load(words_ptr + places, mask=mask, other=0, volatile=True)
    return words, words == NOTHING


@triton.jit(do_not_specialize=["turn", "looks"])
def _best_kernel(
    scores_ptr, best_ptr, y_ptr, tokens_ptr, sums_ptr, words_ptr, addresses, fault_ptr, told_ptr, turn, looks,
    MOST: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SOURCES: tl.constexpr, K: tl.constexpr,
    SLOTS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row. SLOTS > K, SOURCES >= RANKS."""
    after_earlier_kernels(PDL)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    place = turn * MOST + row  # among the rows of one source
    key = order_key(tl.load(y_ptr + row * K + i, mask=i < K, other=0.0))
    token = tl.load(tokens_ptr + row * K + i, mask=i < K, other=0)
    peak = tl.load(sums_ptr + row * 2).to(tl.int32, bitcast=True)
    mass = tl.load(sums_ptr + row * 2 + 1).to(tl.int32, bitcast=True)
    both = (peak.to(tl.int64) << 32) | (mass.to(tl.int64) & 0xFFFFFFFF)
    words = tl.where(i < K, (key.to(tl.int64) << 32) | token, both)
    for rank in tl.static_range(RANKS):  # its own words too
        there = addresses[rank].to(tl.int64).to(tl.pointer_type(tl.int64))  # low ones come as int32
        tl.store(there + (RANK * 2 * MOST + place) * WORDS + i, words, mask=(i <= K) & (looks > 0))

    source = tl.arange(0, SOURCES)
    first = (source * 2 * MOST + place) * WORDS
    places = first[:, None] + i[None, :]
    pushed = (source < RANKS)[:, None] & (i <= K)[None, :]
    words, lacks = _load_words(words_ptr, places, pushed)
    if looks > 0:
        if tl.max(lacks.to(tl.int32)) > 0:
            left = _looks_left(fault_ptr, looks)
            while (tl.max(lacks.to(tl.int32)) > 0) & (left > 0):
                words, lacks = _load_words(words_ptr, places, pushed)
                left -= 1
            if tl.max(lacks.to(tl.int32)) > 0:
                late = tl.max(tl.where(lacks, source[:, None], 0))
                _give_up(fault_ptr, told_ptr, 1 + RANK * 256 + late)
        tl.store(words_ptr + places, tl.full(words.shape, NOTHING, tl.int64), mask=pushed)
    there = pushed & (i < K)[None, :]
    both = tl.sum(tl.where((i == K)[None, :], words, 0), 1)
    peaks = tl.where(source < RANKS, (both >> 32).to(tl.int32).to(tl.float32, bitcast=True), float("-inf"))
    masses = both.to(tl.int32).to(tl.float32, bitcast=True)
    peak = tl.max(peaks, 0)
    masses *= tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak))
    mass = tl.zeros([], tl.float32)
    for each in tl.static_range(RANKS):
        mass += tl.sum(tl.where(source == each, masses, 0.0), 0)

    keys = tl.reshape(tl.where(there, (words >> 32).to(tl.int32), ABSENT), SOURCES * SLOTS)
    tokens, places = tl.reshape(words.to(tl.int32), SOURCES * SLOTS), tl.arange(0, SOURCES * SLOTS)
    top_keys, top_tokens = tl.zeros([SLOTS], tl.int32), tl.zeros([SLOTS], tl.int32)
    for j in tl.static_range(K):
        best, where, keys = take_best(keys, places, 0)
        top_keys = tl.where(i == j, best, top_keys)
        top_tokens = tl.where(i == j, tl.sum(tl.where(places == where, tokens, 0), 0), top_tokens)
    scores = order_value(top_keys) - (peak + tl.log(mass))
    tl.store(scores_ptr + row * K + i, tl.where(scores == scores, scores, float("-inf")), mask=i < K)
    tl.store(best_ptr + row * K + i, top_tokens.to(tl.int64), mask=i < K)


def exchange_best(
    y: Tensor, tokens: Tensor, sums: Tensor, mailbox: Mailbox, candidates: Candidates, turn: int,
    out: tuple[Tensor, Tensor], *, looks: int = LOOKS,
) -> None:  # fmt: skip
    """Launch one rank's side; out is (scores [R, k] float32, tokens [R, k] int64). turn, looks and what else is
    launched: as of `exchange_add_rms_norm`. ValueError where arguments do not fit, on a CPU too: there is `_ref` for
    one."""
    num_rows, k = _check(y, tokens, sums, candidates, turn, out)
    ranks, _, most, words = candidates.words.shape
    with device_guard(y):
        _best_kernel[(num_rows,)](
            *out, y, tokens, sums, *candidates, mailbox.fault, mailbox.told, turn, looks, MOST=most, RANK=mailbox.rank,
            RANKS=ranks, SOURCES=triton.next_power_of_2(ranks), K=k, SLOTS=triton.next_power_of_2(k + 1), WORDS=words,
            num_warps=1, **dependent_launch(y.device),
        )  # fmt: skip


def _check(
    y: Tensor, tokens: Tensor, sums: Tensor, candidates: Candidates, turn: int, out: tuple[Tensor, Tensor]
) -> tuple[int, int]:
    """(R, k)"""
    num_rows, k = tensor("y", y, "R k", FLOAT32)
    near = ("y", y)
    tensor("tokens", tokens, "R k", INT64, (num_rows, k), near=near)
    tensor("sums", sums, "R 2", FLOAT32, (num_rows, 2), near=near)
    whole("turn", turn, 0, 1)
    for name, each, dtypes in zip(("scores", "best"), out, (FLOAT32, INT64), strict=True):
        tensor(name, each, "R k", dtypes, (num_rows, k), near=near)
    words = tensor("candidates.words", candidates.words, "n 2 M W", INT64, (None, 2, None, WORDS), near=near)
    if num_rows > words[2] or k > MOST_K:
        raise ValueError(f"y is {[num_rows, k]}; expected at most {[words[2], MOST_K]}")
    _check_gpu("y", y)
    return num_rows, k


def exchange_best_ref(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(scores, tokens) [R, k] from (y, tokens, sums) of all ranks, on one device; plain PyTorch."""
    y, tokens = (torch.cat([part[place] for part in parts], -1) for place in (0, 1))
    places = torch.arange(y.shape[1], device=y.device)
    best, index = unpack_ref(pack_ref(y, places).topk(parts[0][0].shape[1], -1).values)
    peaks, masses = torch.stack([sums for _, _, sums in parts], -1).unbind(1)  # [R, n]
    peak = peaks.amax(-1, keepdim=True)
    masses = masses * (peaks - peak.masked_fill(peak.isinf(), 0.0)).exp()
    total = masses[:, :1]
    for rank in range(1, len(parts)):
        total = total + masses[:, rank : rank + 1]
    scores = best - (peak + total.log())
    return scores.masked_fill(scores.isnan(), float("-inf")), tokens.gather(1, index)
