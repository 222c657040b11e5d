"""The target: a stock causal LM of transformers, run over a prompt chunk or a tree without being changed.

target       what decoding calls: prefill, verify
anatomy      what is read off a model's config and modules; no other file reads them
interface    our attention and our cache as transformers sees them
probe        what the attention layers are, learned from one token; which models are refused
twin         a copy of the module tree that shares every weight
fused        decoder layers of Llama's shape in nine launches
longrope, experts   the two modules that would ask the device for a value
shards       a model over several devices
placement    device maps, checked before anything is loaded
"""

from eagle_fast.target.anatomy import UnsupportedModel
from eagle_fast.target.target import Target, Verified

__all__ = ["Target", "UnsupportedModel", "Verified"]
