"""What is read from requirements.txt and wheels/, from pip's output, and of our own packages."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from orchestrator.submission.pip import relevant_lines
from orchestrator.submission.requirements import (
    CollectedWheel,
    Uninstallable,
    collected_list,
    read_requirements,
)
from orchestrator.submission.runtime_packages import RUNTIME, normalized, runtime_packages
from tests.wheels import write_wheel

ARCHIVES = ("aa" * 32, "bb" * 32)


def digest(directory: Path, archive: str = ARCHIVES[0]) -> str:
    requirements = read_requirements(directory)
    assert requirements is not None
    return requirements.digest(archive)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "requirements.txt").write_text("numpy\n")
    return tmp_path


def test_a_submission_without_requirements_asks_for_nothing(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "package", "1.0")

    assert read_requirements(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "numpy\n",
        "# a comment\n\nnumpy==2.0 ; python_version > '3.10'\r\ntorch [extra] >=2,<3\n",
        "numpy==2.0 \\\n    --hash=sha256:00\n",
        "name-with.dots_1~=1.0 # a comment\n",
    ],
)
def test_packages_of_an_index_do_not_depend_on_the_rest_of_the_archive(directory: Path, text: str) -> None:
    (directory / "requirements.txt").write_text(text)

    assert digest(directory, ARCHIVES[0]) == digest(directory, ARCHIVES[1])


@pytest.mark.parametrize(
    "line",
    ["-r base.txt", "-c pins.txt", "./mine", "-e .", "mine @ file:///mine", "--find-links more", "dir/x.whl"],
)
def test_what_names_other_files_depends_on_all_of_the_archive(directory: Path, line: str) -> None:
    (directory / "requirements.txt").write_text(f"numpy\n{line}\n")

    assert digest(directory, ARCHIVES[0]) != digest(directory, ARCHIVES[1])


def test_other_content_gives_another_digest(directory: Path) -> None:
    digests = [digest(directory)]
    (directory / "requirements.txt").write_text("numpy==2.0\n")
    digests.append(digest(directory))
    write_wheel(directory / "wheels", "package", "1.0")
    digests.append(digest(directory))
    write_wheel(directory / "wheels", "package", "1.0", body="x = 1\n")
    digests.append(digest(directory))

    assert len(set(digests)) == 4


def test_collected_wheels_are_taken_by_their_list_as_long_as_it_is_of_these_requirements(
    directory: Path,
) -> None:
    (directory / "wheels").mkdir()
    collected = collected_list(directory / "requirements.txt", [CollectedWheel("numpy", "2.0", "ab" * 32)])
    (directory / "wheels" / "requirements.txt").write_text(collected)

    requirements = read_requirements(directory)
    assert requirements is not None
    assert requirements.file == directory / "wheels" / "requirements.txt"
    assert f"numpy==2.0 --hash=sha256:{'ab' * 32}" in collected.splitlines()
    (directory / "requirements.txt").write_text("numpy==1.0\n")
    with pytest.raises(Uninstallable, match="collected for another"):
        read_requirements(directory)


def test_our_own_packages_are_all_that_they_need_themselves() -> None:
    present = {normalized(each.metadata["Name"]) for each in runtime_packages()}
    needed = {
        normalized(requirement.name)
        for name in RUNTIME
        for requirement in map(Requirement, requires(name) or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }

    assert present == {normalized(name) for name in RUNTIME}
    assert needed <= present


def test_of_what_pip_prints_the_reason_is_kept_once_and_the_rest_dropped() -> None:
    broken = (
        "after connection broken by 'NewConnectionError('<urllib3.HTTPConnection object at 0x7f>: "
        "Failed to establish a new connection: [Errno 111] Connection refused')': /simple/nope/"
    )
    lines = [
        "Looking in links: w",
        "Collecting nope==1.0",
        "  Downloading nope-1.0.tar.gz (1 kB)",
        f"WARNING: Retrying (Retry(total=1)) {broken}",
        f"WARNING: Retrying (Retry(total=0)) {broken}",
        "  error: subprocess-exited-with-error",
        "  │",
        "  ╰─> [1 lines of output]",
        "      RuntimeError: no compiler",
        "note: This error originates from a subprocess",
        "error: subprocess-exited-with-error",
        "ERROR: ResolutionImpossible: for help visit",
    ]

    assert relevant_lines(lines).splitlines() == [
        "  the package index cannot be reached: [Errno 111] Connection refused",
        "    error: subprocess-exited-with-error",
        "    ╰─> [1 lines of output]",
        "        RuntimeError: no compiler",
    ]


def test_much_output_is_cut_at_its_beginning() -> None:
    text = relevant_lines([f"ERROR: {number} {'x' * 500}" for number in range(1000)])

    assert len(text) < 5000
    assert "ERROR: 999" in text
