"""A second device made in Python: its tensors lie in main memory, but no operation takes them with others.

So what keeps some of its tensors elsewhere can be run to its numbers without a graphics card, and a tensor in the
wrong place is an error. Importing this has torch know the device for good: for a process of its own.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten


class Far(Tensor):
    """A tensor of the second device.

    Args:
        raw: What it stands for.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    sent = 0  # bytes that have come here from main memory
    waits: Counter = (
        Counter()
    )  # for what a program had to wait until the device had done all it was given

    @staticmethod
    def __new__(cls, raw):
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype,
            device=FAR, requires_grad=raw.requires_grad,
        )  # fmt: skip
        made.raw = raw
        return made

    def __repr__(self, *, tensor_contents=None):
        return f"Far({self.raw})"

    def data_ptr(self):
        """Where it lies."""
        return self.raw.data_ptr()

    def tolist(self):
        """Its numbers."""
        Far.waits["tolist"] += 1
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Do it in main memory, unless a tensor there is to take part that is not a mere number."""
        if any(
            kind is not Far and kind.__torch_dispatch__ is not cls.__base__.__torch_dispatch__
            for kind in types
        ):
            return NotImplemented  # for a kind of tensors that makes others of itself first
        kwargs = kwargs or {}
        given, spec = tree_flatten((args, kwargs))
        if function in WAITS or (function in BY_POSITIONS and _has_mask(args[1])):
            Far.waits[function.__name__] += 1
        raw = [value.raw if isinstance(value, cls) else value for value in given]
        if function is aten.copy_.default:
            target, source = given[:2]
            if isinstance(target, cls) and not isinstance(source, cls):
                Far.sent += source.nbytes
            if isinstance(source, cls) and not isinstance(target, cls):
                Far.waits["copy to main memory"] += 1
            raw[0].copy_(raw[1])
            return target
        if function is aten._has_compatible_shallow_copy_type.default:
            return all(isinstance(value, cls) for value in given)
        near = [v for v in given if isinstance(v, Tensor) and not isinstance(v, cls) and v.dim()]
        if near:
            raise RuntimeError(f"{function} got tensors of the second device and of main memory")
        goes = function is aten._to_copy.default and kwargs.get("device", FAR).type != FAR.type
        if goes:
            Far.waits["copy to main memory"] += 1
        raw = [torch.device("cpu") if isinstance(value, torch.device) else value for value in raw]
        args, kwargs = tree_unflatten(raw, spec)
        found = function(*args, **kwargs)
        known = {id(value.raw): value for value in given if isinstance(value, cls)}
        return (
            found
            if goes
            else tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else cls(t), found)
        )


WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default)
BY_POSITIONS = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


def _has_mask(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


class _Module(_DummyBackendModule):
    """What torch asks a device for in automatic precision, which checkpointing looks at."""

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.float16, torch.bfloat16]


def _empty(size, dtype=None, **_):
    return Far(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, dtype=None, **_):
    return Far(torch.empty_strided(size, stride, dtype=dtype))


_setup_privateuseone_for_python_backend("far", _Module())
FAR = torch.device("far", 0)
LIBRARY = torch.library.Library("aten", "IMPL", "PrivateUse1")  # holds on to what is registered
LIBRARY.impl("empty.memory_format", _empty)
LIBRARY.impl("empty_strided", _empty_strided)
