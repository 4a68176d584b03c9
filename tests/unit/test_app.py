"""What the composition root decides by itself."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator.actors.submission_container import ExternalPolicy, SubmissionContainer
from orchestrator.adapters.postgres.installation import Installation
from orchestrator.adapters.postgres.pool import Database
from orchestrator.app import ControlPlaneRecipe
from orchestrator.domain.errors import SubmissionError, UsageError
from orchestrator.ports import Claim
from orchestrator.settings import Settings
from tests.job_fixtures import a_job
from tests.unit.actors.simulated_job import a_claim


def a_recipe(data_dir: Path) -> ControlPlaneRecipe:
    installation = Installation(uuid4(), os.urandom(32), 1)
    return ControlPlaneRecipe(
        Settings(data_dir=data_dir), Database("postgresql://nowhere/jobs"), installation
    )


def claim_of(url: str, *, local: bool = True) -> Claim:
    claim = a_claim()
    return replace(claim, job=replace(claim.job, message=a_job(artifact_url=url), local=local))


def a_dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        return process.pid


async def test_a_supervisor_sweeps_up_what_dead_ones_of_its_own_machine_left(
    database: Database, tmp_path: Path
) -> None:
    recipe = replace(a_recipe(tmp_path), database=database)
    scratch = tmp_path / "scratch" / str(recipe.installation.installation_id)
    left = {machine: scratch / machine / f"7-{a_dead_pid()}-1" for machine in (platform.node(), "another")}
    for directory in left.values():
        directory.mkdir(parents=True)

    async with recipe.open_supervision(1, uuid4()):
        there = [directory.exists() for directory in left.values()]

    assert there == [False, True]
    assert not (scratch / platform.node()).exists()


def test_a_local_job_may_name_a_policy_server(tmp_path: Path) -> None:
    policy = a_recipe(tmp_path)._policy(claim_of("ws://[::1]:8000"), None, None, tmp_path)  # type: ignore[arg-type]

    assert isinstance(policy, ExternalPolicy)
    assert (policy.connector.host, policy.connector.port) == ("::1", 8000)  # type: ignore[attr-defined]


@pytest.mark.parametrize("url", ["ws://h:65536", "ws://h:no", "ws://h", "ws://:80", "ws://[::1:80", "WS:h:1"])
def test_an_address_that_is_none_can_never_be_evaluated(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="no address of a policy server"):
        a_recipe(tmp_path)._policy(claim_of(url), None, None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["ws://10.0.0.1:80", "ws://h:65536"])
def test_a_job_from_elsewhere_may_name_no_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="only jobs of the local command line"):
        a_recipe(tmp_path)._policy(claim_of(url, local=False), None, None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["https://[::1", "nonsense", ""])
def test_a_url_that_can_never_be_fetched_is_refused_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(SubmissionError, match="malformed"):
        a_recipe(tmp_path)._policy(claim_of(url), None, None, tmp_path)  # type: ignore[arg-type]


def test_every_other_url_is_left_to_whoever_fetches_it(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path)

    policy = recipe._policy(claim_of("https://example.org/a.tar.gz"), None, None, tmp_path)  # type: ignore[arg-type]

    assert isinstance(policy, SubmissionContainer)
