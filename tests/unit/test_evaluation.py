"""How the command line turns what a person asks for into jobs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.domain.errors import UsageError
from orchestrator.evaluation import EvalRequest, make_jobs
from tests.policy_processes import ECHO_AGENT, write_agent

CARTPOLE = "gymnasium/CartPole-v1"


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_packed_submission_leaves_a_data_directory_that_the_embedded_server_can_use(tmp_path: Path) -> None:
    submission = write_agent(tmp_path / "mine", ECHO_AGENT)
    data_dir = tmp_path / "data"

    (job,) = make_jobs([EvalRequest(str(submission), CARTPOLE)], data_dir / "artifacts")

    assert (job.artifact_url or "").startswith(f"file://{data_dir}/artifacts/")
    # The server of root runs as another user; nobody but the server's account has business in it otherwise.
    assert stat.S_IMODE(data_dir.stat().st_mode) == (0o755 if os.geteuid() == 0 else 0o700)


def test_wrong_usage_leaves_no_archive(tmp_path: Path) -> None:
    submission = str(write_agent(tmp_path / "mine", ECHO_AGENT))
    good, bad = EvalRequest(submission, CARTPOLE), EvalRequest(submission, "gymnasium/CartPole-v9")

    with pytest.raises(UsageError, match="CartPole-v9"):
        make_jobs([good, bad], tmp_path / "data" / "artifacts")

    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("address", ["localhost:0", "localhost:65536", "[::1]:99999"])
def test_a_port_that_is_none_is_wrong_usage(tmp_path: Path, address: str) -> None:
    with pytest.raises(UsageError, match="ports go from 1 to 65535"):
        make_jobs([EvalRequest(address, CARTPOLE)], tmp_path)
