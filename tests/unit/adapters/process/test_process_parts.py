"""The parts of the process adapter: logs, locks, handles, process identities, disk use."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.adapters.process.handles import Handle
from orchestrator.adapters.process.logs import BoundedLog, read_tail
from orchestrator.adapters.process.processes import identity_of, started_at
from orchestrator.adapters.process.scratch import ContainerDirectory, End, EndKind, read_json, write_json
from orchestrator.adapters.process.watches import disk_bytes
from orchestrator.domain.log_text import shown


def test_a_log_keeps_the_newest_within_its_bound(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", limit_bytes=100)

    for number in range(1000):
        log.write(b"%04d\n" % number)
    log.close()

    kept = read_tail(tmp_path / "log", 1000)
    assert 50 <= len(kept) <= 100
    assert kept.endswith(b"0998\n0999\n")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100


def test_one_write_larger_than_the_log_keeps_its_end(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", limit_bytes=10)

    log.write(bytes(range(48, 48 + 64)))
    log.close()

    assert bytes(range(48, 48 + 64)).endswith(read_tail(tmp_path / "log", 100))


def test_the_tail_reaches_over_both_halves(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", limit_bytes=20)
    log.write(b"0123456789abc")
    log.close()

    assert read_tail(tmp_path / "log", 5) == b"89abc"
    assert read_tail(tmp_path / "nothing", 5) == b""


@given(st.binary(max_size=200), st.integers(0, 100))
def test_what_is_shown_prints_and_keeps_its_bound(data: bytes, limit_bytes: int) -> None:
    text = shown(data, limit_bytes)

    assert len(text.encode()) <= limit_bytes
    assert all(character.isprintable() or character in "\n\t" for character in text)


def test_a_character_that_the_tail_cut_in_two_is_left_out() -> None:
    assert shown("é rest".encode()[1:], 100) == " rest"


def test_direction_overrides_are_shown_escaped() -> None:
    assert shown("a\u202eb".encode(), 100) == "a\\u202eb"


def test_a_handle_survives_its_encoding(tmp_path: Path) -> None:
    handle = Handle.here(ContainerDirectory.of(tmp_path, uuid4(), uuid4()))

    assert Handle.decode(handle.encode()) == handle
    assert handle.is_here
    assert not dataclasses.replace(handle, machine="another").is_here


@pytest.mark.parametrize(
    "directory", ["/", "/etc", "relative", f"{UUID(int=1)}/{UUID(int=2)}", "/tmp/x/../y"]
)
def test_a_handle_that_names_another_directory_is_refused(tmp_path: Path, directory: str) -> None:
    handle = Handle.here(ContainerDirectory.of(tmp_path, uuid4(), uuid4()))
    forged = json.loads(handle.encode()) | {"directory": directory}

    assert Handle.decode(json.dumps(forged)) is None


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    directory = ContainerDirectory.of(tmp_path, uuid4(), uuid4())

    with directory.locked(1), pytest.raises(TimeoutError), directory.locked(0):
        pass

    with directory.locked(0):
        pass


def test_locks_stay_exclusive_while_removals_take_the_lock_file_away(tmp_path: Path) -> None:
    directory = ContainerDirectory.of(tmp_path, uuid4(), uuid4())
    holders: list[int] = []
    most: list[int] = []

    def hold_often() -> None:
        for _ in range(20):
            with directory.locked(30):
                holders.append(1)
                most.append(len(holders))
                holders.pop()
                directory.remove_files()

    threads = [threading.Thread(target=hold_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(most) == 60
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_and_a_zombie_are_not_alive() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        identity = identity_of(process.pid)
        assert identity is not None
        assert identity.alive
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert not identity.alive
        assert identity_of(process.pid) is None
        assert started_at(process.pid) == identity
    with pytest.raises(ProcessLookupError):
        started_at(process.pid)


def test_another_process_with_the_same_number_is_another() -> None:
    here = identity_of(os.getpid())
    assert here is not None

    assert not dataclasses.replace(here, started=here.started - 1).alive


def test_disk_use_counts_what_is_there_and_follows_no_link(tmp_path: Path) -> None:
    counted = tmp_path / "counted"
    (counted / "below").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(bytes(2**20))
    (counted / "below" / "file").write_bytes(os.urandom(2**16))
    (counted / "link").symlink_to(tmp_path / "outside")
    with (counted / "sparse").open("wb") as sparse:
        sparse.truncate(2**30)

    assert 2**16 <= disk_bytes(counted) < 2**17


def test_a_record_is_whole_or_absent(tmp_path: Path) -> None:
    (tmp_path / "cut").write_text('{"a": ')
    write_json(tmp_path / "whole", {"a": 1})

    assert read_json(tmp_path / "whole") == {"a": 1}
    assert read_json(tmp_path / "cut") is None
    assert read_json(tmp_path / "absent") is None


def test_an_end_survives_its_record(tmp_path: Path) -> None:
    directory = ContainerDirectory.of(tmp_path, uuid4(), uuid4())
    directory.root.mkdir(parents=True)
    end = End(EndKind.SIGNALED, "killed by SIGSEGV", signal=11, at=12.5)

    directory.write_end(end)

    assert directory.read_end() == end


def test_a_record_of_another_version_counts_as_none(tmp_path: Path) -> None:
    directory = ContainerDirectory.of(tmp_path, uuid4(), uuid4())
    directory.root.mkdir(parents=True)
    for path in (directory.spec_file, directory.processes_file, directory.status_file):
        write_json(path, {"kind": "a kind of tomorrow", "fields": "other ones"})

    assert directory.read_spec() is None
    assert directory.read_processes() is None
    assert directory.read_end() is None
