"""Small checkpoints of every format. `fuzz.py` changes their bytes."""

import json
import warnings

import numpy as np

rng = np.random.default_rng(0)
WEIGHTS = {
    "conv.weight": rng.standard_normal((4, 2, 3, 3)).astype(np.float32),
    "out.weight": rng.standard_normal((5, 6)).astype(np.float32),
    "out.bias": np.ones(5, np.float32),
}


def bfloat16(x):
    """Return the upper halves of float32 numbers: bfloat16 by truncation."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def safetensors(tensors, metadata=None):
    """Return a .safetensors file of (dtype, array of its bytes)."""
    header, data = {}, b""
    for name, (dtype, x) in tensors.items():
        place = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": place}
        data += x.tobytes()
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path):
    path.write_bytes(safetensors({name: ("F32", x) for name, x in WEIGHTS.items()}))


def write_bfloat16(path):
    path.write_bytes(safetensors({name: ("BF16", bfloat16(x)) for name, x in WEIGHTS.items()}))


def write_gguf(path):
    def text(x):
        return len(x).to_bytes(8, "little") + x.encode()

    def number(x, n):
        return x.to_bytes(n, "little")

    head = b"GGUF" + number(3, 4) + number(2, 8) + number(2, 8)
    head += text("general.alignment") + number(4, 4) + number(32, 4)
    head += text("names") + number(9, 4) + number(8, 4) + number(1, 8) + text("x")
    x = WEIGHTS["out.weight"]
    head += text("out.weight") + number(2, 4) + number(6, 8) + number(5, 8) + number(0, 4)
    head += number(0, 8)
    head += text("q.weight") + number(2, 4) + number(32, 8) + number(1, 8) + number(2, 4)
    head += number(128, 8)
    path.write_bytes(head + bytes(-len(head) % 32) + x.tobytes() + bytes(64))


def _torch():
    import torch

    return torch, {name: torch.from_numpy(x) for name, x in WEIGHTS.items()}


def write_torch(path):
    torch, tensors = _torch()
    torch.save(tensors, path)


def write_torch_legacy(path):
    torch, tensors = _torch()
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def write_torch_folder(path):
    import torch.distributed.checkpoint as dcp

    _, tensors = _torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=path, no_dist=True)


def write_flax(path):
    from flax.serialization import to_bytes

    path.write_bytes(to_bytes(channels_last("/")))


def write_hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        for name, x in channels_last("/").items():
            file[name] = x
        file.create_dataset("packed/kernel", data=np.ones((4, 4)), compression="gzip")


def write_orbax(path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as saver:
        saver.save(path, channels_last("_"))


def channels_last(separator):
    """Return the weights as Flax and Keras order their axes."""
    return {
        f"conv{separator}kernel": WEIGHTS["conv.weight"].transpose(2, 3, 1, 0).copy(),
        f"out{separator}kernel": WEIGHTS["out.weight"].T.copy(),
        f"out{separator}bias": WEIGHTS["out.bias"],
    }


# file name: how it is written, and the package that this needs
FORMATS = {
    "a.safetensors": (write_safetensors, None),
    "b.safetensors": (write_bfloat16, None),
    "a.npz": (lambda path: np.savez(path, **WEIGHTS), None),
    "b.npz": (lambda path: np.savez_compressed(path, **WEIGHTS), None),
    "a.npy": (lambda path: np.save(path, WEIGHTS["out.weight"]), None),
    "a.gguf": (write_gguf, None),
    "a.pt": (write_torch, "torch"),
    "b.pt": (write_torch_legacy, "torch"),
    "a.msgpack": (write_flax, "flax"),
    "a.weights.h5": (write_hdf5, "h5py"),
    "torch_folder": (write_torch_folder, "torch"),
    "orbax_folder": (write_orbax, "orbax"),
}
