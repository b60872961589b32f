"""Files in the formats of published data sets, with random images."""

import gzip

import numpy as np

from benchmarks.paper import data

RNG = np.random.default_rng(0)


def made(name, count=4):
    """Return the files of a data set, ``count`` images in each part, and what they must give."""
    shape = {"stl-10": (3, 96, 96), "fashion-mnist": (1, 5, 7)}.get(name, (3, 32, 32))
    classes, parts = 100 if name == "cifar-100" else 10, 6 if name == "cifar-10" else 2
    images = RNG.integers(256, size=(parts, count, *shape), dtype=np.uint8)
    labels = RNG.integers(classes, size=(parts, count), dtype=np.uint8)
    labels[:, 0] = classes - 1
    contents = []
    for x, y in zip(images, labels, strict=True):
        if name == "stl-10":
            contents += [x.swapaxes(2, 3).tobytes(), (y + 1).tobytes()]
        elif name == "fashion-mnist":
            for array in (x[:, 0], y):
                sizes = np.array(array.shape, ">u4").tobytes()
                contents.append(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
        else:
            both = np.stack([y // 5, y] if classes == 100 else [y], axis=1)
            contents.append(np.hstack([both, x.reshape(len(x), -1)]).tobytes())
    train = data.normalized(np.concatenate(images[:-1])), np.concatenate(labels[:-1])
    read = (*train, data.normalized(images[-1]), labels[-1], classes, name == "stl-10")
    return dict(zip(data.SOURCES[name].files, contents, strict=True)), read


def write(folder, files, packed=False):
    """Write the files into a folder, and return it."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder
