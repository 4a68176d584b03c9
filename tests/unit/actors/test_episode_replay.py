from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from orchestrator.actors import episode_telemetry
from orchestrator.actors.episode_replay import ReplayStopped, replay_and_compare, replay_episode
from orchestrator.actors.episode_runner import run_episode
from orchestrator.actors.episode_telemetry import ActionTrace, UnreadableTrace, recorded_actions, trace_sha256
from orchestrator.actors.worker_resources import EnvironmentCache
from orchestrator.adapters.benchmarks.gymnasium_provider import GymnasiumEnvironment, _Recipe
from orchestrator.domain.replay import RecordedEpisode, Verdict, same_number
from orchestrator.submission.wire import packb
from tests.unit.actors.rollout_fakes import (
    LIMITS,
    FakePolicy,
    ScriptedBenchmark,
    ScriptedEnvironment,
    a_job,
    a_logger,
    a_run,
    a_step,
)

ARM = spaces.Box(-1.0, 1.0, (3,), np.float32)
SPACES = {
    "dict": spaces.Dict(
        {
            "arm": ARM,
            "gripper": spaces.Discrete(3, start=-1),
            "deep": spaces.Dict({"lamps": spaces.MultiBinary(2)}),
        }
    ),
    "tuple": spaces.Tuple((ARM, spaces.Discrete(2), spaces.Text(4))),
    "number": spaces.Box(-1.0, 1.0, (), np.float32),
    "integers": spaces.Box(0, 9, (2, 2), np.int16),
    "multi discrete": spaces.MultiDiscrete([3, 4]),
}
# Some out of bounds: what is recorded is what the environment was given.
REPLIES: dict[str, Any] = {
    "dict": {"arm": [9.0, 0.5, -9.0], "gripper": -1, "deep/lamps": [1, 0]},
    "tuple": [[0.1, 0.2, 9.0], 1, "go"],
    "number": 7.5,
    "integers": [[1, 2], [3, 99]],
    "multi discrete": [2, 3],
}


class Weighing(gymnasium.Env[Any, Any]):
    """Its rewards depend on every bit of the actions and on the seed; it changes what it is given."""

    observation_space = spaces.Discrete(100)

    def __init__(self, space: str) -> None:
        self.action_space = SPACES[space]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return 0, {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        reward = zlib.crc32(packb(action)) / 7.0 + self.np_random.random()
        if isinstance(action, np.ndarray) and action.shape:
            action += 1
        elif isinstance(action, dict):
            action["arm"] *= 2
        return self.steps, reward, self.steps == 5, False, {}


@pytest.fixture(params=SPACES)
def weighing(request: pytest.FixtureRequest) -> Iterator[tuple[GymnasiumEnvironment, Any]]:
    """An environment with that kind of actions, and a reply to it."""
    gymnasium.register("Weighing-v0", entry_point=Weighing, kwargs={"space": request.param})
    environment = GymnasiumEnvironment(_Recipe("Weighing-v0", {}, None))
    yield environment, REPLIES[request.param]
    environment.close()
    del gymnasium.registry["Weighing-v0"]


def played(environment: Any, reply: Any, steps: int | None = None) -> RecordedEpisode:
    """What is recorded of an episode."""
    run = a_run()
    report = run_episode(
        environment,
        FakePolicy(lambda _: reply),
        run,
        a_logger(run),
        LIMITS,
        lambda summary: True,
        threading.Event(),
    )
    finished = report.finished
    assert finished is not None, report.detail
    return RecordedEpisode(
        key=run.key,
        seed=run.seed,
        episode_return=finished.episode_return,
        steps=finished.steps,
        success=finished.success,
        terminated=finished.terminated,
        truncated=finished.truncated,
        fault=finished.fault,
        action_trace_sha256=finished.action_trace_sha256,
        action_trace=finished.action_trace,
    )


def test_every_kind_of_action_is_replayed_bit_for_bit(weighing: tuple[GymnasiumEnvironment, Any]) -> None:
    environment, reply = weighing
    recorded = played(environment, reply)

    playback = replay_episode(environment, a_job(), recorded, lambda summary: True, threading.Event())

    assert same_number(playback.episode_return, recorded.episode_return)
    assert (playback.steps, playback.terminated, playback.success) == (5, True, True)
    assert playback.played_sha256 == playback.stored_sha256 == recorded.action_trace_sha256


def test_a_return_that_is_no_number_equals_itself() -> None:
    environment = ScriptedEnvironment([a_step(float("nan"), over=True)])
    recorded = played(environment, 1)

    replay = replay_and_compare(cache(environment), a_job(), recorded, threading.Event())

    assert replay.verdict is Verdict.EQUAL
    assert not same_number(0.0, -0.0)


def test_a_replay_that_is_stopped_ends_after_its_current_step() -> None:
    stop = threading.Event()
    stop.set()
    environment = ScriptedEnvironment([a_step(over=True)])
    recorded = played(environment, 1)

    with pytest.raises(ReplayStopped):
        replay_and_compare(cache(environment), a_job(), recorded, stop)

    assert len(environment.actions) == 1  # that of `played`


def cache(environment: ScriptedEnvironment) -> EnvironmentCache:
    return EnvironmentCache(ScriptedBenchmark(lambda task: environment, task_ids=(a_run().task_id,)))


# ------------------------------------------------------------------------------------- reading a trace

ACTIONS = [3, np.arange(200, dtype=np.float32), {"a": [1, "text"]}, -(2**40), np.zeros((), np.int8)]


def trace_of(actions: list[Any]) -> tuple[bytes, str]:
    trace = ActionTrace()
    for action in actions:
        trace.add(action)
    return trace.finish()


@pytest.mark.parametrize("chunk_bytes", [1, 7, 2**16])
def test_actions_are_read_as_they_were_written_however_the_data_comes(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(episode_telemetry, "TRACE_CHUNK_BYTES", chunk_bytes)
    data, sha256 = trace_of(ACTIONS)

    read = list(recorded_actions(data))

    assert list(map(packb, read)) == list(map(packb, ACTIONS))
    assert trace_sha256(data) == sha256


def test_the_trace_of_no_action_has_none() -> None:
    data, sha256 = trace_of([])

    assert list(recorded_actions(data)) == []
    assert trace_sha256(data) == sha256


def test_a_trace_is_read_a_little_at_a_time() -> None:
    """A million zeros are a kilobyte: nobody unpacks them to see the first."""
    data = zlib.compress(bytes(2**26))

    assert next(recorded_actions(data)) == 0


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_trace_that_is_cut_short_is_refused(cut: int) -> None:
    data, _ = trace_of(ACTIONS)

    with pytest.raises(UnreadableTrace):
        list(recorded_actions(data[:-cut]))
    with pytest.raises(UnreadableTrace):
        trace_sha256(data[:-cut])
