"""Read zip files: members by mapping where they are stored, and small ones by inflating."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib

from .entry import CheckpointError
from .files import MOST_HEADER, Mapped, short

MOST_RATIO = 100  # of the inflated bytes of all members to the file: weights reach about 2
FREE = 2**28  # inflated bytes that are always allowed: zeros compress a thousandfold


class Archive:
    """A zip file whose sizes and names were checked."""

    def __init__(self, file: Mapped) -> None:
        self.file = file
        try:
            self._zip = zipfile.ZipFile(
                file.stream()
            )  # kept open: opening reads the whole directory
            members = self._zip.infolist()
        except (*BROKEN, RecursionError) as error:
            raise CheckpointError(f"is a broken zip file: {short(error)}") from None
        self.members = {member.filename: member for member in members}
        if len(self.members) < len(members):
            raise CheckpointError("is a zip file with two members of one name")
        if sum(member.file_size for member in members) > FREE + MOST_RATIO * self.file.size:
            raise CheckpointError(
                f"is a zip file that inflates to more than {MOST_RATIO} times its size"
            )

    @property
    def names(self) -> list[str]:
        """Names of the members."""
        return list(self.members)

    def is_stored(self, name: str) -> bool:
        """Return True if the member is not compressed, so that it can be mapped."""
        return self._member(name).compress_type == zipfile.ZIP_STORED

    def extent(self, name: str) -> tuple[int, int]:
        """Return the offset and the number of bytes of an uncompressed member."""
        member = self._member(name)
        if not self.is_stored(name) or member.flag_bits & 1:
            raise CheckpointError(
                f"member {short(name)} is compressed, which torch.save never does"
            )
        header = self.file.read(member.header_offset, 30, "a member")
        if header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"member {short(name)} has no header")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = member.header_offset + 30 + lengths
        if start + member.file_size > self.file.size:
            raise CheckpointError(f"member {short(name)} ends past the end of the file")
        return start, member.file_size

    def read(self, name: str, most: int = MOST_HEADER) -> bytes:
        """Return the bytes of a member, inflated."""
        size = self._member(name).file_size
        if size > most:
            raise CheckpointError(f"member {short(name)} has {size:,} bytes")
        found = self.start(name, size)
        if len(found) != size:
            raise CheckpointError(f"member {short(name)} is shorter than it claims")
        return found

    def start(self, name: str, count: int) -> bytes:
        """Return the first bytes of a member. The stream may inflate to more than it claims."""
        try:
            with self._zip.open(self._member(name)) as source:
                return source.read(count)
        except BROKEN as error:
            raise CheckpointError(f"member {short(name)} is broken: {short(error)}") from None

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self.members:
            raise CheckpointError(f"member {short(name)} is missing")
        return self.members[name]


# What zipfile raises for bytes that are no zip file, a password, or an unknown compression.
BROKEN = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    IndexError,
    KeyError,
)
