"""`orchestrator replay` on jobs that were really played, and committed by the real ledger."""

from __future__ import annotations

import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from orchestrator.adapters.postgres.pool import Database, open_connection
from orchestrator.domain.errors import PolicyRaised
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.ports import Observation
from tests.conftest import run_in_own_loop
from tests.golden_texts import check_golden
from tests.in_process_cli import Ran, run_cli
from tests.job_fixtures import a_job
from tests.played_jobs import play_job
from tests.unit.actors.rollout_fakes import balance


def played(database: Database, message: EvalJobMessage, *arguments: Any, **options: Any) -> None:
    run_in_own_loop(lambda: play_job(database, message, *arguments, **options))


def replay(database: Database, *arguments: str) -> Ran:
    return run_cli("replay", *arguments, "--database-url", database.dsn)


def change(database: Database, statement: str, *values: Any) -> None:
    async def execute() -> None:
        async with open_connection(database.dsn) as connection:
            await connection.execute(statement, *values)

    run_in_own_loop(execute)


def check(case: str, printed: str) -> None:
    """Against the golden text, without what differs from machine to machine."""
    printed = re.sub(r"\b[0-9a-f]{64}\b", "<sha256>", printed)
    printed = re.sub(r"127\.0\.0\.1:\d+/\w+", "<database>", printed)
    printed = re.sub(r"as they were then \(.*\)", "as they were then (<versions>)", printed)
    check_golden("replay", case, printed)


def crash_at(step: int) -> Callable[[Observation], Any]:
    count = itertools.count()
    return lambda observation: PolicyRaised("oops") if next(count) == step else balance(observation)


def chunks(observation: Observation) -> np.ndarray[Any, Any]:
    return np.array([balance(observation)] * 5)


JOBS: dict[str, tuple[EvalJobMessage, Callable[[Observation], Any]]] = {
    "cartpole": (a_job(), balance),
    "cut short by the job": (a_job(config={"max_episode_steps": 17}), balance),
    "chunks of actions": (a_job(config={"action_horizon": 3}), chunks),
    "clipped actions": (
        a_job(benchmark_name="Pendulum-v1", config={"score": "avg_reward"}),
        lambda observation: observation["observation"][:1] * 5.0,
    ),
    "a fault": (a_job(), crash_at(7)),
    "a fault before the first action": (a_job(), crash_at(0)),
    "metaworld": (
        a_job(env_provider="metaworld", benchmark_name="reach-v3", config={"max_episode_steps": 40}),
        lambda observation: observation["observation"][:4] * 30.0 - 1.0,
    ),
}


@pytest.mark.parametrize("kind", JOBS)
def test_what_was_played_is_equal_when_it_is_replayed(database: Database, kind: str) -> None:
    message, reply = JOBS[kind]
    played(database, message, reply)

    ran = replay(database, "1", "0", "--json")

    (episode,) = json.loads(ran.stdout)["episodes"]
    assert (ran.code, episode["verdict"], episode["differences"]) == (0, "equal", [])
    now = episode["now"]
    assert episode["recorded"] | {"success": now["success"]} == now | {"fault": episode["recorded"]["fault"]}


def test_every_episode_of_a_job_is_replayed(database: Database) -> None:
    played(database, a_job(), crash_at(700), episodes=3)

    ran = replay(database, "1", "--all")

    assert ran.code == 0
    check("every_episode_equal", ran.stdout)


def test_one_episode_may_be_named_with_its_task(database: Database) -> None:
    played(database, a_job(), episodes=2)

    ran = replay(database, "1", "CartPole-v1:1")

    assert ran.code == 0
    check("one_episode_equal", ran.stdout)


def test_of_a_job_that_still_runs_the_finished_episodes_are_replayed(database: Database) -> None:
    played(database, a_job(), episodes=3, leave_out=1, finish=False)

    ran = replay(database, "1", "--all")

    assert ran.code == 0
    check("job_still_runs", ran.stdout)


# ------------------------------------------------------------------------------------ what is different


def test_a_return_that_somebody_changed_is_found(database: Database) -> None:
    played(database, a_job(), episodes=2)
    change(database, "UPDATE episodes SET episode_return = 499.99999999999994 WHERE episode_id = 1")

    ran = replay(database, "1", "--all")

    assert ran.code == 1
    check("return_changed", ran.stdout)


def test_actions_that_somebody_changed_are_found(database: Database) -> None:
    played(database, a_job())
    change(database, "UPDATE episodes SET action_trace = $1", zlib.compress(bytes([0, 1] * 250)))

    ran = replay(database, "1", "0")

    assert ran.code == 1
    check("actions_changed", ran.stdout)


def test_actions_that_the_environment_has_no_room_for_are_said(database: Database) -> None:
    played(database, a_job())
    change(database, "UPDATE episodes SET action_trace = $1", zlib.compress(bytes([1, 0, 5])))

    ran = replay(database, "1", "0")

    assert ran.code == 1
    check("action_out_of_range", ran.stdout)


