"""A fuzzer over every reader: `PYTHONPATH=.:tests/support python tests/support/fuzz.py 100000`.

It changes, inserts and cuts bytes of good files, of what is inside of their zip members and behind
their JSON, and of single files of folders. Then it reads and measures what comes out. It asserts:

- nothing is raised but a `SpectralError`, whose message is one line and prints;
- the JSON of a report that is made can be parsed;
- the process gets no more than `MEMORY` bytes beyond what it has at the start, so that a large
  allocation raises `MemoryError`;
- an input needs no more than `SECONDS`.

The first input that breaks one is kept in the working folder, and its name is printed. The files
are in the memory (/dev/shm) where there is one: a disk needs most of the time otherwise.
"""

import argparse
import io
import json
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import spectral_core as sc
from checkpoints import FORMATS

MEMORY = 2**30
SECONDS = 10
_TOKENS = (
    *(n.to_bytes(size, order) for n in (0, 1, 2**31 - 1, 2**31) for size in (4, 8)
      for order in ("little", "big")),
    *(bytes([0xFF] * n) for n in (1, 2, 4, 8)), bytes(7) + b"\x80", bytes([0xFF] * 7) + b"\x7f",
    b"[", b"]", b"{", b"}", b'"', b":", b",", b"-1", b"1e9", b"9" * 30, b"null", b"[]", b"{}",
    b"../", b"\x00", b"\x1b[2J", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x93NUMPY", b"OHDR",
    b"(", b")", b"t", b"R", b"b", b"}", b"]", b"s", b"u", b"0", b"2", b"Q", b"\x85", b"\x86",
    b"\x87", b"cos\nsystem\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"h\x00", b"q\x00", b"\x94", b"N",
    b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01",
    b"F32", b"BF16", b"F8_E4M3", b"I64", b"<f8", b"|O", b"|V2", b">f4", b"<c16", b"bfloat16",
)  # fmt: skip


def attempt(path):
    """Read and measure; return the JSON, or the one line that says why not."""
    try:
        return json.loads(sc.report(path, convolutions=False).to_json())
    except sc.SpectralError as error:
        return str(error)


def mutated(data, choose):
    """Return bytes with a few changes. ``choose(n)`` returns a number below n."""
    found = bytearray(data)
    for _ in range(1 + choose(4)):
        place = choose(len(found)) if found else 0
        action = choose(8)
        if action == 0:
            del found[place : place + 1 + choose(16)]
        elif action == 1:
            found[place:place] = bytes(choose(256) for _ in range(1 + choose(8)))
        elif action == 2:
            del found[place:]
        elif action == 3:
            token = _TOKENS[choose(len(_TOKENS))]
            found[place : place + len(token)] = token
        elif action == 4:
            found[place:place] = _TOKENS[choose(len(_TOKENS))]
        elif action == 5:
            other = choose(len(found)) if found else 0
            found[place:place] = found[other : other + 1 + choose(64)]
        elif found:
            found[place] = choose(256) if action == 6 else (0, 1, 0x7F, 0x80, 0xFF)[choose(5)]
    return bytes(found)


def within(data, choose):
    """Return a file whose frame is sound around changed content, or None where it has no frame."""
    if data.startswith(b"PK\x03\x04"):
        return _rezipped(data, choose)
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and length < len(data):
        header = mutated(data[8 : 8 + length], choose)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return None


def _rezipped(data, choose):
    """Return a zip file in which one member is changed, with its right size and checksum."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        members = old.infolist()
        chosen = choose(len(members))
        # data.pkl comes first, and everything else depends on it.
        chosen = 0 if choose(2) else chosen
        for i, member in enumerate(members):
            content = old.read(member)
            new.writestr(member, mutated(content, choose) if i == chosen else content)
    return target.getvalue()


def small_files(folder, name):
    """Return the relative paths of a good file, or of the files of a folder, and their bytes."""
    path = Path(folder, name)
    if path.is_file():
        return {name: path.read_bytes()}
    files = [x for x in path.rglob("*") if x.is_file()]
    return {str(x.relative_to(folder)): x.read_bytes() for x in sorted(files)}


def one(folder, files, choose):
    """Change one file of a checkpoint; return its relative path and the new bytes."""
    place = list(files)[choose(len(files))]
    changed = within(files[place], choose) if choose(2) else None
    changed = mutated(files[place], choose) if changed is None else changed
    Path(folder, place).write_bytes(changed)
    return place, changed


def check(found):
    """Raise if a message is not one printable line."""
    if isinstance(found, str) and not (found.isprintable() and len(found) < 2000):
        raise AssertionError(f"a message that is no line: {found!r}")


def run(job):
    """Run some inputs; return how many of each format were read, and the slowest time."""
    total, names, seed = job
    choose = random.Random(seed).randrange
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        good = {}
        for name in names:
            FORMATS[name][0](Path(folder, name))
            good[name] = small_files(folder, name)
        limit(MEMORY)
        read, slowest = Counter(), (0.0, "")
        for i in range(total):
            name = list(good)[i % len(good)]
            place, changed = one(folder, good[name], choose)
            start = time.perf_counter()
            try:
                signal.alarm(SECONDS)
                found = attempt(Path(folder, name))
                check(found)
                signal.alarm(0)
            except BaseException as error:
                signal.alarm(0)
                kept = Path(f"input-{seed}-{i}-{name}")
                shutil.copytree(Path(folder, name), kept) if "/" in place else kept.write_bytes(
                    changed
                )
                raise RuntimeError(f"input {i} of seed {seed}: {place}, kept as {kept}") from error
            slowest = max(slowest, (time.perf_counter() - start, name))
            read[name] += not isinstance(found, str)
            if "/" in place:
                Path(folder, place).write_bytes(good[name][place])
    return read, slowest


def limit(more):
    """Let the process have that many bytes of address space more than now, and bound its time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    signal.signal(signal.SIGALRM, _too_long)


def _too_long(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("total", type=int, nargs="?", default=1000)
    parser.add_argument("formats", nargs="*", help="files of checkpoints.FORMATS; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    names = [
        name
        for name in options.formats or FORMATS
        if FORMATS[name][1] is None or find_spec(FORMATS[name][1])
    ]
    each = -(-options.total // options.workers)
    jobs = [(each, names, options.seed + i) for i in range(options.workers)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        found = pool.map(run, jobs) if options.workers > 1 else [run(jobs[0])]
    read = sum((counter for counter, _ in found), Counter())
    seconds, slow = max(slowest for _, slowest in found)
    print(f"{each * options.workers} inputs; readable: {dict(read)}")
    print(f"the slowest needed {seconds:.3f} s: {slow}")


if __name__ == "__main__":
    sys.exit(main())
