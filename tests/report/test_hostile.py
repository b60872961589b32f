"""Files that lie, are broken, or hold code: one line says so, and nothing else happens."""

import io
import json
import os
import pickle
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_core as sc
from checkpoints import FORMATS, safetensors
from fuzz import attempt, check, mutated, within
from spectral_core._report import files, msgpack_files, pickles, zips
from spectral_core._report.command import main
from spectral_core._report.folders import opened
from spectral_core._report.pickles import loads


def header(text):
    return len(text).to_bytes(8, "little") + text


def lying(**fields):
    tensor = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **fields}
    return header(str({"w": tensor}).replace("'", '"').encode()) + bytes(16)


SAFETENSORS = {
    "empty": (b"", "is empty"),
    "cut": (b"\x00\x01", "ends past the end"),
    "long header": ((2**60).to_bytes(8, "little") + b"{}", "ends past the end"),
    "no JSON": (header(b"{'}"), "no JSON"),
    "deep JSON": (header(b'{"a":' + b"[" * 100_000), "no JSON"),
    "list": (header(b"[]      "), "no JSON object"),
    "twice": (header(b'{"a": 1, "a": 2}'), "occurs twice"),
    "past the end": (lying(data_offsets=[0, 17]), "ends past the end"),
    "huge": (lying(shape=[2**40, 2**40]), "but its shape needs"),
    "negative": (lying(shape=[-2, -2]), "no size"),
    "backwards": (lying(data_offsets=[16, 0]), "no pair of offsets"),
    "float": (lying(shape=[2.0, 2]), "no size"),
    "many axes": (lying(shape=[1] * 100), "at most"),
}


def refused(path, capsys):
    """Return the one line of the command that refuses a path."""
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", SAFETENSORS)
def test_headers_that_lie(name, tmp_path, capsys):
    content, message = SAFETENSORS[name]
    (tmp_path / "a.safetensors").write_bytes(content)
    assert message in refused(tmp_path / "a.safetensors", capsys)


def test_a_file_is_not_claimed_again_and_again(tmp_path, capsys):
    x = np.zeros((512, 512), np.float32)
    text = str(
        {
            f"w{i}": {"dtype": "F32", "shape": [512, 512], "data_offsets": [0, x.nbytes]}
            for i in range(5000)
        }
    ).replace("'", '"')
    (tmp_path / "a.safetensors").write_bytes(header(text.encode()) + x.tobytes())
    assert "claim" in refused(tmp_path / "a.safetensors", capsys)


class Code:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_no_code_of_a_pickle_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps({"w": Code()}, protocol)
        with pytest.raises(sc.SpectralError, match=r"names '(posix|nt).system'"):
            loads(io.BytesIO(data))
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path / "a.pt", capsys)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("b/data.pkl", data)
    refused(tmp_path / "b.pt", capsys)
    np.save(tmp_path / "a.npy", np.array([Code()]), allow_pickle=True)
    assert sc.report(tmp_path / "a.npy").skipped == {"a": "objects: a pickle, which is never read"}
    assert not (tmp_path / "hacked").exists()


BAD_PICKLES = {
    "memo": b"\x80\x02]r\xff\xff\xff\xff.",  # the standard unpickler allocates 64 GB
    "no mark": b"\x80\x02]e.",
    "empty": b".",
    "string": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    "get": b"\x80\x02h\x05.",
    "instance": b"(ios\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_broken_pickles(name):
    if name == "memo":
        assert loads(io.BytesIO(BAD_PICKLES[name])) == []
        return
    with pytest.raises(sc.SpectralError):
        loads(io.BytesIO(BAD_PICKLES[name]))


def test_containers_that_hold_themselves(tmp_path):
    data = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."  # d = {}; d["a"] = d
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", data)
    assert len(sc.report(tmp_path / "a.pt")) == 0


def test_zip_bombs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zips, "FREE", 2**20)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((1000, 1000)))
        for i in range(2):
            archive.writestr(f"w{i}.npy", buffer.getvalue())
    assert "inflates" in refused(tmp_path / "a.npz", capsys)