def test_other_code_of_the_environment_is_found(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    played(database, a_job())
    original = CartPoleEnv.__init__

    def heavier(self: CartPoleEnv, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.gravity = 25.0

    monkeypatch.setattr(CartPoleEnv, "__init__", heavier)

    ran = replay(database, "1", "0")

    assert ran.code == 1
    check("other_code", ran.stdout)


def test_other_versions_are_named_where_something_differs(database: Database) -> None:
    played(database, a_job(), versions={"python": "3.11.1", "gymnasium": "0.0.1"})
    change(database, "UPDATE episodes SET steps = 499")

    ran = replay(database, "1", "0")

    assert ran.code == 1
    check("other_versions", re.sub(r"(\S+) now$", "<version> now", ran.stdout, flags=re.MULTILINE))


def test_an_environment_that_is_not_deterministic_is_told_from_one_that_changed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(database, a_job())
    count = itertools.count()
    original = CartPoleEnv.step

    def unsteady(self: CartPoleEnv, action: int) -> Any:
        observation, reward, *rest = original(self, action)
        return observation, reward + next(count) / 1024, *rest

    monkeypatch.setattr(CartPoleEnv, "step", unsteady)

    ran = replay(database, "1", "0")

    assert ran.code == 1
    check("not_deterministic", ran.stdout)


def test_an_environment_that_carries_something_over_is_told_apart(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    played(database, a_job(), episodes=2)
    reset, step = CartPoleEnv.reset, CartPoleEnv.step
    kept = {"episodes": 0}

    def count(self: CartPoleEnv, **options: Any) -> Any:
        kept["episodes"] += 1
        return reset(self, **options)

    def drift(self: CartPoleEnv, action: int) -> Any:
        observation, reward, *rest = step(self, action)
        return observation, reward + (kept["episodes"] == 2), *rest

    monkeypatch.setattr(CartPoleEnv, "reset", count)
    monkeypatch.setattr(CartPoleEnv, "step", drift)

    ran = replay(database, "1", "--all")

    assert ran.code == 1
    check("carries_over", ran.stdout)


# ------------------------------------------------------------------------------ what cannot be replayed


@pytest.mark.parametrize(
    ("case", "trace"),
    [
        ("actions_not_kept", b""),
        ("actions_damaged", b"no zlib at all"),
        ("actions_cut_short", zlib.compress(bytes(1000))[:-8]),
        ("actions_are_something_else", zlib.compress(b"\xc1\xc1")),
        ("last_action_cut_short", zlib.compress(b"\x01\xcd\x00")),
    ],
)
def test_actions_that_are_not_there_or_cannot_be_read_are_said(
    database: Database, case: str, trace: bytes
) -> None:
    played(database, a_job())
    change(database, "UPDATE episodes SET action_trace = $1", trace)

    ran = replay(database, "1", "0")

    assert ran.code == 3
    check(case, ran.stdout)


def test_an_environment_that_raises_is_said(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    played(database, a_job())

    def broken(self: CartPoleEnv, action: int) -> Any:
        raise RuntimeError("no display")

    monkeypatch.setattr(CartPoleEnv, "step", broken)

    ran = replay(database, "1", "0")

    assert ran.code == 3
    check("environment_raises", ran.stdout)


# ------------------------------------------------------------------------------------------------ usage


def test_a_benchmark_that_is_not_installed_is_said(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = a_job(env_provider="metaworld", benchmark_name="MT10")
    played(database, message, episodes=1, benchmark=_MT10(), leave_out=10, finish=False)
    change(database, FINISHED)
    monkeypatch.setitem(sys.modules, "metaworld", None)

    ran = replay(database, "1", "reach-v3:0")

    assert ran.code == 2
    check("benchmark_not_installed", ran.stderr)


class _MT10:
    task_ids = ("reach-v3", "push-v3")


FINISHED = """UPDATE episodes SET finished = true, episode_return = 1, steps = 1, success = false, epoch = 1,
    action_trace_sha256 = '' WHERE task_id = 'reach-v3'"""


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("no_such_job", ("99", "0")),
        ("no_episode_named", ("1",)),
        ("an_episode_and_all", ("1", "0", "--all")),
        ("not_an_episode", ("1", "first")),
        ("two_tasks_named", ("1", "reach-v3:0", "--task", "push-v3")),
        ("no_task_named", ("1", "0")),
        ("no_such_task", ("1", "0", "--task", "reach")),
        ("no_such_episode", ("1", "reach-v3:7")),
        ("no_outcome_yet", ("1", "push-v3:0")),
        ("no_outcome_at_all", ("1", "--all", "--task", "push-v3")),
        ("no_plan", ("2", "0")),
    ],
)
def test_what_is_not_there_is_said(database: Database, case: str, arguments: tuple[str, ...]) -> None:
    message = a_job(env_provider="metaworld", benchmark_name="MT10")
    played(database, message, episodes=2, benchmark=_MT10(), leave_out=4, finish=False)
    change(database, FINISHED)
    change(
        database,
        """INSERT INTO jobs (job_id, message, status, error) VALUES (2,
           '{"job_id": 2, "env_provider": "gymnasium", "benchmark_name": "CartPol-v1"}', 'FAILED',
           'unknown gymnasium benchmark ''CartPol-v1''.')""",
    )

    ran = replay(database, *arguments)

    assert (ran.code, ran.stdout) == (2, "")
    check(case, ran.stderr)
