"""Whether decoding with a head gives the bits of plain decoding: what a model was found to be, as a word."""

from __future__ import annotations

BITWISE, ROUNDING = "bitwise", "rounding"


class Exactness(str):
    """One of two words, as a str.

    "bitwise": in this dtype, on this device, decoding with a head gives the bits of the engine's own plain decoding;
    "rounding": they may differ by rounding, from `module` on.
    module: the first whose output has other bits where more rows come with a row, as
    "model.layers.0.mlp.experts (MixtralExperts)"; None where none is known to. reason: why, as a sentence.
    """

    module: str | None
    reason: str

    def __new__(cls, word: str, module: str | None = None, reason: str = "") -> Exactness:
        if word not in (BITWISE, ROUNDING):
            raise ValueError(f"exactness is {BITWISE!r} or {ROUNDING!r}, not {word!r}")
        exactness = super().__new__(cls, word)
        exactness.module, exactness.reason = module, reason
        return exactness


UNMEASURED = Exactness(ROUNDING, reason="bits were not compared, so texts may differ by rounding")
UNMEASURED_OFFLOADED = Exactness(
    ROUNDING, reason="some of the weights are offloaded, and bits are not compared where every forward takes seconds"
)
