"""The target: a stock causal LM of transformers, run over a prompt chunk or a tree without being changed.

The rule: all that is changed is changed on a twin, and transformers is known in two places. `anatomy` reads configs and
modules, `interface` is what transformers calls. (Before there is a model, `kind` and `quantized` read a checkpoint's.)

In reading order:

target       what decoding calls (prefill, verify), and what every module finds while a forward runs
anatomy      what is read off a model's config and modules
interface    our attention and our cache as transformers sees them; what each attention module is bound to
probe        what the attention layers are, learned from one token; which models are refused
twin         a copy of the module tree that shares every weight
fused, merged   decoder layers of Llama's shape in nine launches; weights that read the same rows as one
norms        norms whose rows do not depend on how many there are
longrope, experts   the two modules that would ask the device for a value
shards       a model over several devices
ranks, ranked   every layer over several devices: what a rank holds, and the target that they are together
rank_files, rank_cache, rank_check   its weights as they are read, its keys and values, its exactness
kind         which class of transformers loads a checkpoint, or that none does
quantized    how quantized checkpoints are loaded
formats      packed weights read from files, or made at load
sound        what a loaded model must be before it has a twin
check, rehearsal, made_up, reference   a twin held against the user's model before it is trusted
exactness, bits, paths, differing   a twin held against itself, bit for bit
devices, placement  device maps, checked before anything is loaded
turns        one thread launches at a time, and devices run turns in order

A further family of Llama's shape: see CONTRIBUTING.md.
"""

from eagle_fast.target.anatomy import UnsupportedModel
from eagle_fast.target.exactness import Exactness
from eagle_fast.target.target import Target, Verified

__all__ = ["Exactness", "Target", "UnsupportedModel", "Verified"]
