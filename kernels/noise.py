"""Counter-based Gumbel noise: what makes sampling a deterministic function of (seed, sequence, position, token).

    r = Philox4x32-10(key = seed, counter = (token // 4, position low word, sequence, position high word))[token % 4]
    u = (r + 1/2) / 2^32, at most 1 - 2^-24        E = -log1p(-u)  (exponential)        G = -log(E)  (standard Gumbel)

argmax_v (x_v + G_v) is then a draw from softmax(x), and the same draw whoever computes it: the plain loop, a tree of
any shape, the draft head. One Philox call serves four neighbouring tokens. G lies in [-2.82, 22.9]; a small u, a large
G, is where the resolution is needed and where floats have it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). No bytes are moved: the noise is made
where it is added. Left out: stronger mixing of seeds (seeds that differ in any bit give unrelated streams already).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .check import ANY, INT64, broadcast, tensor, whole

WORD = 0xFFFFFFFF
# Elements of one chunk of the CPU path: its few int64 temporaries stay in the cache.
CHUNK = 1 << 15
MOST_TOKENS = 1 << 24  # of a vocabulary


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Four uint32 lanes of Philox4x32-10; keys and counters are integers taken modulo 2^32, broadcast together."""
    k0 = k0.to(tl.uint32)
    k1 = k1.to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c1 = c1.to(tl.uint32)
    c2 = c2.to(tl.uint32)
    c3 = c3.to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


def philox_ref(
    k0: torch.Tensor, k1: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`philox` in int64 arithmetic; the lanes are int64 in [0, 2^32)."""
    broadcast(INT64, k0=k0, k1=k1, c0=c0, c1=c1, c2=c2, c3=c3)
    k0, k1, c0, c1, c2, c3 = (word & WORD for word in (k0, k1, c0, c1, c2, c3))
    for _ in range(10):
        # A product may wrap: its 64 bits are right all the same, and the mask drops the copies of the sign.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (product1 >> 32) & WORD ^ c1 ^ k0
        c1 = product1 & WORD
        c2 = (product0 >> 32) & WORD ^ c3 ^ k1
        c3 = product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


@triton.jit
def gumbel_of_bits(bits):
    """Standard Gumbel noise of uint32 random bits."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    # log1p(-u) = log(w) * u / (1 - w) for the rounded w = 1 - u: the rounding of w cancels (there is no log1p here).
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, -tl.log(w) * u / tl.where(w == 1.0, 1.0, 1.0 - w))
    return -tl.log(exponential)


@triton.jit
def gumbel(seed, sequence, position, token):
    """Noise of any tokens: int64 in, float32 out, broadcast together."""
    r0, r1, r2, r3 = philox(seed, seed >> 32, token >> 2, position, sequence, position >> 32)
    lane = token & 3
    return gumbel_of_bits(tl.where(lane < 2, tl.where(lane == 0, r0, r1), tl.where(lane == 2, r2, r3)))


@triton.jit
def gumbel_tile(seed, sequence, position, first, TILE: tl.constexpr):
    """Noise of the TILE tokens from `first` (a multiple of 4), at a quarter of the Philox calls of `gumbel`."""
    counter = (first >> 2) + tl.arange(0, TILE // 4)
    r0, r1, r2, r3 = philox(seed, seed >> 32, counter, position, sequence, position >> 32)
    return gumbel_of_bits(tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [TILE]))


def gumbel_of_bits_ref(bits: torch.Tensor) -> torch.Tensor:
    """`gumbel_of_bits` of int64 in [0, 2^32)."""
    tensor("bits", bits, "...", INT64, layout=ANY)
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def gumbel_ref(
    seeds: torch.Tensor, sequences: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Noise of any tokens: int64 tensors in, float32 out, broadcast together."""
    shape = broadcast(INT64, seeds=seeds, sequences=sequences, positions=positions, tokens=tokens)
    out = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    width = shape[-1] if shape else 1
    step = _columns(out.numel() // max(width, 1), width, out.device)
    inputs = [torch.atleast_1d(x) for x in (seeds, sequences, positions, tokens)]
    for first in range(0, width, step):
        columns = slice(first, first + step)
        seed, sequence, position, token = (x if x.shape[-1] == 1 else x[..., columns] for x in inputs)
        r0, r1, r2, r3 = philox_ref(seed, seed >> 32, token >> 2, position, sequence, position >> 32)
        lane = token & 3
        bits = torch.where(lane < 2, torch.where(lane == 0, r0, r1), torch.where(lane == 2, r2, r3))
        torch.atleast_1d(out)[..., columns] = gumbel_of_bits_ref(bits)
    return out


def gumbel_row_ref(
    seeds: torch.Tensor, sequences: torch.Tensor, positions: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Noise of the tokens 0 .. V-1, [..., V] for leading shapes [...] that broadcast together."""
    shape = broadcast(INT64, seeds=seeds, sequences=sequences, positions=positions)
    vocab_size = whole("vocab_size", vocab_size, 1, MOST_TOKENS)
    out = torch.empty((*shape, vocab_size), dtype=torch.float32, device=positions.device)
    seeds, sequences, positions = (x[..., None] for x in (seeds, sequences, positions))
    step = _columns(shape.numel(), -(-vocab_size // 4), out.device)
    for first in range(0, vocab_size, 4 * step):
        counter = torch.arange(first // 4, first // 4 + step, device=positions.device)
        lanes = philox_ref(seeds, seeds >> 32, counter, positions, sequences, positions >> 32)
        noise = torch.stack([gumbel_of_bits_ref(lane) for lane in lanes], -1).flatten(-2)
        out[..., first : first + 4 * step] = noise[..., : vocab_size - first]
    return out


def _columns(num_rows: int, width: int, device: torch.device) -> int:
    """Columns of one chunk: everything on a GPU, on the CPU what its cache holds."""
    return max(width if device.type != "cpu" else min(width, CHUNK // max(num_rows, 1)), 64)
