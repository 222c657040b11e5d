"""What ranks find of each other, made by hand, on GPUs or on a CPU that plays several."""

import torch
from eagle_fast_kernels.exchange import Mailbox
from eagle_fast_kernels.exchange_best import WORDS, Candidates


def mailboxes(devices, width, most=16):
    """Of ranks on these devices."""
    count, pinned = len(devices), devices[0].type == "cuda"
    rows = [torch.empty(count, 2, most, width, dtype=torch.int32, device=device) for device in devices]
    addresses = tuple(each.data_ptr() for each in rows)
    found = [
        Mailbox(
            rank, rows[rank], addresses, torch.empty(1, dtype=torch.int32, device=device),
            torch.empty(1, dtype=torch.long, pin_memory=pinned),
        )
        for rank, device in enumerate(devices)
    ]  # fmt: skip
    for each in found:
        each.clear()
    return found


def boxes(devices, most=16):
    """(mailbox, candidates) of ranks on these devices."""
    words = [torch.empty(len(devices), 2, most, WORDS, dtype=torch.long, device=device) for device in devices]
    candidates = [Candidates(each, tuple(other.data_ptr() for other in words)) for each in words]
    for each in candidates:
        each.clear()
    return list(zip(mailboxes(devices, 16), candidates, strict=True))
