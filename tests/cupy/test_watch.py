"""Test the copies of the CuPy watch where there is no GPU, with a CuPy that only pretends."""

import gc
import importlib.util
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

WATCH = Path(__file__).parents[2] / "adapters" / "spectral_cupy" / "_watch.py"


class PinnedMemory(bytearray):
    """Host memory that can be weakly referenced."""


class Event:
    """An event of a device that does nothing until the test says so."""

    device_has_finished = False

    def __init__(self, disable_timing):
        assert disable_timing

    def record(self):
        pass

    @property
    def done(self):
        return self.device_has_finished

    def synchronize(self):
        pass


class DeviceArray:
    """An array on that device."""

    device = nullcontext()

    def __init__(self, values):
        self.values = np.asarray(values, dtype=np.float32)
        self.dtype, self.size, self.nbytes = self.values.dtype, self.values.size, self.values.nbytes

    def reshape(self, shape):
        return DeviceArray(self.values.reshape(shape))

    def get(self, out, blocking):
        assert not blocking
        out[...] = self.values


@pytest.fixture
def watch(monkeypatch):
    """Return the module of the watch, and a list of weak references to its pinned memory."""
    pinned = []

    def alloc_pinned_memory(size):
        memory = PinnedMemory(size)
        pinned.append(weakref.ref(memory))
        return memory

    cuda = SimpleNamespace(Event=Event, alloc_pinned_memory=alloc_pinned_memory)
    fake = SimpleNamespace(
        cuda=cuda,
        ndarray=DeviceArray,
        concatenate=lambda arrays: DeviceArray(np.concatenate([x.values for x in arrays])),
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(Event, "device_has_finished", False)
    spec = importlib.util.spec_from_file_location("spectral_cupy_watch", WATCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.pinned = pinned
    return module


def test_a_dropped_copy_keeps_its_memory_until_the_device_is_done(watch, monkeypatch):
    copy = watch.ArrayCopy.of([DeviceArray([1, 2]), DeviceArray(3)])
    np.testing.assert_array_equal(copy.values(), [1, 2, 3])
    del copy
    gc.collect()
    watch.ArrayCopy.of([DeviceArray(4)])
    assert [memory() is not None for memory in watch.pinned] == [True, True]
    monkeypatch.setattr(Event, "device_has_finished", True)
    watch.ArrayCopy.of([DeviceArray(5)])
    gc.collect()
    assert [memory() is not None for memory in watch.pinned] == [False, False, True]
