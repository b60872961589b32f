"""Run a model once and follow how far each value can move when the input moves.

Every call of a PyTorch function passes through a `TorchFunctionMode`, so the walk sees what the
model does, and not how it is written: control flow that depends on shapes is no obstacle, and a
weight that a layer computes (pruned, normalized) is the one that it uses. What the walk does not
know has no bound, and is named.

Two checks keep it honest. A value that was changed through another view has another version. And a
tensor that was made during the run, but by no function that the walk saw, is not taken for a
constant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from inspect import BoundArguments, signature
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_core.engine import Dense, Ledger, Stage, Value, in_series, log10_up, side_by_side

from ._linear_maps import Convolution, Matrix

CONSTANT = Value(-torch.inf)

_WORDS = """shape size dim ndim ndimension dtype device numel nelement layout requires_grad is_cuda
    is_floating_point is_complex is_contiguous stride storage_offset itemsize element_size __len__
    is_nested is_sparse is_quantized is_mps is_meta is_leaf grad_fn names get_device __hash__
    is_inference is_cpu is_xpu is_xla __repr__ __format__"""
_METADATA = frozenset(_WORDS.split())

# They make Python's numbers of a tensor.
_READERS = "bool item int float index tolist numpy complex contains array"

Handler = Callable[..., Value]


class NoBound(Exception):  # noqa: N818, for it is an answer and no error
    """A part of the network has no bound; the message says why."""


class Linear(Value):
    """The result of a linear map. Its norm is computed when more than a batch norm uses it."""

    def __init__(
        self, source: Value, map: Matrix | Convolution, name: str, shape: Any, stages: Any
    ) -> None:
        super().__init__(torch.nan, *stages)
        self.source, self.map, self.name, self.shape = source, map, name, shape


class Padded(Value):
    """The result of a padding that repeats samples around the image."""

    def __init__(
        self, tensor: Tensor, widths: Any, sizes: Any, gain: float, row: tuple[str, float]
    ) -> None:
        super().__init__(gain)
        self.tensor, self.widths, self.sizes = tensor, widths, sizes
        self.row: tuple[str, float] | None = row  # name and norm, until they are written down
        self._version = tensor._version

    @property
    def is_current(self) -> bool:
        """True if the tensor still holds the numbers that were padded."""
        return self.tensor._version == self._version


@dataclass
class _Record:
    tensor: Tensor  # kept, so that no other tensor gets its identity
    version: int
    value: Value | str  # or the reason why it must not be used


class Walk(TorchFunctionMode):
    """The values of a run, by tensor."""

    def __init__(
        self, model: nn.Module, handlers: Mapping[str, Handler], gains: Mapping[str, float]
    ) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.batch = 0
        self.tol = 1e-6
        self.births = _Births()
        self._handlers, self._gains = handlers, gains
        self._records: dict[int, _Record] = {}
        self._constants: dict[int, Tensor] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._open: list[nn.Module] = []
        self._closed: nn.Module | None = None  # a module that the walk does not look into
        self._function = ""

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Follow the model's modules and functions."""
        with ExitStack() as stack:
            scripts = torch.jit.ScriptModule
            for module in (one for one in model.modules() if not isinstance(one, scripts)):
                for handle in (
                    module.register_forward_pre_hook(self._enter, prepend=True),
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ):
                    stack.callback(handle.remove)
            stack.enter_context(self.births)
            stack.enter_context(self)
            yield

    def run(self, model: nn.Module, inputs: list[Tensor]) -> Any:
        """Run the model on inputs, and follow it."""
        self.batch = inputs[0].shape[0] if inputs[0].ndim else 0
        for x in inputs:
            self.record(x, Value(0.0, is_input=True))
        # Another tensor on the memory of an input is no constant.
        self.births.include(inputs)
        with self.running(model):
            return model(*inputs)

    def outputs(self, tensors: list[Tensor]) -> list[Value]:
        """Return the values of the model's outputs."""
        try:
            return [self.value(x) for x in tensors]
        except NoBound as reason:
            return [self.ledger.refuse("output", str(reason))]

    # What handlers use

    @property
    def kind(self) -> str:
        """The class of the layer, or the name of the function."""
        inner = self._open[-1] if self._open else None
        if inner is None or not type(inner).__module__.startswith("torch.nn"):
            return self._function
        is_layer = isinstance(inner, nn.MultiheadAttention) or not list(inner.children())
        return type(inner).__name__ if is_layer else self._function

    @property
    def name(self) -> str:
        """The path of the layer."""
        inner = self._open[-1] if self._open else None
        path = "" if inner is None else self._names.get(id(inner), "")
        if self.kind == self._function:
            return f"{path}.{self._function}".lstrip(".")
        return path or self.kind

    def record(self, tensor: Any, value: Value | str) -> None:
        """Set the value of a tensor."""
        self._records[id(tensor)] = _Record(tensor, tensor._version, value)

    def raw(self, x: Any) -> Value:
        """Return the value of a tensor or a number as it was recorded."""
        if not isinstance(x, Tensor):
            return CONSTANT
        found = self._records.get(id(x))
        if found is None:
            if id(x) not in self._constants and self.births.made(x):
                raise NoBound("uses a tensor that was made by code that the walk cannot see")
            return CONSTANT
        if found.version != x._version:
            raise NoBound("uses a tensor that was changed in place through another view of it")
        if isinstance(found.value, str):
            raise NoBound(found.value)
        return found.value

    def value(self, x: Any) -> Value:
        """Return the value of a tensor with its gain computed."""
        found = self.raw(x)
        if isinstance(found, Linear) and found.gain != found.gain:
            gain = self.ledger.layer(found.name, found.map.kind, *found.map.bounds())
            found.gain = in_series([found.source.gain, gain])
        if isinstance(found, Padded) and found.row is not None:
            name, norm = found.row
            self.ledger.layer(name, "pad, circular", 0.0, norm)
            found.row = None
        return found

    def depends(self, x: Any) -> bool:
        """Return True if a tensor depends on the input."""
        return self.raw(x) is not CONSTANT

    def samplewise(self, x: Tensor, out: Tensor) -> bool:
        """Return True if the first axis still is that of the samples."""
        return min(x.ndim, out.ndim) >= 2 and x.shape[0] == out.shape[0] == self.batch

    def chained(self, x: Tensor, out: Tensor, **how: Any) -> tuple[Value | None, tuple[Stage, ...]]:
        """Return parent and stages of a value that is made of one other, sample by sample."""
        if not self.samplewise(x, out):
            return None, ()
        sizes = prod(x.shape[1:]), prod(out.shape[1:])
        return self.value(x), (Stage(sizes, **how),) if how else ()

    def grown(
        self, x: Tensor, out: Tensor, lower: float, upper: float, dense: Dense | None = None
    ) -> Value:
        """Return the value of a linear map with known bounds, written down as a layer."""
        before = self.value(x)
        gain = self.ledger.layer(self.name, self.kind, lower, upper)
        stages = (None, ()) if dense is None else self.chained(x, out, dense=dense)
        return Value(in_series([before.gain, gain]), *stages)

    # What PyTorch calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        versions = [(x, x._version) for x in tensors]
        name = _name_of(func)
        if self._closed is not None or name in _METADATA:
            return func(*args, **kwargs)
        try:
            known = sum(self.depends(x) for x in tensors) > 0
        except NoBound as reason:
            return self._refused(func, args, kwargs, name, str(reason))
        if not known:
            out = func(*args, **kwargs)
            for x in tensors_in(out):
                self._constants[id(x)] = x
            return out
        handler = self._handlers.get(name)
        if handler is None:
            about = f"the walk does not know the function {resolve_name(func) or name}"
            if name in _READERS.split():
                about = "Python code reads values that depend on the input: a branch may jump"
            return self._refused(func, args, kwargs, name, about)
        return self._followed(func, handler, args, kwargs, name, versions)

    def _followed(
        self,
        func: Any,
        handler: Handler,
        args: Any,
        kwargs: Any,
        name: str,
        versions: list[tuple[Tensor, int]],
    ) -> Any:
        """Call a function that is known, and record its results."""
        self._function = name
        before = {id(x): self._records.get(id(x)) for x, _ in versions}
        out = func(*args, **kwargs)
        results = list(tensors_in(out))
        try:
            for x in (x for x, version in versions if x._version != version):
                record = before[id(x)]
                if record is None or record.value is CONSTANT or all(x is not y for y in results):
                    raise NoBound("writes into a tensor in place")
                self.record(x, record.value)  # the handler reads what was there before
            if not results:
                raise NoBound(f"{name} gives numbers that are no tensor")
            bound = _bound(handler, name, self, results[0], args, kwargs)
            value: Value | str = handler(*bound.args, **bound.kwargs)
        except NoBound as reason:
            value = self.ledger.refuse(self.name, str(reason))
        for x in results:
            real = x.dtype.is_floating_point
            self.record(x, value if real else f"{name} gives {x.dtype} that depends on the input")
        return out

    def _refused(self, func: Any, args: Any, kwargs: Any, name: str, reason: str) -> Any:
        self._function = name
        value = self.ledger.refuse(self.name, reason)
        out = func(*args, **kwargs)
        for x in tensors_in(out):
            self.record(x, value)
        return out

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._open.append(module)
        if self._closed is None and self._names.get(id(module)) in self._gains:
            self._closed = module

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self._closed is module:
            self._closed = None
            with torch._C.DisableTorchFunction():
                value = self._given(module, list(tensors_in((args, kwargs))))
                for x in tensors_in(out):
                    self.record(x, value)
        self._open.pop()

    def _given(self, module: nn.Module, inputs: list[Tensor]) -> Value:
        """Return the value that a module gives into which the walk does not look."""
        name = self._names[id(module)]
        if not inputs:
            return self.ledger.refuse(name, "its arguments hold no tensor that the walk can find")
        try:
            each = {id(x): x for x in inputs}.values()
            before = side_by_side([self.value(x).gain for x in each])
        except NoBound as reason:
            return self.ledger.refuse(name, str(reason))
        gain = self._gains[name]
        self.ledger.layer(name, f"{type(module).__name__}, given", 0.0, gain)
        return Value(in_series([before, log10_up(gain)]))


