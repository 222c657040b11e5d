"""What the wrappers ask of their arguments: attributes alone, never a value on the device; words only on failure.

    rows, width = tensor("x", x, "R H", FLOATS, layout=BY_ROWS)
    tensor("weight", weight, "H", FLOATS, (width,), near=("x", x))

raises, for a weight that is a view of every second of 128 numbers,

    ValueError: weight is float32 [64], strides [2], on cpu; expected contiguous float16, bfloat16, float32 or float64
    [H] = [128] on cpu, to fit x: float32 [4, 128], contiguous, on cpu
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

STRIDED = torch.strided
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)  # the last for the twins: kernels compute in fp32
FLOAT32, INT64, INTEGERS = (torch.float32,), (torch.int64,), (torch.int32, torch.int64)
# How a tensor lies in memory, as the message says it; BY_ROWS: its last dimension is contiguous.
WHOLE, BY_ROWS, ANY = "contiguous ", "row-contiguous ", ""
LARGEST = 2**31 - 1  # of integers that kernels count with
TINY, HUGE = 1e-15, 1e15  # of factors: their products and quotients are fp32 numbers
MOST_BLOCKS = 65535  # along the second and third dimension of a CUDA grid

Dtypes = tuple[torch.dtype, ...]
Sizes = tuple[int | None, ...]
Named = tuple[str, Tensor]


def tensor(
    name: str, x: Any, dims: str, dtypes: Dtypes | None, sizes: Sizes | None = None, *, near: Named | None = None,
    layout: str = WHOLE, empty: bool = False,
) -> torch.Size:  # fmt: skip
    """The shape of x, a strided tensor [dims], "..." for any that lead, of these sizes and dtypes (None: any).

    near: the tensor that sizes come from and whose device it must share. empty: only the last size has to be over 0.
    """
    if isinstance(x, Tensor) and x.layout is STRIDED and not x.is_nested:
        shape = x.shape
        if (
            (_has_dims(shape, dims) if sizes is None else shape == sizes or _matches(shape, sizes))
            and (dtypes is None or x.dtype in dtypes)
            and (x.numel() or (empty and shape[-1]))
            and (near is None or x.device == near[1].device)
            and (layout is ANY or x.is_contiguous() or (layout is BY_ROWS and (x.stride(-1) == 1 or shape[-1] == 1)))
            and not x.is_neg()
        ):
            return shape
    raise ValueError(f"{name} is {described(x)}; expected {_wanted(dims, dtypes, sizes, near, layout)}")


def whole(name: str, x: Any, least: int = 0, most: int = LARGEST, why: str = "") -> int:
    """x, an integer from `least` to `most`, no bool; `why` the message says so."""
    if type(x) is int or (isinstance(x, Integral) and not isinstance(x, bool)):
        value = int(x)
        if least <= value <= most:
            return value
    raise ValueError(f"{name} is {described(x)}; expected a whole number from {least} to {most}{why}")


def number(name: str, x: Any, least: float = TINY, most: float = HUGE, *, or_zero: bool = False) -> float:
    """x, a number from `least` to `most`, or 0, but no bool."""
    real = type(x) is float or (isinstance(x, Real) and not isinstance(x, bool))
    if real and (least <= x <= most or (or_zero and x == 0)):
        return x if type(x) in (int, float) else float(x)
    raise ValueError(f"{name} is {described(x)}; expected {'0 or ' * or_zero}a number from {least} to {most}")


def flag(name: str, x: Any) -> bool:
    """x, a bool."""
    if isinstance(x, bool):
        return x
    raise ValueError(f"{name} is {described(x)}; expected True or False")


def given_together(**arguments: Any) -> bool:
    """Whether they are given; all or none must be."""
    missing = [name for name, x in arguments.items() if x is None]
    if missing and len(missing) < len(arguments):
        names, absent = (", ".join(each) for each in (arguments, missing))
        raise ValueError(f"give {names} together, or none of them: {absent} of them is None")
    return not missing


def device(name: str, x: Any) -> torch.device:
    """x, a torch.device."""
    if isinstance(x, torch.device):
        return x
    raise ValueError(f"{name} is {described(x)}; expected a torch.device")


def broadcast(dtypes: Dtypes, **tensors: Tensor) -> torch.Size:
    """The shape that tensors of any shapes, of these dtypes and on one device, broadcast to."""
    (first, like), *_ = tensors.items()
    for name, x in tensors.items():
        tensor(name, x, "...", dtypes, near=None if x is like else (first, like), layout=ANY)
    try:
        return torch.broadcast_shapes(*(x.shape for x in tensors.values()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{shapes}: expected shapes that broadcast together") from error


def written(outputs: Sequence[Named], inputs: Iterable[tuple[str, Tensor | None]]) -> None:
    """The outputs may be written in place: none has an element twice, autograd holds none, and each lies apart from all
    others and from the inputs."""
    for name, x in outputs:
        if not (x.is_contiguous() or _elements_are_apart(x)):
            raise ValueError(f"{name} is {described(x)}; it is written, but its elements share memory: clone it")
        if x.requires_grad and torch.is_grad_enabled() and (x.is_leaf or (x._base is not None and x._base.is_leaf)):
            raise ValueError(f"{name} is a leaf that requires grad, and is written in place: detach it")
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} was made in inference mode, and is written in place outside of it: clone it")
    places = [(name, x, *_span(x)) for name, x in (*outputs, *inputs) if x is not None]
    for index, (name, x, start, end) in enumerate(places[: len(outputs)]):
        for other_name, other, other_start, other_end in places[index + 1 :]:
            if start < other_end and other_start < end and not _interleaved(x, other, other_start - start):
                both = f"{name}, {described(x)}, and {other_name}, {described(other)}"
                raise ValueError(f"{both}, share memory, and {name} is written: clone one of them")


def described(x: Any) -> str:
    """An argument as messages show it."""
    if not isinstance(x, Tensor):
        if isinstance(x, int) and x.bit_length() > 100:
            return f"an integer of {x.bit_length()} bits"
        return f"{repr(x)[:60]} ({type(x).__name__})"
    dtype = str(x.dtype).removeprefix("torch.")
    if x.is_nested or x.layout is not torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        return f"a {kind} tensor of {dtype}"
    lies = "contiguous" if x.is_contiguous() else f"strides {list(x.stride())}"
    negated = ", a negated view (see resolve_neg)" if x.is_neg() else ""
    return f"{dtype} {list(x.shape)}, {lies}, on {x.device}{negated}"


def _wanted(
    dims: str, dtypes: Dtypes | None, sizes: Sizes | None, near: Named | None, layout: str
) -> str:  # fmt: skip
    names = ["a tensor"] if dtypes is None else [str(dtype).removeprefix("torch.") for dtype in dtypes]
    kinds = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    shape = f"[{', '.join(dims.split())}]"
    if sizes is None:
        shape += " without empty dimensions"
    else:
        shape += f" = [{', '.join('any' if size is None else str(size) for size in sizes)}]"
    where = "" if near is None else f" on {near[1].device}, to fit {near[0]}: {described(near[1])}"
    return f"{layout}{kinds} {shape}{where}"


def _has_dims(shape: torch.Size, dims: str) -> bool:
    more = len(shape) - dims.count(" ") - 1
    return more == 0 or (dims[0] == "." and more >= -1)


def _matches(shape: torch.Size, sizes: Sizes) -> bool:
    if len(shape) != len(sizes):
        return False
    for size, wanted in zip(shape, sizes, strict=True):  # noqa: SIM110, a generator takes twice the time
        if wanted is not None and size != wanted:
            return False
    return True


def _elements_are_apart(x: Tensor) -> bool:
    """Whether each dimension steps over all that the smaller ones reach: a view that does not is taken to overlap."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return True


def _span(x: Tensor) -> tuple[int, int]:
    """The bytes from its first to its last element."""
    start = x.data_ptr()
    if not start:  # no memory of its own
        return 0, 0
    if x.is_contiguous():
        return start, start + x.nbytes
    reach = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return start, start + (reach + 1) * x.element_size()


def _interleaved(x: Tensor, other: Tensor, distance: int) -> bool:
    """Whether two views of one shape and dtype, as keys and values are, lie in each other's gaps."""
    size = x.element_size()
    if x.shape != other.shape or x.stride() != other.stride() or x.dtype != other.dtype or distance % size:
        return False
    steps = sorted(((stride, n) for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1), reverse=True)
    return _elements_are_apart(x) and not _reaches(distance // size, steps)


def _reaches(distance: int, steps: list[tuple[int, int]]) -> bool:
    """Whether some number of steps, fewer than n of each stride in either direction, go the distance."""
    if not steps:
        return distance == 0
    (stride, n), rest = steps[0], steps[1:]
    near = {distance // stride, -(-distance // stride)}  # others leave more than the smaller strides reach
    return any(abs(count) < n and _reaches(distance - count * stride, rest) for count in near)