def test_paths_that_lead_out(tmp_path, capsys):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(safetensors({"w": ("F32", np.eye(2, dtype=np.float32))}))
    folder = tmp_path / "model"
    folder.mkdir()
    for target in ("../secret.safetensors", str(secret), "..", ""):
        text = str({"weight_map": {"w": target}}).replace("'", '"')
        (folder / "model.safetensors.index.json").write_text(text)
        assert "no file beside it" in refused(folder, capsys)


def test_links_and_folders(tmp_path, capsys):
    refused(tmp_path, capsys)
    refused(tmp_path / "absent", capsys)
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    refused(tmp_path / "loop.pt", capsys)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "back").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "loop.pt").unlink()
    refused(tmp_path, capsys)
    os.mkfifo(tmp_path / "pipe.pt")
    assert "not a regular file" in refused(tmp_path / "pipe.pt", capsys)


@pytest.mark.skipif(find_spec("h5py") is None, reason="h5py is not installed")
def test_links_of_hdf5_are_not_followed(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["w"] = np.eye(2)
        file["there"] = h5py.ExternalLink("/etc/passwd", "/w")
        file["soft"] = h5py.SoftLink("/")
        file["again"] = file["/"]  # a hard link to the root
    report = sc.report(tmp_path / "a.h5")
    assert list(report) == ["w"]
    assert set(report.skipped) == {"there", "soft"}


def test_names_cannot_write_to_the_terminal(tmp_path, capsys):
    bad = safetensors({"\x1b[2J\nfine": ("F32", np.eye(2))})
    (tmp_path / "a.safetensors").write_bytes(bad)
    assert "\x1b" not in refused(tmp_path / "a.safetensors", capsys)


def test_small_values_do_not_fill_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 1000)
    monkeypatch.setattr(msgpack_files, "_MOST_VALUES", 1000)
    monkeypatch.setattr(files, "_MOST_VALUES", 1000)
    bad = {
        "a.pt": b"\x80\x02(" + b"]" * 2000 + b"l.",
        "a.msgpack": b"\x81\xa1a\xdc\x07\xd0" + b"\x90" * 2000,
        "a.safetensors": header(b'{"a": [' + b"[]," * 2000 + b"[]]}"),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        assert "more than 1,000" in refused(tmp_path / name, capsys)


def test_names_in_a_table_cannot_write_to_the_terminal(tmp_path, capsys):
    bad = safetensors({"\x1b[2J\nx\ud800\x9b": ("F64", np.eye(2))})
    (tmp_path / "a.safetensors").write_bytes(bad)
    for option in ([], ["--csv"], ["--json"], ["--fail-above", "0.1"]):
        main([str(tmp_path / "a.safetensors"), *option])
        text = "".join(capsys.readouterr())
        assert text.encode()
        assert all(c.isprintable() or c == "\n" for c in text)


BAD_KEYS = {
    "deep": b"\x80\x02ccollections\nOrderedDict\n])" + b"\x85" * 300_000 + b"N\x86a\x85R.",
    "long": b"\x80\x02}X" + (2000).to_bytes(4, "little") + b"a" * 2000 + b"Ns.",
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_keys_that_are_no_names(name):
    with pytest.raises(sc.SpectralError):
        loads(io.BytesIO(BAD_KEYS[name]))


def test_long_names(tmp_path, capsys):
    bad = safetensors({"_" * 5000: ("F64", np.eye(2))})
    (tmp_path / "a.safetensors").write_bytes(bad)
    assert "5,000 characters" in refused(tmp_path / "a.safetensors", capsys)


@pytest.mark.parametrize("most", [0, 2**26], ids=["mapped", "copied"])
@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.npy", "a.gguf"])
def test_files_that_are_cut_while_they_are_read(name, most, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_COPIED", most)
    path = tmp_path / name
    FORMATS[name][0](path)
    entries = [x for x in opened(path).entries if not x.skip]
    path.write_bytes(path.read_bytes()[:50])
    for entry in entries:
        with pytest.raises(sc.SpectralError, match="cut after"):
            entry.load()
    path.unlink()
    with pytest.raises((sc.SpectralError, OSError)):
        entries[0].load()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_devices_and_folders_in_place_of_files(tmp_path, capsys):
    assert "not a regular file" in refused("/dev/zero", capsys)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path / "a", capsys)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".metadata").symlink_to("/dev/zero")
    (tmp_path / "b" / "back").symlink_to(tmp_path / "b", target_is_directory=True)
    assert "without weights" in refused(tmp_path / "b", capsys)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "w.safetensors").mkdir()
    index = '{"weight_map": {"w": "w.safetensors"}}'
    (tmp_path / "c" / "model.safetensors.index.json").write_text(index)
    assert "missing" in refused(tmp_path / "c", capsys)


