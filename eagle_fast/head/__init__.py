"""The draft head: EAGLE-1, -2 and -3 in one module, and every checkpoint format that it is read from.

The rule: formats end at `read_head`. Behind it there is one config and one spelling of names; tensors decide before
config.json does, and what cannot be run is refused by name.

In reading order:

module       the head's forward, for training and drafting alike: its caller says how rows attend
cut          the parts of a head over ranks
layer        one of its decoder layers, with merged weights
activation   the gate of its MLP
config       what a head is made of: one frozen record, and the tensors that follow from it
checkpoint   `read_head`, `write_head`
files        where a checkpoint lies, and its tensors as they are stored
checks       what settings may be
storage      how tensors must be stored
names        tensor names in every format brought to one spelling, and the kinds of draft that are refused
inference    the config, from tensors first and config.json second
vocabulary   which tokens a head can propose, and the fit of an older vocabulary
rope         its rotary tables
shared       what it takes from its target

A new format: see CONTRIBUTING.md.
"""

from eagle_fast.head.checkpoint import HeadCheckpoint, read_head, write_head
from eagle_fast.head.config import HeadConfig
from eagle_fast.head.module import Attend, DraftHead

__all__ = ["Attend", "DraftHead", "HeadCheckpoint", "HeadConfig", "read_head", "write_head"]
