"""`orchestrator submission pack`: what it writes, and what a person reads. pip is real, wheels are tiny."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.packing import PackRequest, pack_command, readable_bytes
from orchestrator.domain.errors import OrchestratorError, UsageError
from orchestrator.submission.archive import unpack
from orchestrator.submission.requirements import read_requirements
from tests.golden_texts import check_golden
from tests.wheels import as_any_pip_says, sha256_of, write_sdist, write_wheel


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a pip without settings whose only index is the directory `index`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def policy(here: Path) -> Path:
    directory = here / "policy"
    directory.mkdir()
    (directory / "agent.py").write_text("class Agent:\n    def act(self, observation):\n        return 0\n")
    return Path("policy")


def pack(request: PackRequest, *, as_json: bool = False) -> int:
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(pack_command(request, as_json=as_json, verbose=False))


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    """Both streams as a terminal shows them, without what varies from machine to machine."""
    captured = capsys.readouterr()
    return plain(captured.out + captured.err)


def plain(text: str) -> str:
    text = re.sub(r"Python 3\.\d+ on [\w.-]+", "<this Python>", text)
    return text.replace(str(Path.cwd()), "<directory>")


def reason(request: PackRequest) -> str:
    with pytest.raises(OrchestratorError) as caught:
        pack(request)
    return as_any_pip_says(plain(str(caught.value)))


def names_in(archive: Path) -> list[str]:
    with tarfile.open(archive) as opened:
        return opened.getnames()


# ------------------------------------------------------------------------------------------- packing


def test_it_says_what_it_packed_and_what_it_left_out(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (policy / "weights").mkdir()
    (policy / "weights" / "net.bin").write_bytes(bytes(range(256)) * 100)
    (policy / "weights" / "latest").symlink_to("net.bin")
    (policy / ".git").mkdir()
    for number in range(10):
        (policy / f"old{number}.pyc").write_bytes(b"")
    (policy / "env" / "bin").mkdir(parents=True)
    (policy / "env" / "pyvenv.cfg").write_text("")
    (policy / "results").mkdir()
    (policy / "main.py").write_text("")

    assert pack(PackRequest(policy)) == 0

    # With the digest: it is the same on every machine.
    check_golden("pack", "packed", printed(capsys))
    assert names_in(Path("policy.tar.gz")) == ["agent.py", "main.py", "weights/net.bin"]


def test_json_says_the_same_and_nothing_else_is_on_stdout(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (policy / "link").symlink_to("agent.py")

    pack(PackRequest(policy, Path("out.tar.gz")), as_json=True)

    report = json.loads(capsys.readouterr().out)
    content = Path("out.tar.gz").read_bytes()
    assert report["path"] == "out.tar.gz"
    assert (report["size_bytes"], report["sha256"]) == (len(content), sha256(content).hexdigest())
    assert (report["files"], report["entry_point"], report["warnings"]) == (1, "agent.py", [])
    assert [each["path"] for each in report["left_out"]] == ["link"]


@pytest.mark.parametrize("place", ["policy.tar.gz", "policy/mine.tar.gz"])
def test_packing_again_gives_the_same_bytes_whatever_times_rights_and_umask(policy: Path, place: str) -> None:
    (policy / "run.sh").write_text("#!/bin/sh\n")
    (policy / "run.sh").chmod(0o755)
    command = [sys.executable, "-m", "orchestrator.cli", "submission", "pack", "policy", "--output", place]
    digests = []
    for umask, mode, time in ((0o022, 0o644, 1), (0o077, 0o600, 2_000_000_000)):
        (policy / "agent.py").chmod(mode)
        os.utime(policy / "agent.py", (time, time))
        done = subprocess.run(command, umask=umask, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        digests.append(sha256_of(Path(place)))

    assert digests[0] == digests[1]
    assert names_in(Path(place)) == ["agent.py", "run.sh"]


def test_packing_in_the_directory_itself_names_the_archive_after_it(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy)

    pack(PackRequest(Path(".")))
    pack(PackRequest(Path(".")))

    assert names_in(Path("policy.tar.gz")) == ["agent.py"]


def test_what_cannot_be_packed_is_told(policy: Path) -> None:
    Path("empty").mkdir()

    check_golden("pack", "no_submission", reason(PackRequest(Path("empty"))))
    check_golden("pack", "no_directory", reason(PackRequest(Path("nowhere"))))
    check_golden("pack", "output_is_a_directory", reason(PackRequest(policy, Path("empty"))))
    check_golden("pack", "output_cannot_be_written", reason(PackRequest(policy, Path("nowhere/x.tar.gz"))))
    check_golden("pack", "target_without_vendor", reason(PackRequest(policy, python_version="3.12")))
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["empty", "index", "policy"]


def test_big_files_and_wheels_that_nobody_installs_are_warned_of(
    policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.commands.packing.BIG_FILE_BYTES", 10_000)
    monkeypatch.setattr("orchestrator.commands.packing.LARGEST_FETCHED", 20_000)
    (policy / "net.bin").write_bytes(bytes(12_345))
    write_wheel(policy / "wheels", "package", "1.0")

    pack(PackRequest(policy))

    check_golden("pack", "warned", printed(capsys))


def test_sizes_are_readable() -> None:
    sizes = [readable_bytes(count) for count in (0, 999, 1000, 12_345, 5_000_000, 3e12)]

    assert sizes == ["0 bytes", "999 bytes", "1.0 kB", "12.3 kB", "5.0 MB", "3000.0 GB"]


# --------------------------------------------------------------------------------------------- wheels


def vendored(policy: Path, output: str = "out.tar.gz", **fields: Any) -> Path:
    """The packed submission, unpacked."""
    assert pack(PackRequest(policy, Path(output), vendor=True, **fields)) == 0
    return unpack(Path(output), Path(f"{output}-unpacked"))


def test_wheels_and_what_they_require_are_collected_and_what_is_source_code_is_built(
    policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(Path("index"), "package", "1.0", requires=["deep_one"])
    write_wheel(Path("index"), "package", "0.9")
    write_sdist(Path("index"), "deep_one", "2.0")
    write_wheel(policy / "wheels", "private", "3.0")
    write_wheel(policy / "wheels", "unused", "1.0")
    (policy / "requirements.txt").write_text("package\nprivate\n")

    root = vendored(policy)

    check_golden("pack", "vendored", printed(capsys))
    assert sorted(path.name for path in (root / "wheels").glob("*.whl")) == [
        "deep_one-2.0-py3-none-any.whl",
        "package-1.0-py3-none-any.whl",
        "private-3.0-py3-none-any.whl",
    ]
    requirements = read_requirements(root)
    assert requirements is not None
    assert requirements.file == root / "wheels" / "requirements.txt"
    assert not (policy / "wheels" / "requirements.txt").exists()

    vendored(policy, "again.tar.gz")
    assert sha256_of(Path("again.tar.gz")) == sha256_of(Path("out.tar.gz"))  # also of what was built


def test_digests_in_requirements_are_checked(policy: Path) -> None:
    wheel = write_wheel(Path("index"), "package", "1.0")
    requirements = policy / "requirements.txt"
    requirements.write_text(f"package==1.0 --hash=sha256:{sha256_of(wheel)}\n")
    vendored(policy)

    requirements.write_text(f"package==1.0 --hash=sha256:{0:064}\n")

    check_golden("pack", "another_digest", reason(PackRequest(policy, vendor=True)))


def test_wheels_for_another_python_and_platform_are_collected(policy: Path) -> None:
    write_wheel(Path("index"), "package", "1.0", tag="cp312-cp312-manylinux_2_28_aarch64")
    write_wheel(Path("index"), "package", "1.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    (policy / "requirements.txt").write_text("package\n")

    root = vendored(policy, python_version="3.12", platforms=("manylinux_2_28_aarch64",))

    assert [path.name for path in (root / "wheels").glob("*.whl")] == [
        "package-1.0-cp312-cp312-manylinux_2_28_aarch64.whl"
    ]


def test_what_cannot_be_collected_is_told(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_golden("pack", "no_requirements", reason(PackRequest(policy, vendor=True)))

    (policy / "requirements.txt").write_text("no-such-package==1.0\n")
    check_golden("pack", "unknown_package", reason(PackRequest(policy, vendor=True)))

    (policy / "requirements.txt").write_text("first\nsecond\n")
    write_wheel(Path("index"), "first", "1.0", requires=["third==1.0"])
    write_wheel(Path("index"), "second", "1.0", requires=["third==2.0"])
    write_wheel(Path("index"), "third", "1.0")
    check_golden("pack", "conflict", reason(PackRequest(policy, vendor=True)))

    (policy / "requirements.txt").write_text("built\n")
    write_sdist(Path("index"), "built", "1.0", before="raise RuntimeError('no compiler here')")
    assert "RuntimeError: no compiler here" in reason(PackRequest(policy, vendor=True))
    elsewhere = PackRequest(policy, vendor=True, python_version="3.12", platforms=("win_amd64",))
    check_golden("pack", "source_for_another_platform", reason(elsewhere))

    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    (policy / "requirements.txt").write_text("no-such-package==1.0\n")
    check_golden("pack", "no_network", reason(PackRequest(policy, vendor=True)))
    assert not list(Path.cwd().glob("*.tar.gz"))


def test_an_interrupted_collection_leaves_nothing_of_pip_behind(
    policy: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.adapters.process.processes import identity_of

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)  # which is the directory as it was asked for first
    note = here / "building"
    before = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    write_sdist(Path("index"), "slow", "1.0", before)
    (policy / "requirements.txt").write_text("slow\n")

    async def interrupt() -> None:
        command = asyncio.create_task(
            pack_command(PackRequest(policy, vendor=True), as_json=False, verbose=False)
        )
        while not (note.exists() and note.read_text()):
            assert not command.done()
            await asyncio.sleep(0.02)
        command.cancel()
        with pytest.raises(asyncio.CancelledError):
            await command

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(interrupt())

    assert identity_of(int(note.read_text())) is None
    assert not Path("policy.tar.gz").exists()
    assert list(temporary.iterdir()) == []


def test_a_target_is_refused_in_words_of_the_command_line(policy: Path) -> None:
    with pytest.raises(UsageError, match="--vendor"):
        pack(PackRequest(policy, platforms=("win_amd64",)))
