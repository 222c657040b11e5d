"""Philox and the Gumbel noise: integers bit for bit, floats against double precision, the stream's statistics."""

import math

import pytest
import torch
import triton
import triton.language as tl
from eagle_fast_kernels.noise import (
    gumbel,
    gumbel_of_bits,
    gumbel_of_bits_ref,
    gumbel_ref,
    gumbel_row_ref,
    gumbel_tile,
    philox,
    philox_ref,
)

# Key and counter words -> output words, from the known-answer file of Random123 (philox4x32_10).
KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_plain(key, counter):
    """Philox4x32-10 in Python integers, from the paper's description."""
    k, c = list(key), list(counter)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % (1 << 32), (k[1] + 0xBB67AE85) % (1 << 32)]
    return tuple(c)


@triton.jit
def _philox_kernel(out_ptr, words_ptr, num, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < num
    k0 = tl.load(words_ptr + i, mask=mask, other=0)
    k1 = tl.load(words_ptr + num + i, mask=mask, other=0)
    c0 = tl.load(words_ptr + 2 * num + i, mask=mask, other=0)
    c1 = tl.load(words_ptr + 3 * num + i, mask=mask, other=0)
    c2 = tl.load(words_ptr + 4 * num + i, mask=mask, other=0)
    c3 = tl.load(words_ptr + 5 * num + i, mask=mask, other=0)
    r0, r1, r2, r3 = philox(k0, k1, c0, c1, c2, c3)
    tl.store(out_ptr + i, r0.to(tl.int64), mask=mask)
    tl.store(out_ptr + num + i, r1.to(tl.int64), mask=mask)
    tl.store(out_ptr + 2 * num + i, r2.to(tl.int64), mask=mask)
    tl.store(out_ptr + 3 * num + i, r3.to(tl.int64), mask=mask)


@triton.jit
def _gumbel_kernel(out_ptr, tile_ptr, seed, sequence, position_ptr, token_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    token = tl.load(token_ptr + i)
    position = tl.load(position_ptr)
    seed = tl.full([], seed, tl.int64)
    sequence = tl.full([], sequence, tl.int64)
    tl.store(out_ptr + i, gumbel(seed, sequence, position, token))
    tl.store(tile_ptr + i, gumbel_tile(seed, sequence, position, tl.min(token, 0), BLOCK))


def random_words(num):
    return torch.randint(0, 1 << 32, (6, num), generator=torch.Generator().manual_seed(0))


def philox_triton(words):
    out = torch.empty(4, words.shape[1], dtype=torch.int64, device=words.device)
    _philox_kernel[(1,)](out, words, words.shape[1], BLOCK=triton.next_power_of_2(words.shape[1]))
    return out


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_known_answers(key, counter, expected, device):
    words = torch.tensor([*key, *counter], device=device)[:, None]
    assert philox_plain(key, counter) == expected
    assert tuple(int(lane) for lane in philox_ref(*words)) == expected
    assert tuple(philox_triton(words)[:, 0].tolist()) == expected


def test_philox_agrees_bit_for_bit(device):
    words = random_words(97).to(device)
    expected = torch.tensor([philox_plain(w[:2], w[2:]) for w in words.T.tolist()], device=device).T
    assert torch.equal(torch.stack(philox_ref(*words)), expected)
    assert torch.equal(philox_triton(words), expected)
    # Only the low words count: the sign of a seed's high half must not leak.
    assert torch.equal(torch.stack(philox_ref(*(words - (1 << 32)))), expected)
    assert torch.equal(philox_triton(words - (1 << 32)), expected)


@pytest.mark.parametrize("seed", [0, 1234567890123456789, -(1 << 40) - 3])
@pytest.mark.parametrize("position", [5, (1 << 32) + 5])
def test_gumbel_kernel_against_ref(seed, position, device):
    tokens = torch.arange(128, 256, device=device)
    positions = torch.tensor([position], device=device)
    out, tile = torch.empty(2, 128, device=device)
    _gumbel_kernel[(1,)](out, tile, seed, 3, positions, tokens, BLOCK=128)
    expected = gumbel_ref(torch.tensor(seed, device=device), torch.tensor(3, device=device), positions, tokens)
    assert torch.equal(out, tile)
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)


def test_noise_is_the_formula(device):
    """In double precision, from the integers: the low tail (large noise) must be as exact as the bulk."""
    seed, sequence, position = 987654321987654321, 7, 4321
    tokens = torch.arange(40001)
    k0, k1 = torch.tensor(seed) & 0xFFFFFFFF, torch.tensor(seed >> 32)
    lanes = torch.stack(philox_ref(k0, k1, tokens // 4, *(torch.tensor(x) for x in (position, sequence, 0))))
    bits = lanes.gather(0, (tokens % 4)[None])[0]
    u = ((bits.double() + 0.5) / 2**32).clamp(max=1 - 2.0**-24)
    expected = -torch.log(-torch.log1p(-u))
    arguments = [torch.tensor(x, device=device) for x in (seed, sequence, position)]
    noise = gumbel_ref(*arguments, tokens.to(device)).cpu()
    # u is rounded to 24 bits, which weighs most where u is close to 1, the noise close to its minimum.
    error = (noise.double() - expected).abs()
    assert error[expected > -1].max() < 1e-6
    assert error.max() < 0.2
    assert noise.isfinite().all()


@triton.jit
def _extremes_kernel(out_ptr, bits_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, gumbel_of_bits(tl.load(bits_ptr + i).to(tl.uint32)))


def test_extreme_bits(device):
    bits = [0, 1, 2, 255, 1 << 20, 1 << 31, (1 << 32) - (1 << 12), (1 << 32) - 1]
    out = torch.empty(len(bits), device=device)
    _extremes_kernel[(1,)](out, torch.tensor(bits, device=device), BLOCK=len(bits))
    ref = gumbel_of_bits_ref(torch.tensor(bits, device=device))
    for b, kernel_value, ref_value in zip(bits, out.tolist(), ref.tolist(), strict=True):
        u = (torch.tensor(float(b)) + 0.5).item() / 2**32  # rounded to float32, as all of these are
        exact = -math.log(-math.log1p(-min(u, 1 - 2**-24)))
        assert kernel_value == pytest.approx(exact, abs=3e-6)
        assert ref_value == pytest.approx(exact, abs=3e-6)
    assert out.max() < 22.9
    assert out.min() > -2.82


def test_noise_does_not_depend_on_the_shape(device):
    """The plain loop asks for one row, verification for a tree of them: the same bits, whatever the chunks."""
    num_tokens, positions = 5003, torch.arange(100, 161, device=device)
    seed, sequence = torch.tensor(77, device=device), torch.tensor(0, device=device)
    together = gumbel_row_ref(seed, sequence, positions, num_tokens)
    alone = torch.stack([gumbel_row_ref(seed, sequence, p, num_tokens) for p in positions])
    assert together.shape == (61, num_tokens)
    assert torch.equal(together, alone)
    tokens = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(gumbel_ref(seed, sequence, positions[:, None], tokens), together[:, tokens])
    batched = gumbel_row_ref(seed.expand(1, 1), sequence.expand(1, 1), positions[None], num_tokens)
    assert torch.equal(batched[0], together)


def test_every_coordinate_counts(device):
    base = {"seeds": 5, "sequences": 2, "positions": 9}
    rows = [base, *(base | {name: base[name] + 1} for name in base)]
    rows += [base | {"seeds": 5 + (1 << 32)}, base | {"seeds": -5}, base | {"positions": 9 + (1 << 32)}]
    columns = [torch.tensor([row[name] for row in rows], device=device) for name in base]
    noise = gumbel_row_ref(*columns, 4000).double()
    noise = noise - noise.mean(1, keepdim=True)
    correlation = torch.corrcoef(noise) - torch.eye(len(rows), device=device)
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_distribution(device):
    num = 200_000
    arguments = [torch.tensor(x, device=device) for x in (31, 0, 1000)]
    noise = gumbel_row_ref(*arguments, num).double()
    assert abs(noise.mean().item() - 0.5772157) < 4 * math.pi / math.sqrt(6 * num)
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    steps = (torch.arange(num, device=device) + 0.5) / num
    assert (uniform - steps).abs().max() < 1.95 / math.sqrt(num)  # Kolmogorov-Smirnov at 0.001
    centred = noise - noise.mean()
    for lag in (1, 2, 3, 4):
        assert abs((centred[lag:] * centred[:-lag]).mean().item() / noise.var().item()) < 4 / math.sqrt(num)