def test_nested_zip_files_are_not_opened(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", bytes(10**6))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("inner.zip", inner.getvalue())
        archive.writestr("w.npy", npy(np.eye(2)))
    report = sc.report(tmp_path / "a.npz")
    assert list(report) == ["w"]
    assert report.skipped == {"inner.zip": "not an array"}


def npy(x):
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def test_zip_members_that_overlap(tmp_path, monkeypatch, capsys):
    """Let every entry of the directory point at one member (Fifield 2019)."""
    monkeypatch.setattr(zips, "FREE", 0)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w000.npy", npy(np.zeros((60, 60))))
    data = buffer.getvalue()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry, count = data[start:end], 300
    directory = b"".join(entry.replace(b"w000", f"w{i:03}".encode()) for i in range(count))
    tail = bytearray(data[end:])
    tail[8:12] = count.to_bytes(2, "little") * 2
    tail[12:16] = len(directory).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(data[:start] + directory + tail)
    assert "inflates" in refused(tmp_path / "a.npz", capsys)


def test_a_huge_shape_with_zero_bytes(tmp_path, capsys):
    fields = {"dtype": "F32", "shape": [2**61, 0], "data_offsets": [0, 0]}
    (tmp_path / "a.safetensors").write_bytes(header(json.dumps({"w": fields}).encode()))
    assert sc.report(tmp_path / "a.safetensors").skipped == {"w": "empty"}
    fields = {"dtype": "F4", "shape": [2**61, 2**61], "data_offsets": [0, 0]}
    (tmp_path / "a.safetensors").write_bytes(header(json.dumps({"w": fields}).encode()))
    assert "not a dtype" in sc.report(tmp_path / "a.safetensors").skipped["w"]


def test_names_that_turn_the_line_around(tmp_path, capsys):
    name = "\u202egpj.\u2066x\u200b\x85"  # bidi, invisible, and a line end of its own
    (tmp_path / "a.safetensors").write_bytes(safetensors({name: ("F64", np.eye(2))}))
    path = str(tmp_path / "a.safetensors")
    for options in ([], ["--csv"], ["--compare", path], ["--compare", path, "--csv"]):
        assert main([path, *options]) == 0
        out = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in out)
    assert main([path, "--fail-above", "0.1"]) == 1
    assert capsys.readouterr().err.rstrip("\n").isprintable()


FILES = [name for name in FORMATS if "folder" not in name]


@pytest.fixture(scope="module", params=FILES)
def good(request, tmp_path_factory):
    write, package = FORMATS[request.param]
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    path = tmp_path_factory.mktemp("good") / request.param
    write(path)
    return path, path.read_bytes()


@settings(max_examples=25)
@given(data=st.data())
def test_changed_bytes_raise_nothing_else(good, data):
    path, content = good

    def choose(n):
        return data.draw(st.integers(0, n - 1))

    changed = within(content, choose) if choose(2) else None
    path.write_bytes(mutated(content, choose) if changed is None else changed)
    check(attempt(path))


@settings(max_examples=25)
@given(content=st.binary(max_size=200))
def test_any_bytes_raise_nothing_else(good, content):
    path, _ = good
    path.write_bytes(content)
    check(attempt(path))
