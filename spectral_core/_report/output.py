"""Write a file as a whole or not at all, and replace no file that is not ours."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from .entry import CheckpointError

MARK = b'<meta name="generator" content="spectral-report">'
_HEAD = 4096  # bytes in which a page has its mark


def checked(path: str, *, force: bool = False) -> Path:
    """Return the file that a page may be written to, or raise `CheckpointError`.

    A page that the command wrote is replaced. Another file is not, unless ``force`` is True: the
    path of a checkpoint in the wrong place would destroy it. A link is followed, and stays.
    """
    target = Path(os.path.realpath(path))
    try:
        reason = _objection(target, force)
    except OSError as error:
        reason = error.strerror or "cannot be read"
    if reason:
        raise CheckpointError(f"--html {path}: {reason}")
    return target


def _objection(target: Path, force: bool) -> str:
    """Return the reason why a file cannot or must not be written, or ""."""
    if target.exists() and not target.is_file():
        return "is not a regular file"
    if not target.parent.is_dir():
        return "its folder does not exist"
    if not os.access(target.parent, os.W_OK):
        return "its folder cannot be written to"
    if not force and target.exists() and not _is_page(target):
        return "exists and is no page of spectral-report; --force replaces it"
    return ""


def _is_page(path: Path) -> bool:
    """Return True if the file is empty, or a page that the command wrote."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return not head or MARK in head


def write(path: Path, text: str) -> None:
    """Write a file beside its place, and move it there: a reader never sees a part of it."""
    part = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    # os.open applies the umask, which the functions of tempfile do not.
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(file, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if path.exists():
            part.chmod(path.stat().st_mode & 0o777)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
