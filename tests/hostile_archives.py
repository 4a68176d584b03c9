"""Archives of submissions that nobody should send, made quickly however large they claim to be."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

AGENT = b"class Agent:\n    def act(self, observation):\n        return 0\n"
ZEROS_BYTES = 10 * 2**30
MANY_FILES = 1_000_000

_GZIP = 16 + zlib.MAX_WBITS
_PIECE_BYTES = 64 * 2**20
_FILES_IN_A_PIECE = 50_000


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member with its content; `fields` are tarfile's, such as `type`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_gz(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A .tar.gz of a sound agent.py and these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, content in (member("agent.py", AGENT), *members):
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_zeros(path: Path) -> None:
    """A .tar.gz of 10 MB with one file of 10 GB: of the zeros, one piece is compressed and then repeated."""
    info = tarfile.TarInfo("weights.bin")
    info.size = ZEROS_BYTES
    piece = gzip.compress(bytes(_PIECE_BYTES), 9)  # gzip streams may follow each other
    with path.open("wb") as file:
        file.write(gzip.compress(info.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(ZEROS_BYTES // _PIECE_BYTES):
            file.write(piece)
        file.write(gzip.compress(bytes(2 * tarfile.BLOCKSIZE)))


def write_many_files(path: Path, count: int = MANY_FILES) -> None:
    """A .tar.gz of so many empty files: one header is made, of the others only name and sum differ."""
    with path.open("wb") as file:
        compressor = zlib.compressobj(1, zlib.DEFLATED, _GZIP)
        for piece in _headers(count):
            file.write(compressor.compress(piece))
        file.write(compressor.compress(bytes(2 * tarfile.BLOCKSIZE)) + compressor.flush())


def _headers(count: int) -> Iterator[bytes]:
    template = tarfile.TarInfo("f0000000").tobuf(tarfile.USTAR_FORMAT)
    sum_of_zeros = int(template[148:154], 8)
    middle, rest = template[8:148], template[156:]
    for start in range(0, count, _FILES_IN_A_PIECE):
        piece = []
        for number in range(start, min(start + _FILES_IN_A_PIECE, count)):
            digits = b"%07d" % number
            checksum = sum_of_zeros + sum(digits) - 7 * 48  # digits are the only bytes that differ
            piece += [b"f", digits, middle, b"%06o\0 " % checksum, rest]
        yield b"".join(piece)
