"""Bounds of the memory that an interpreted kernel may touch: the storages of the tensors it is given."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter


class OutOfBounds(Exception):
    pass


def watch() -> None:
    """From now on every load and store of the interpreter is checked first: OutOfBounds, before memory is touched."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    copies, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    spans = np.zeros((0, 2), np.uint64)

    def copied(self: Any, arguments: Any, keywords: Any) -> Any:
        nonlocal spans
        result = copies(self, arguments, keywords)
        storages = [x.untyped_storage() for x in (*result[0], *result[1].values()) if hasattr(x, "untyped_storage")]
        starts = [(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages]
        spans = np.array(starts, np.uint64).reshape(-1, 2)
        return result

    def check(pointers: Any, mask: Any, what: str) -> None:
        at = pointers.data[mask.data.astype(bool)].astype(np.uint64).reshape(-1, 1)
        size = np.uint64(pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
        inside = (at >= spans[:, 0]) & (at + size <= spans[:, 1])
        if not inside.any(1).all():
            raise OutOfBounds(f"{what} {int((~inside.any(1)).sum())} elements out of bounds")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "a kernel reads")
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "a kernel writes")
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = copied
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
