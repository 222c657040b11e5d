"""Sums along K in an order of one's own, in fp32 as matrix instructions have them."""

import torch

STEP = 16  # columns of an instruction


def sum_in_order(x, weight, parts):
    """x [R, K] times weight [N, K] transposed, step by step in so many parts, which are added up at the end."""
    steps = [
        (one.double() @ other.double().T).float()
        for one, other in zip(x.split(STEP, 1), weight.split(STEP, 1), strict=True)
    ]
    sums = []
    for part in range(parts):
        of_part = steps[len(steps) * part // parts : len(steps) * (part + 1) // parts]
        total = torch.zeros_like(of_part[0])
        for step in of_part:
            total += step
        sums.append(total)
    return sum(sums[1:], sums[0])
