"""What ranks find of each other, made by hand, on GPUs or on a CPU that plays several."""

import torch
from eagle_fast_kernels.exchange import Mailbox
from eagle_fast_kernels.exchange_best import WORDS, Candidates


def mailboxes(devices, width, most=16):
    """Of ranks on these devices."""
    count = len(devices)
    rows = [torch.zeros(count, 2, most, width, device=device) for device in devices]
    flags = [torch.zeros(count, 2, most, dtype=torch.long, device=device) for device in devices]
    pinned = devices[0].type == "cuda"

    def addresses(tensors, device):
        return torch.tensor([each.data_ptr() for each in tensors], device=device)

    return [
        Mailbox(
            rank, rows[rank], flags[rank], addresses(rows, device), addresses(flags, device),
            torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.long, pin_memory=pinned),
        )
        for rank, device in enumerate(devices)
    ]  # fmt: skip


def boxes(devices, most=16):
    """(mailbox, candidates) of ranks on these devices."""
    count = len(devices)
    words = [torch.zeros(count, 2, most, WORDS, dtype=torch.long, device=device) for device in devices]
    flags = [torch.zeros(count, 2, most, dtype=torch.long, device=device) for device in devices]
    found = []
    for rank, (box, device) in enumerate(zip(mailboxes(devices, 16), devices, strict=True)):
        addresses = [torch.tensor([x.data_ptr() for x in each], device=device) for each in (words, flags)]
        found.append((box, Candidates(words[rank], flags[rank], *addresses)))
    return found
