"""Each check of the machine, where it is content and where it is not."""

from __future__ import annotations

import os
import re
import resource
import socket
from importlib import metadata
from pathlib import Path

import pytest

from orchestrator.diagnosis import machine
from orchestrator.diagnosis.findings import Finding, State
from orchestrator.diagnosis.ray_checks import authentication
from tests.golden_texts import check_golden

EVERYTHING = 2**62


def check(case: str, finding: Finding, state: State = State.ATTENTION, path: Path = Path("/no/path")) -> None:
    """What a person reads of a finding, its sizes and this path replaced."""
    assert finding.state is state, finding
    text = f"{finding.what}\nto do: {finding.remedy}\n".replace(str(path), "<path>")
    text = re.sub(r"(?<![\d.])\d+(\.\d+)? (KiB|MiB|GiB)", "<size>", text)
    check_golden("doctor", case, text)


def test_this_python_is_one_that_the_package_is_made_for_and_another_is_not() -> None:
    assert machine.python_version().state is State.OK
    assert machine.python_version("3.12.0rc1").state is State.OK
    check("python_too_old", machine.python_version("3.9.1"), State.BROKEN)


def test_the_packages_of_this_installation_are_those_that_it_is_made_for() -> None:
    finding = machine.installed_packages()

    assert finding.state is State.OK
    assert re.match(r"\d\d packages in the versions that orchestrator is made for", finding.what)


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another installed package, whose requirements can be written down; `psutil` stands for any one."""
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    return info / "METADATA"


def test_packages_that_are_missing_or_of_another_version_are_named(distribution: Path) -> None:
    distribution.write_text(
        "Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n"
        "Requires-Dist: psutil<1\n"
        "Requires-Dist: no-such-package>=2\n"
        "Requires-Dist: pydantic\n"
        "Requires-Dist: another-one; python_version < '3'\n"
        "Requires-Dist: not-asked-for; extra == 'dev'\n"
    )

    finding = machine.installed_packages("elsewhere")

    text = finding.what.replace(metadata.version("psutil"), "<version>")
    check("packages_wrong", Finding.broken(text, finding.remedy), State.BROKEN)


def test_an_optional_package_that_is_not_there_is_no_trouble(distribution: Path) -> None:
    distribution.write_text(
        "Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n"
        "Requires-Dist: psutil\nRequires-Dist: no-such-package>=2; extra == 'metaworld'\n"
    )

    finding = machine.installed_packages("elsewhere")

    assert finding == Finding.ok(
        "1 packages in the versions that elsewhere is made for; without metaworld (optional)"
    )


def test_little_memory_is_said() -> None:
    assert machine.available_memory(1).state is State.OK
    check("memory_low", machine.available_memory(EVERYTHING))


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert machine.control_group_room(tmp_path) == 700

    (tmp_path / "memory.max").write_text("max\n")
    assert machine.control_group_room(tmp_path) > 2**60


def test_a_low_limit_of_open_files_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.open_files(1).state is State.OK
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 512))  # lowered, it cannot be raised again

    check("open_files_few", machine.open_files())


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    assert machine.disk(tmp_path / "not" / "yet", "--data-dir", 1).state is State.OK
    check("disk_full", machine.disk(tmp_path, "--data-dir", EVERYTHING), path=tmp_path)


def test_a_data_directory_below_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    check(
        "disk_is_a_file",
        machine.disk(tmp_path / "file" / "data", "--data-dir"),
        State.BROKEN,
        tmp_path / "file",
    )


def test_a_data_directory_that_may_not_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere

    check("disk_not_ours", machine.disk(tmp_path, "--data-dir"), State.BROKEN, tmp_path)
    check("ray_sockets_not_ours", machine.socket_paths(tmp_path), State.BROKEN, tmp_path)


def test_little_shared_memory_is_said(tmp_path: Path) -> None:
    assert machine.shared_memory(tmp_path, 1).state is State.OK
    assert machine.shared_memory(tmp_path / "nowhere").state is State.OK
    check("shared_memory_small", machine.shared_memory(tmp_path, EVERYTHING), path=tmp_path)


def test_a_directory_too_deep_for_sockets_is_said(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()

    assert machine.socket_paths().state is State.OK
    finding = machine.socket_paths(deep)
    check(
        "ray_sockets_too_deep",
        Finding.broken(re.sub(r"of \d+ bytes", "of <n> bytes", finding.what), finding.remedy),
        State.BROKEN,
        deep,
    )


def test_no_socket_can_have_a_path_longer_than_the_limit() -> None:
    from orchestrator.ray_session import MAX_SOCKET_PATH_BYTES

    with socket.socket(socket.AF_UNIX) as longest, pytest.raises(OSError, match="too long"):
        longest.bind("/tmp/" + "x" * (MAX_SOCKET_PATH_BYTES - 4))


def test_connections_on_loopback_work_and_an_address_of_others_does_not() -> None:
    assert machine.loopback_ports().state is State.OK
    check("ports_blocked", machine.loopback_ports("192.0.2.200"), State.BROKEN)


# ------------------------------------------------------------------------------------------------- Ray


def test_how_ray_authenticates_is_said(tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token"}
    named = {"RAY_ADDRESS": "10.0.0.1:6379"}

    assert authentication(token, tmp_path).state is State.OK
    assert authentication({"RAY_AUTH_MODE": "disabled"} | named, tmp_path).state is State.OK
    assert authentication(token | named | {"RAY_AUTH_TOKEN": "secret"}, tmp_path).state is State.OK
    check("ray_mode_unknown", authentication({"RAY_AUTH_MODE": "kerberos"}, tmp_path), State.BROKEN)
    check("ray_token_missing", authentication(token | named, Path("/home/someone")), State.BROKEN)

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    assert authentication(token | named, tmp_path).state is State.OK