def _bound(
    handler: Handler, name: str, walk: Walk, out: Tensor, args: Any, kwargs: Any
) -> BoundArguments:
    """Return the arguments of a handler, with its defaults."""
    # PyTorch's own functions pass on an output that nobody gave.
    kwargs = {key: x for key, x in kwargs.items() if key != "out" or x is not None}
    try:
        found = signature(handler).bind(walk, out, *args, **kwargs)
    except TypeError as error:
        raise NoBound(f"the walk does not know this form of {name}: {error}") from None
    found.apply_defaults()
    return found


class _Births(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remember the memory of every tensor that is made while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():  # it may be called from code that the walk sees
            self._add(args, kwargs, out)
        return out

    def _add(self, args: Any, kwargs: Any, out: Any) -> None:
        before = {_memory(x) for x in tensors_in((args, kwargs))}
        self._made |= {_memory(x) for x in tensors_in(out)} - before

    def include(self, tensors: Iterable[Tensor]) -> None:
        """Treat tensors that were made before as made while this was active."""
        self._made |= set(map(_memory, tensors))

    def made(self, x: Tensor) -> bool:
        """Return True if a tensor's memory was made while this was active."""
        return _memory(x) in self._made


def _memory(x: Tensor) -> int:
    try:
        return int(x.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return -1


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)
    elif is_dataclass(tree) and not isinstance(tree, type):
        yield from tensors_in(vars(tree))


def _name_of(func: Any) -> str:
    """Return the plain name of a function: "add" for ``torch.add``, ``Tensor.add_`` and ``+=``."""
    path = (resolve_name(func) or getattr(func, "__name__", str(func))).split(".")
    if path[-1] == "__get__":
        return path[-2]
    name: str = path[-1]
    if name in _METADATA or name == "__getitem__" or name == "__setitem__":
        return name
    operator = re.fullmatch(r"__(\w+)__", name)
    return operator[1] if operator else name.removesuffix("_")
