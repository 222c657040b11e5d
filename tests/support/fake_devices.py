"""Several devices on a machine that has none: CPU tensors that carry a number, "cpu:0", "cpu:1", ...

Inside `with FakeDevices() as devices:` every op runs on the CPU with real values, after a check that its tensors are on
one device, as CUDA would make it. What crosses devices is recorded in `devices.copies`. Ordinary CPU tensors are the
host: mixing them with a device's is an error as well, but for scalars and explicit copies.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

HOST = torch.device("cpu")
COPY_ = torch.ops.aten.copy_.default
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)  # take indices from the host
COPIES = (torch.ops.aten._to_copy.default, COPY_)


class Copy(NamedTuple):
    source: torch.device
    destination: torch.device
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str  # the innermost function of eagle_fast that asked for it


class DeviceTensor(Tensor):
    """A CPU tensor `on_host` that says it is on a numbered device."""

    @staticmethod
    def __new__(cls, on_host: Tensor, device: torch.device):
        assert device.index is not None
        self = Tensor._make_wrapper_subclass(
            cls, on_host.shape, strides=on_host.stride(), storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype, device=device,
        )  # fmt: skip
        self.on_host = on_host
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}), None)

    def tolist(self):
        return self.on_host.tolist()

    def data_ptr(self):
        return 0  # no memory of its own; a view would give its offset

    def __repr__(self):
        return f"DeviceTensor({self.on_host!r}, {self.device})"


class FakeDevices(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.copies: list[Copy] = []

    def __enter__(self):
        self.functions = _Constructors()
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}), self.copies)

    def between_devices(self) -> list[Copy]:
        """The copies so far but those from and to the host, which are forgotten with them."""
        found = [each for each in self.copies if HOST not in (each.source, each.destination)]
        self.copies.clear()
        return found


class _Constructors(TorchFunctionMode):
    """torch.tensor(..., device=...) leaves no trace of the device in what it dispatches."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": HOST}).to(kwargs["device"])
        return func(*args, **kwargs)


def _run(func, args, kwargs, copies):
    tensors: list[Tensor] = []
    for each in (*args, *kwargs.values()):
        _map(tensors.append, each)
    devices = list(dict.fromkeys(each.device for each in tensors if each.dim() or each.device != HOST))
    given = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    destination = given or (devices[0] if devices else HOST)
    if func in COPIES:
        source = args[1].device if func is COPY_ else args[0].device
        if source != destination and copies is not None:
            copies.append(Copy(source, destination, tuple(args[0].shape), args[0].dtype, _caller()))
    elif len(devices) > 1 and not (func in INDEXING and devices[1:] == [HOST]):
        names = ", ".join(map(str, devices))
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {names}")
    if given is not None:
        kwargs["device"] = HOST
    out = func(*_map(_on_host, args), **{key: _map(_on_host, each) for key, each in kwargs.items()})
    if destination.index is None:
        return out
    wrapped = {id(each.on_host): each for each in tensors if isinstance(each, DeviceTensor)}
    return _map(lambda x: wrapped[id(x)] if id(x) in wrapped else DeviceTensor(x, destination), out)


def _map(function, x):
    """`function` of every tensor in x: what pytree does, for what ops take and return, and faster."""
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(_map(function, each) for each in x) if type(x) in (list, tuple) else x


def _on_host(x):
    return x.on_host if isinstance(x, DeviceTensor) else x


def _caller() -> str:
    frames = [each for each in traceback.extract_stack() if "/eagle_fast/" in each.filename]
    frames = [each for each in frames if not each.filename.endswith("transfers.py")]
    return frames[-1].name if frames else ""


def place(model: nn.Module, devices: dict[str, int]) -> nn.Module:
    """Put the modules of a CPU model on devices, in place, by a map as accelerate's: the longest prefix counts."""
    for name, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None:
                    continue
                path = f"{name}.{key}"
                prefix = max((each for each in devices if not each or f"{path}.".startswith(f"{each}.")), key=len)
                moved: Tensor = DeviceTensor(tensor.detach().clone(), torch.device("cpu", devices[prefix]))
                own[key] = nn.Parameter(moved, requires_grad=False) if own is module._parameters else moved
    return model


def layers_map(numbers: list[int], *, embedding: int | None = None, norm: int | None = None, head: int | None = None):
    """A map for the zoo's models of Llama's layout: decoder layer n on numbers[n]; the rest with its neighbours."""
    first, last = numbers[0], numbers[-1]
    return {
        "": first,
        "model.embed_tokens": first if embedding is None else embedding,
        **{f"model.layers.{n}": number for n, number in enumerate(numbers)},
        "model.norm": last if norm is None else norm,
        "model.rotary_emb": last,
        "lm_head": last if head is None else head,
    }


def routes(copies: list[Copy]) -> Counter:
    """How many copies went each way."""
    return Counter((each.source.index, each.destination.index) for each in copies)
