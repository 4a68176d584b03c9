"""A corpus of archives that want to do more than hold files."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.submission.archive import ArchiveLimits, ArchiveRefused, unpack

AGENT = b"class Agent:\n    pass\n"


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_bytes(*members: tuple[tarfile.TarInfo, bytes], agent: bool = True, mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for info, content in (*members, *([member("agent.py", AGENT)] if agent else [])):
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zip_bytes(*members: tuple[str | zipfile.ZipInfo, bytes], agent: bool = True) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members:
            archive.writestr(info, content)
        if agent:
            archive.writestr("agent.py", AGENT)
    return stream.getvalue()


def zip_member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


@pytest.fixture
def unpacking(tmp_path: Path) -> Callable[..., Path]:
    def run(content: bytes, limits: ArchiveLimits | None = None) -> Path:
        archive = tmp_path / "archive"
        archive.write_bytes(content)
        return unpack(archive, tmp_path / "inside", limits)

    return run


def everything_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize(
    "content",
    [
        tar_bytes(member("weights/w.npz", b"123")),
        gzip.compress(tar_bytes(member("weights", type=tarfile.DIRTYPE), member("./weights//w.npz", b"123"))),
        zip_bytes(("weights/", b""), ("weights/w.npz", b"123")),
    ],
    ids=["tar", "tar.gz", "zip"],
)
def test_plain_files_and_directories_are_unpacked(content: bytes, unpacking, tmp_path: Path) -> None:
    directory = unpacking(content)

    assert directory == tmp_path / "inside"
    assert (directory / "agent.py").read_bytes() == AGENT
    assert (directory / "weights/w.npz").read_bytes() == b"123"


def test_a_python_without_filters_for_archives_unpacks_them_all_the_same(
    unpacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data_filter", "tar_filter", "fully_trusted_filter", "FilterError"):
        monkeypatch.delattr(tarfile, name, raising=False)  # as in Debian's Python 3.11.2

    assert (unpacking(tar_bytes()) / "agent.py").read_bytes() == AGENT


def test_long_names_and_other_scripts_are_kept(unpacking) -> None:
    name = f"{'a' * 120}/{'ü' * 60}.txt"

    for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w:gz", format=format_) as archive:
            for info, content in (member(name, b"x"), member("agent.py", AGENT)):
                archive.addfile(info, io.BytesIO(content))
        directory = unpacking(stream.getvalue())
        assert (directory / name).read_bytes() == b"x"
        for path in sorted(directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        directory.rmdir()


def test_only_the_owners_right_to_execute_is_kept(unpacking) -> None:
    directory = unpacking(tar_bytes(member("run.sh", b"#!", mode=0o6777), member("data", b"", mode=0o000)))

    assert stat.S_IMODE((directory / "run.sh").stat().st_mode) & 0o7000 == 0
    assert os.access(directory / "run.sh", os.X_OK)
    assert stat.S_IMODE((directory / "data").stat().st_mode) & 0o111 == 0
    assert (directory / "data").stat().st_uid == os.getuid()


@pytest.mark.parametrize("junk", ["__MACOSX/._x", "._submission", ".DS_Store", None])
def test_the_only_directory_at_the_top_may_hold_the_agent(
    junk: str | None, unpacking, tmp_path: Path
) -> None:
    extra = [] if junk is None else [(junk, b"")]

    directory = unpacking(zip_bytes(("submission/agent.py", AGENT), *extra, agent=False))

    assert directory == tmp_path / "inside" / "submission"


def test_without_an_agent_it_is_refused(unpacking) -> None:
    nested = tar_bytes(member("a/agent.py", AGENT), member("b/agent.py", AGENT), agent=False)

    with pytest.raises(ArchiveRefused, match=r"no agent\.py"):
        unpacking(nested)


HOSTILE = {
    "zip-slip": tar_bytes(member("../outside", b"x")),
    "zip-slip below": tar_bytes(member("a/../../outside", b"x")),
    "zip-slip directory": tar_bytes(member("../outside", type=tarfile.DIRTYPE)),
    "zip-slip in a zip": zip_bytes(("../outside", b"x")),
    "backslashes in a zip": zip_bytes(("..\\outside", b"x")),
    "absolute": tar_bytes(member("/tmp/outside", b"x")),
    "absolute in a zip": zip_bytes(("/tmp/outside", b"x")),
    "symlink": tar_bytes(member("link", type=tarfile.SYMTYPE, linkname="/etc"), member("link/x", b"x")),
    "symlink inside": tar_bytes(member("link", type=tarfile.SYMTYPE, linkname="agent.py")),
    "symlink in a zip": zip_bytes((zip_member("link", stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "hardlink": tar_bytes(member("link", type=tarfile.LNKTYPE, linkname="/etc/passwd")),
    "character device": tar_bytes(member("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "block device": tar_bytes(member("dev", type=tarfile.BLKTYPE, devmajor=8, devminor=0)),
    "fifo": tar_bytes(member("pipe", type=tarfile.FIFOTYPE)),
    "fifo in a zip": zip_bytes((zip_member("pipe", stat.S_IFIFO | 0o644), b"")),
    "unknown type": tar_bytes(member("odd", type=b"Z")),
    "sparse": tar_bytes(member("sparse", type=tarfile.GNUTYPE_SPARSE)),
    "duplicate": tar_bytes(member("agent.py", b"1")),
    "duplicate by another spelling": tar_bytes(member("./agent.py", b"1")),
    "file as directory": tar_bytes(member("a", b"1"), member("a/b", b"2")),
    "directory as file": tar_bytes(member("a", type=tarfile.DIRTYPE), member("a", b"2")),
    "directory over a file": tar_bytes(member("a", b"2"), member("a", type=tarfile.DIRTYPE)),
    "control characters": tar_bytes(member("a\x1b[2Jb", b"1")),
    "not UTF-8": tar_bytes(member("a\udcffb", b"1")),
    "long path": tar_bytes(member("/".join(["d" * 200] * 6), b"1")),
    "long name": tar_bytes(member("d" * 256, b"1")),
    "deep path": tar_bytes(member("/".join("d" * 40), b"1")),
    "no name": tar_bytes(member(".", b"1")),
    "not an archive": b"\x7fELF" + bytes(2000),
    "empty": b"",
    "text": b"hello " * 200,
    "gzip of text": gzip.compress(b"hello " * 200),
    "only a gzip head": b"\x1f\x8b",
    "only a zip head": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_archive_is_refused_and_leaves_nothing(content: bytes, unpacking, tmp_path: Path) -> None:
    with pytest.raises(ArchiveRefused) as caught:
        unpacking(content)

    assert str(caught.value).isprintable()
    assert everything_below(tmp_path) == {"archive"}


WHOLE = {
    "tar": tar_bytes(member("w", os.urandom(3000))),
    "tar.gz": gzip.compress(tar_bytes(member("w", os.urandom(3000)))),
    "zip": zip_bytes(("w", os.urandom(3000))),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_archive_is_refused(kind: str, kept: float, unpacking) -> None:
    content = WHOLE[kind]
    # A tar without the zeros at its end would still be whole.
    size = len(content.rstrip(b"\0")) if kind == "tar" else len(content)

    with pytest.raises(ArchiveRefused):
        unpacking(content[: int(size * kept)])


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_a_flipped_bit_is_found(kind: str, unpacking) -> None:
    content = bytearray(WHOLE[kind])
    content[1500] ^= 4

    with pytest.raises(ArchiveRefused):
        unpacking(bytes(content))


def test_bytes_behind_the_end_of_a_tar_are_refused(unpacking) -> None:
    with pytest.raises(ArchiveRefused):
        unpacking(gzip.compress(tar_bytes() + b"more" * 1000))


SMALL = ArchiveLimits(unpacked_bytes=10_000_000, files=50, ratio=20, ratio_free_bytes=100_000)


@pytest.mark.parametrize(
    "bomb",
    [
        gzip.compress(tar_bytes(member("zeros", bytes(3_000_000)))),
        zip_bytes(("zeros", bytes(3_000_000))),
        gzip.compress(tar_bytes() + bytes(300_000_000)),
        gzip.compress(gzip.compress(bytes(1000))),
    ],
    ids=["tar.gz", "zip", "zeros behind the end", "gzip in gzip"],
)
def test_a_bomb_is_refused(bomb: bytes, unpacking) -> None:
    with pytest.raises(ArchiveRefused):
        unpacking(bomb, SMALL)


@pytest.mark.parametrize("make", [tar_bytes, lambda *m: zip_bytes(*((i.name, c) for i, c in m))])
def test_sizes_and_counts_are_capped(make: Callable[..., bytes], unpacking) -> None:
    large = make(*(member(f"f{number}", os.urandom(100_000)) for number in range(3)))
    many = make(*(member(f"f{number}") for number in range(60)))

    with pytest.raises(ArchiveRefused, match="200000 bytes"):
        unpacking(large, ArchiveLimits(unpacked_bytes=200_000))
    with pytest.raises(ArchiveRefused, match="50 files and directories"):
        unpacking(many, SMALL)


def test_a_zip_of_very_many_files_is_refused_before_its_table_of_contents_is_read(unpacking) -> None:
    count = 150_000
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)
    table = b"".join(entry + b"%07d" % number for number in range(count))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFE, 0xFFFE, len(table), 4, 0)

    with pytest.raises(ArchiveRefused, match="its table of contents is too long"):
        unpacking(b"PK\3\4" + table + end)


def test_a_header_that_would_fill_the_memory_is_refused(unpacking) -> None:
    claim = member("x", type=tarfile.XHDTYPE)[0]
    claim.size = 2**33
    content = gzip.compress(claim.tobuf() + bytes(50_000_000))

    with pytest.raises(ArchiveRefused, match="header"):
        unpacking(content)


def test_a_zip_member_that_is_longer_than_it_says_is_refused(unpacking) -> None:
    content = bytearray(zip_bytes(("w", b"x" * 5000), agent=True))
    directory_at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"PK\x01\x02"))
    content[directory_at + 24 : directory_at + 28] = struct.pack("<I", 10)

    with pytest.raises(ArchiveRefused):
        unpacking(bytes(content))


def test_an_encrypted_member_is_refused(unpacking) -> None:
    content = bytearray(zip_bytes(("w", b"x"), agent=True))
    directory_at = content.index(b"PK\x01\x02")
    content[directory_at + 8] |= 1

    with pytest.raises(ArchiveRefused, match="encrypted"):
        unpacking(bytes(content))


def test_the_destination_must_be_new(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(tar_bytes())
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "mine").touch()

    with pytest.raises(FileExistsError):
        unpack(archive, tmp_path / "inside")

    assert everything_below(tmp_path) == {"archive", "inside", "inside/mine"}
