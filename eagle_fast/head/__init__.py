"""The draft head: EAGLE-1, -2 and -3 in one module, and every checkpoint format that it is read from.

module       the head's forward
layer        one of its decoder layers
config       what a head is made of: one frozen record, and the tensors that follow from it
checkpoint   read_head, write_head
files        where a checkpoint lies, and its tensors as they are stored
names        their names in every format, and the kinds of draft that are refused
inference    the config, from tensors first and config.json second
vocabulary   which tokens a head can propose
rope         its rotary tables
"""

from eagle_fast.head.checkpoint import HeadCheckpoint, read_head, write_head
from eagle_fast.head.config import HeadConfig
from eagle_fast.head.module import Attend, DraftHead

__all__ = ["Attend", "DraftHead", "HeadCheckpoint", "HeadConfig", "read_head", "write_head"]
