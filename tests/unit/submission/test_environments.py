"""The store of environments: each made once, kept while it is used, and bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.submission.environments import (
    RECORD_FILE,
    Environment,
    EnvironmentStore,
    EnvironmentTooLarge,
    Record,
    remove_tree,
)

PATIENCE_SECONDS = 30.0


def key(letter: str) -> str:
    return letter * 32


def making(note: list[str] | None = None, size: int = 100) -> Callable[[Path], Record]:
    def make(home: Path) -> Record:
        if note is not None:
            note.append(home.name)
        (home / "file").write_bytes(b"x" * size)
        return Record({"package": "1.0"})

    return make


def obtain(
    store: EnvironmentStore, letter: str, make: Callable[[Path], Record] | None = None, seconds: float = 30.0
) -> Environment:
    return store.obtain(key(letter), make or making(), time.monotonic() + seconds, lambda: None)


def use(store: EnvironmentStore, letter: str, make: Callable[[Path], Record] | None = None) -> None:
    """Obtain it, and let it go again."""
    os.close(obtain(store, letter, make).lock)


def kept(root: Path) -> set[str]:
    return {path.name[0] for path in root.iterdir() if path.is_dir()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "environments"


@pytest.fixture
def store(root: Path) -> EnvironmentStore:
    return EnvironmentStore(root, keep=3, max_bytes=10 * 2**20)


def test_the_same_key_gives_the_same_environment_made_once(store: EnvironmentStore) -> None:
    made: list[str] = []

    first = obtain(store, "a", making(made))
    second = obtain(store, "a", making(made))

    assert made == [key("a")]
    assert first.root == second.root
    assert (first.made, second.made) == (True, False)
    assert second.record.packages == {"package": "1.0"}
    assert first.record == second.record


def test_two_at_once_make_one_and_the_second_hears_that_it_waits(store: EnvironmentStore) -> None:
    made: list[str] = []
    started, waiting = threading.Event(), threading.Event()

    def slowly(home: Path) -> Record:
        started.set()
        assert waiting.wait(PATIENCE_SECONDS)
        return making(made)(home)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(obtain, store, "a", slowly)
        assert started.wait(PATIENCE_SECONDS)
        deadline = time.monotonic() + PATIENCE_SECONDS
        second = pool.submit(store.obtain, key("a"), making(made), deadline, waiting.set)

        assert [first.result().made, second.result().made] == [True, False]
    assert made == [key("a")]


def test_who_waits_longer_than_allowed_is_told(store: EnvironmentStore) -> None:
    started, release = threading.Event(), threading.Event()

    def slowly(home: Path) -> Record:
        started.set()
        release.wait(PATIENCE_SECONDS)
        return Record({})

    with ThreadPoolExecutor() as pool:
        first = pool.submit(obtain, store, "a", slowly)
        assert started.wait(PATIENCE_SECONDS)
        with pytest.raises(TimeoutError):
            obtain(store, "a", seconds=0.0)
        release.set()
        assert first.result().made


def test_a_failure_leaves_nothing_and_the_next_one_tries_again(store: EnvironmentStore, root: Path) -> None:
    def fail(home: Path) -> Record:
        (home / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        obtain(store, "a", fail)
    assert kept(root) == set()

    assert obtain(store, "a").made


def test_what_a_killed_process_began_is_made_anew(store: EnvironmentStore, root: Path) -> None:
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from orchestrator.submission.environments import EnvironmentStore\n"
        "def make(home):\n    (home / 'half').write_text('')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"store = EnvironmentStore(Path({str(root)!r}), 3, 10**9)\n"
        f"store.obtain({key('a')!r}, make, time.monotonic(), list)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert (root / key("a") / "half").exists()

    environment = obtain(store, "a")

    assert environment.made
    assert not (environment.root / "half").exists()


def test_what_was_used_longest_ago_goes_first(store: EnvironmentStore, root: Path) -> None:
    for place, letter in enumerate("abc"):
        use(store, letter)
        os.utime(root / key(letter) / RECORD_FILE, (place, place))
    use(store, "a")  # now it was used last

    use(store, "d")

    assert kept(root) == {"a", "c", "d"}
    assert not (root / f"{key('b')}.lock").exists()


def test_an_environment_in_use_is_never_removed(root: Path) -> None:
    store = EnvironmentStore(root, keep=1, max_bytes=10 * 2**20)
    used = obtain(store, "a")

    use(store, "b")
    assert kept(root) == {"a", "b"}
    os.close(used.lock)
    use(store, "c")

    assert kept(root) == {"c"}


def test_the_lock_stays_with_the_program_that_a_process_becomes(root: Path) -> None:
    script = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from orchestrator.submission.environments import EnvironmentStore, Record\n"
        f"store = EnvironmentStore(Path({str(root)!r}), 1, 10**9)\n"
        f"held = store.obtain({key('a')!r}, lambda home: Record({{}}), time.monotonic() + 30, list)\n"
        "os.set_inheritable(held.lock, True)\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'print(flush=True); input()'])\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        use(EnvironmentStore(root, keep=1, max_bytes=10 * 2**20), "b")
        assert kept(root) == {"a", "b"}
        process.communicate(b"\n", timeout=PATIENCE_SECONDS)

    use(EnvironmentStore(root, keep=1, max_bytes=10 * 2**20), "c")

    assert kept(root) == {"c"}


def test_all_of_them_together_take_no_more_than_allowed(root: Path) -> None:
    store = EnvironmentStore(root, keep=100, max_bytes=5 * 2**19)
    for place, letter in enumerate("abc"):
        use(store, letter, making(size=2**20))
        os.utime(root / key(letter) / RECORD_FILE, (place, place))

    assert kept(root) == {"b", "c"}


def test_one_that_is_too_large_alone_is_refused_and_leaves_nothing(root: Path) -> None:
    store = EnvironmentStore(root, keep=3, max_bytes=2**20)

    with pytest.raises(EnvironmentTooLarge, match="above the limit of 1048576"):
        obtain(store, "a", making(size=2**21))

    assert kept(root) == set()


def test_a_record_that_cannot_be_read_counts_as_none(store: EnvironmentStore, root: Path) -> None:
    use(store, "a")
    (root / key("a") / RECORD_FILE).write_text(json.dumps({"other": "format"}))

    assert obtain(store, "a").made


def test_a_tree_that_a_package_made_hard_to_remove_is_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o500)
    hard = tmp_path / "tree" / "hard"
    (hard / "below").mkdir(parents=True)
    (hard / "below" / "file").write_text("")
    (hard / "link").symlink_to(outside)
    (hard / "below").chmod(0)
    hard.chmod(0o500)

    remove_tree(tmp_path / "tree")

    assert not (tmp_path / "tree").exists()
    assert outside.stat().st_mode & 0o777 == 0o500
