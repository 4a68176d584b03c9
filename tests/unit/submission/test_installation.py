"""Submissions with requirements, through a real submission host and the real pip; no test needs a network."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrator.adapters.artifacts.pack import pack_directory
from orchestrator.adapters.policies.host_client import SubmissionHostClient
from orchestrator.adapters.policies.websocket import WebSocketConnector
from orchestrator.adapters.process.processes import identity_of
from orchestrator.domain.errors import InfrastructureError, SubmissionError
from orchestrator.ports import Endpoint
from orchestrator.submission import pip
from orchestrator.submission.requirements import CollectedWheel, collected_list
from tests.golden_texts import check_golden
from tests.policy_processes import RunningServer, running_host
from tests.wheels import as_any_pip_says, sha256_of, source_files, write_sdist, write_wheel

KEY = bytes(range(32))
SEES = """
import importlib, sys

class Agent:
    def act(self, names):
        modules = [importlib.import_module(name) for name in names]
        return {"actions": [[module.__version__, module.__file__] for module in modules], "path": sys.path}
"""


@pytest.fixture
def submission(tmp_path: Path) -> Path:
    """A directory whose agent tells the version and the file of each module that it is asked for."""
    directory = tmp_path / "submission"
    directory.mkdir()
    (directory / "agent.py").write_text(SEES)
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "environments"


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip as it is on a machine without any settings, and without a network."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


@contextmanager
def host_for(
    submission: Path, store: Path | None, *options: str, work: str = "work"
) -> Iterator[RunningServer]:
    where = [] if store is None else ["--environments", str(store)]
    with running_host(submission.parent / work, KEY, *where, *options) as host:
        yield host


def push(host: RunningServer, submission: Path, grace_seconds: float = 5.0) -> list[str]:
    """Hand the submission over; what was told of it meanwhile."""
    told: list[str] = []

    async def tell(what: str) -> None:
        told.append(what)

    packed = pack_directory(submission, submission.parent / "archives")
    client = SubmissionHostClient(Endpoint("127.0.0.1", host.port), KEY, grace_seconds)
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(client.push_archive(packed.path, packed.sha256, 120, tell))
    return told


def ask(host: RunningServer, *modules: str) -> list[Any]:
    connection = WebSocketConnector("127.0.0.1", host.port, KEY).connect(30)
    try:
        answer: list[Any] = connection.act({"observation": list(modules)}, 30)
        return answer
    finally:
        connection.close()


def refusal(submission: Path, store: Path | None, *options: str) -> str:
    """Why the host refuses the submission, without what varies from machine to machine."""
    work = f"work-{uuid4().hex[:8]}"
    with host_for(submission, store, *options, work=work) as host, pytest.raises(SubmissionError) as caught:
        push(host, submission)
    text = re.sub(r"cpython 3\.\d+ on \S+", "<this Python>", caught.value.reason)
    return as_any_pip_says(text.replace(str(submission.parent / work), "<directory>"))


def test_an_agent_gets_its_own_versions_from_its_wheels_and_everybody_else_keeps_theirs(
    submission: Path, store: Path
) -> None:
    (submission / "requirements.txt").write_text("typer==99.0\nnew_package\n")
    write_wheel(submission / "wheels", "typer", "99.0")
    write_wheel(
        submission / "wheels", "new_package", "1.2", scripts=["new-command"], body="def main(): ...\n"
    )
    with host_for(submission, store) as host:
        told = push(host, submission)

        (typer, new_package, numpy) = ask(host, "typer", "new_package", "numpy")
        (environment,) = (path for path in store.iterdir() if path.is_dir())
        assert (typer[0], new_package[0], numpy[0]) == ("99.0", "1.2", version("numpy"))
        assert all(module[1].startswith(str(environment)) for module in (typer, new_package, numpy))
        assert any("installs requirements.txt" in what for what in told)
        subprocess.run([environment / "bin" / "new-command"], check=True, timeout=60)

    assert version("typer") != "99.0"
    assert "Successfully installed" in "\n".join(host.printed)
    # Nothing of the control plane's but what the policy server needs.
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([environment / "bin" / "python", "-c", "import ray"], check=True, capture_output=True)

    with host_for(submission, store, work="again") as again:
        told = push(again, submission)

        assert ask(again, "typer")[0][0] == "99.0"
    assert told == []
    assert "uses an earlier environment" in "\n".join(again.printed)
    assert "Successfully installed" not in "\n".join(again.printed)


def test_two_hosts_at_once_make_one_environment(submission: Path, store: Path) -> None:
    (submission / "requirements.txt").write_text("package\n")
    write_wheel(submission / "wheels", "package", "1.0")
    with (
        host_for(submission, store, work="one") as one,
        host_for(submission, store, work="two") as two,
        ThreadPoolExecutor() as pool,
    ):
        for done in [pool.submit(push, host, submission) for host in (one, two)]:
            done.result()

        answers = [ask(host, "package") for host in (one, two)]

    assert answers[0] == answers[1]
    printed = "\n".join(one.printed + two.printed)
    assert printed.count("made environment of requirements.txt: package 1.0") == 1
    assert printed.count("uses an earlier environment of requirements.txt: package 1.0") == 1


def test_an_agent_without_requirements_sees_the_packages_that_are_here(submission: Path, store: Path) -> None:
    write_wheel(submission / "wheels", "typer", "99.0")
    with host_for(submission, store) as host:
        push(host, submission)

        assert ask(host, "typer")[0][0] == version("typer")
    assert not store.exists()


def test_without_a_store_the_environment_is_the_containers_own(submission: Path) -> None:
    (submission / "requirements.txt").write_text("# nothing\n")
    with host_for(submission, None) as host:
        push(host, submission)

        (numpy,) = ask(host, "numpy")
    assert numpy[1].startswith(str(submission.parent / "work" / "environments"))


# ---------------------------------------------------------------------------- what cannot be installed


def test_wheels_are_all_there_is_where_an_archive_brings_any(
    submission: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "index", "package", "2.0")
    write_wheel(submission / "wheels", "package", "1.0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (submission / "requirements.txt").write_text("package==2.0\n")

    check_golden("requirements", "not_among_the_wheels", refusal(submission, store))

    link = (
        (tmp_path / "index" / "package-2.0-py3-none-any.whl").as_uri().replace("file://", "http://localhost")
    )
    (submission / "requirements.txt").write_text(f"package @ {link}\n")
    assert "offline.invalid" in refusal(submission, store)
    assert not any(path.is_dir() for path in store.iterdir())


def test_an_unknown_package_and_an_index_that_cannot_be_reached_are_told(
    submission: Path, store: Path
) -> None:
    (submission / "requirements.txt").write_text("no-such-package==1.0\n")

    check_golden("requirements", "index_unreachable", refusal(submission, store))
    check_golden("requirements", "no_index_allowed", refusal(submission, store, "--no-index"))


def test_an_unknown_package_of_an_index_is_told(
    submission: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index" / "no-such-package").mkdir(parents=True)
    (tmp_path / "index" / "no-such-package" / "index.html").write_text("<!DOCTYPE html><html></html>")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    (submission / "requirements.txt").write_text("no-such-package==1.0\n")

    check_golden("requirements", "unknown_package", refusal(submission, store))


def test_requirements_that_exclude_each_other_are_told(submission: Path, store: Path) -> None:
    (submission / "requirements.txt").write_text("first\nsecond\n")
    write_wheel(submission / "wheels", "first", "1.0", requires=["third==1.0"])
    write_wheel(submission / "wheels", "second", "1.0", requires=["third==2.0"])
    write_wheel(submission / "wheels", "third", "1.0")
    write_wheel(submission / "wheels", "third", "2.0")

    check_golden("requirements", "conflict", refusal(submission, store))


def test_a_wheel_with_another_digest_is_told(submission: Path, store: Path) -> None:
    write_wheel(submission / "wheels", "package", "1.0")
    (submission / "requirements.txt").write_text(f"package==1.0 --hash=sha256:{0:064}\n")

    check_golden("requirements", "another_digest", refusal(submission, store))


def test_wheels_of_another_requirements_txt_are_told(submission: Path, store: Path) -> None:
    write_wheel(submission / "wheels", "package", "1.0")
    (submission / "wheels" / "requirements.txt").write_text("# requirements.txt sha256: 00\npackage==1.0\n")
    (submission / "requirements.txt").write_text("package\nanother\n")

    check_golden("requirements", "wheels_of_another", refusal(submission, store))


def test_an_editable_requirement_is_told(submission: Path, store: Path) -> None:
    package = submission / "mine"
    package.mkdir()
    for name, text in source_files("mine", "1.0").items():
        (package / name).write_text(text)
    (submission / "requirements.txt").write_text("-e ./mine\n")

    check_golden("requirements", "editable", refusal(submission, store))


def test_a_version_that_the_policy_server_cannot_work_with_is_told(submission: Path, store: Path) -> None:
    write_wheel(submission / "wheels", "websockets", "1.0")
    (submission / "requirements.txt").write_text("websockets\n")

    text = refusal(submission, store)

    check_golden("requirements", "too_old_for_us", text.replace(version("websockets"), "<ours>"))
    assert "cannot be served" in refusal(submission, store)  # also when the environment is there already


def test_building_that_takes_too_long_is_told_and_ended(
    submission: Path, store: Path, tmp_path: Path
) -> None:
    write_sdist(submission / "wheels", "slow", "1.0", before="import time; time.sleep(600)")
    (submission / "requirements.txt").write_text("slow\n")

    text = refusal(submission, store, "--environment-timeout", "1")

    check_golden("requirements", "too_slow", re.sub("pip was at: .*", "pip was at: <its last line>", text))


def test_code_that_runs_while_it_is_built_sees_no_key_and_ends_with_the_host(
    submission: Path, store: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    before = (
        "import json, os, time; "
        f"open({str(seen)!r}, 'w').write(json.dumps([os.getpid(), *os.environ])); "
        f"os.rename({str(seen)!r}, {str(seen)!r} + '.done'); time.sleep(600)"
    )
    write_sdist(submission / "wheels", "nosy", "1.0", before)
    (submission / "requirements.txt").write_text("nosy\n")
    done = tmp_path / "seen.done"
    with host_for(submission, store) as host, ThreadPoolExecutor() as pool:
        pushed = pool.submit(push, host, submission, 0.1)
        while not done.exists():
            assert not pushed.done(), pushed.result()
            time.sleep(0.02)
        host.process.terminate()
        assert host.process.wait(30) == -15
        with pytest.raises(InfrastructureError):
            pushed.result()

    pid, *variables = json.loads(done.read_text())
    assert not [name for name in variables if "SESSION_KEY" in name]
    assert identity_of(pid) is None


# -------------------------------------------------------------------------------- what may be brought


def test_collected_wheels_are_installed_by_their_digests_whatever_requirements_txt_points_to(
    submission: Path, store: Path
) -> None:
    wheel = write_wheel(submission / "wheels", "package", "1.0")
    requirements = submission / "requirements.txt"
    requirements.write_text("package @ https://example.invalid/package-1.0.tar.gz\n")
    collected = [CollectedWheel("package", "1.0", sha256_of(wheel))]
    (submission / "wheels" / "requirements.txt").write_text(collected_list(requirements, collected))
    with host_for(submission, store) as host:
        push(host, submission)

        assert ask(host, "package")[0][0] == "1.0"


def test_an_index_of_this_machine_is_used_where_it_is_allowed_and_the_agent_learns_nothing_of_it(
    submission: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "index", "package", "1.0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    agent = "import os\nclass Agent:\n    def act(self, o):\n        return sorted(os.environ)\n"
    (submission / "agent.py").write_text(agent)
    (submission / "requirements.txt").write_text("package\n")
    with host_for(submission, store) as host:
        push(host, submission)

        names = ask(host)
    assert "PATH" in names
    assert not [name for name in names if name.startswith("PIP_") or "proxy" in name]


def test_a_server_of_its_own_runs_in_its_environment(submission: Path, store: Path) -> None:
    (submission / "agent.py").unlink()
    write_wheel(submission / "wheels", "package", "3.0")
    (submission / "requirements.txt").write_text("package\n")
    (submission / "main.py").write_text(
        "import package, sys\nprint('package', package.__version__, sys.prefix)\nsys.exit(7)\n"
    )
    with host_for(submission, store) as host, pytest.raises(SubmissionError, match="exit code 7"):
        push(host, submission)
    assert any(line.startswith(f"package 3.0 {store}") for line in host.printed)


def test_a_pip_that_is_missing_is_made_where_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pip, "find_spec", lambda name: None)

    command = pip.pip_command(tmp_path / "pip")

    assert command[0] != sys.executable
    subprocess.run([*command, "--version"], check=True, capture_output=True, timeout=60)
