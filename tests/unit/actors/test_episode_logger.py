from __future__ import annotations

import hashlib
import json
import pickle
import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from orchestrator.actors import episode_telemetry
from orchestrator.actors.episode_logger import RunAbandoned, with_fault, without_telemetry
from orchestrator.actors.episode_telemetry import MAX_INFO_BYTES, loggable_info
from orchestrator.adapters.benchmarks.spaces import action_record
from orchestrator.domain.episodes import CommitOutcome, EpisodeRun, FaultClass, FinishedEpisode
from orchestrator.domain.messages import EpisodeDataMessage, EpisodeStepDataMessage
from orchestrator.submission.wire import packb
from tests.unit.actors.rollout_fakes import a_job, a_logger, a_run, a_step

ACTION = np.array([0.1, -1e-7, 3e20], np.float32)


def play(logger: Any, steps: int, **last: Any) -> None:
    for index in range(steps):
        over = index == steps - 1
        logger.step(index, a_step(float(index), **(last if over else {})), truncated=False)


def finish(logger: Any, fault: FaultClass | None = None) -> FinishedEpisode:
    return logger.finish(success=fault is None, fault=fault, fault_detail=None)


def logged_steps(messages: Sequence[bytes]) -> list[int]:
    return [json.loads(message)["step"] for message in messages]


def test_a_step_message_is_the_json_that_the_model_makes() -> None:
    logger = a_logger(a_run("täsk/1"))
    info = {"success": True, "distance": np.float32(0.1), "note": 'ü"\n\x00'}
    logger.step(ACTION, a_step(0.1, over=True, **info), truncated=True)

    message = finish(logger).step_messages[0]

    parsed = EpisodeStepDataMessage.model_validate_json(message)
    expected = EpisodeStepDataMessage(
        timestamp=parsed.timestamp,
        job_id=7,
        env_name="env/name",
        benchmark_name="CartPole-v1",
        submission_id="sübmission",
        task_id="täsk/1",
        episode_id=3,
        step=0,
        action=action_record(ACTION),
        reward=0.1,
        done=True,
        truncated=True,
        info={"success": True, "distance": float(np.float32(0.1)), "note": 'ü"\n\x00'},
        step_timestamp=parsed.timestamp,
    )
    assert json.loads(message) == json.loads(expected.to_json())
    assert parsed == expected
    assert b"\n" not in message


def test_an_episode_message_holds_return_outcome_and_metrics_but_no_seed() -> None:
    logger = a_logger(a_run(seed=987_654))
    logger.policy_latency.add(0.25)
    logger.policy_latency.add(0.75)
    logger.step(0, a_step(2.5), truncated=False, clipped=2)
    logger.step(0, a_step(-1.0, over=True), truncated=False)

    finished = finish(logger)

    message = EpisodeDataMessage.model_validate_json(finished.episode_message)
    assert (message.final_reward, message.steps, message.success) == (1.5, 2, True)
    assert (message.start_time, message.end_time) == (finished.started_at, finished.ended_at)
    assert message.extra_metrics == {
        "terminated": True,
        "truncated": False,
        "clipped_actions": 1,
        "policy_latency_mean_seconds": 0.5,
        "policy_latency_max_seconds": 0.75,
    }
    assert b"seed" not in finished.episode_message
    assert b"987654" not in finished.episode_message
    assert finished.metrics["clipped_actions"] == 1.0


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [(7, 3, [0, 3, 6]), (8, 3, [0, 3, 6, 7]), (1, 50, [0]), (3, 50, [0, 2]), (4, 1, [0, 1, 2, 3])],
)
def test_every_nth_step_is_logged_and_always_the_first_and_the_last(
    steps: int, interval: int, expected: list[int]
) -> None:
    logger = a_logger(step_log_interval=interval)
    play(logger, steps, over=True)

    assert logged_steps(finish(logger).step_messages) == expected


def test_the_last_step_before_a_fault_is_logged() -> None:
    logger = a_logger(step_log_interval=10)
    play(logger, 6)

    assert logged_steps(finish(logger, FaultClass.CRASH).step_messages) == [0, 5]


def test_an_episode_without_steps_can_be_finished() -> None:
    finished = finish(a_logger(), FaultClass.CONNECTION_LOST)

    assert (finished.steps, finished.episode_return, finished.step_messages) == (0, 0.0, ())
    assert finished.action_trace_sha256 == hashlib.sha256(b"").hexdigest()
    assert zlib.decompress(finished.action_trace) == b""


def test_numbers_that_are_not_finite_become_null() -> None:
    logger = a_logger()
    result = a_step(float("nan"), distance=float("inf"), speeds=np.array([1.0, np.nan]), over=True)
    logger.step(0, result, truncated=False)

    finished = finish(logger)

    message = json.loads(finished.step_messages[0])
    assert message["reward"] is None
    assert message["info"] == {"distance": None, "speeds": [1.0, None]}
    assert json.loads(finished.episode_message)["final_reward"] is None


def test_the_return_is_the_sum_of_a_plain_loop_bit_for_bit() -> None:
    numbers = random.Random(1)
    rewards = [numbers.uniform(-1, 1) * 10 ** numbers.randint(-9, 9) for _ in range(1000)]
    logger = a_logger(log_steps=False)
    for reward in rewards:
        logger.step(0, a_step(reward), truncated=False)

    total = 0.0
    for reward in rewards:
        total += reward
    assert finish(logger).episode_return.hex() == total.hex()


def test_the_trace_is_every_action_on_the_wire_whatever_is_logged() -> None:
    logger = a_logger(step_log_interval=100, log_steps=False)
    actions = [3, ACTION, {"arm": ACTION, "grip": 1}]
    for action in actions:
        logger.step(action, a_step(), truncated=False)

    finished = finish(logger)

    packed = b"".join(map(packb, actions))
    assert zlib.decompress(finished.action_trace) == packed
    assert finished.action_trace_sha256 == hashlib.sha256(packed).hexdigest()


def test_a_trace_above_its_cap_leaves_only_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_telemetry, "MAX_TRACE_BYTES", 100)
    logger = a_logger(log_steps=False)
    actions = [np.random.default_rng(seed).bytes(50_000) for seed in range(3)]
    for action in actions:
        logger.step(action, a_step(), truncated=False)

    finished = finish(logger)

    assert finished.action_trace == b""
    assert finished.action_trace_sha256 == hashlib.sha256(b"".join(map(packb, actions))).hexdigest()
    assert finished.metrics["action_trace_dropped"] == 1.0


def test_telemetry_that_is_switched_off_leaves_no_step_messages() -> None:
    logger = a_logger(log_steps=False)
    play(logger, 3, over=True)

    finished = finish(logger)

    assert (finished.step_messages, finished.steps, finished.episode_return) == ((), 3, 3.0)


def test_an_episode_above_the_byte_cap_is_staged_in_parts_and_forgotten() -> None:
    parts: list[tuple[EpisodeRun, int, list[bytes]]] = []

    def stage(run: EpisodeRun, part: int, messages: Sequence[bytes]) -> None:
        parts.append((run, part, list(messages)))

    logger = a_logger(a_run(run=4), byte_cap=1000, stage=stage)
    play(logger, 20)
    finished = finish(logger)

    staged = [message for _, _, messages in parts for message in messages]
    assert [part for _, part, _ in parts] == list(range(finished.staged_parts))
    assert {run.run for run, _, _ in parts} == {4}
    assert finished.staged_parts > 1
    assert sum(map(len, finished.step_messages)) <= 1000
    assert logged_steps([*staged, *finished.step_messages]) == list(range(20))


def test_what_staging_raises_reaches_the_caller() -> None:
    def stage(run: EpisodeRun, part: int, messages: Sequence[bytes]) -> None:
        raise RunAbandoned("void", CommitOutcome.STALE)

    logger = a_logger(byte_cap=10, stage=stage)
    with pytest.raises(RunAbandoned, match="void"):
        play(logger, 1)


def test_info_is_reduced_to_scalars_texts_and_small_arrays() -> None:
    info = {
        "flag": np.bool_(True),
        "count": np.uint64(2**64 - 1),
        "ratio": 0.5,
        "huge": 10**30,
        "text": "x" * 10_000,
        "surrogate": "\ud800",
        "small": np.arange(3),
        "matrix": np.eye(2, dtype=np.float32),
        "pair": (1, np.float64(2.0)),
        "large": np.zeros(1000),
        "objects": np.array([object()]),
        "nested": {"a": 1},
        "nothing": None,
        "thing": object(),
        "mixed": [1, "a"],
        7: "no name",
    }

    kept = loggable_info(info)

    assert kept == {
        "flag": True,
        "count": 2**64 - 1,
        "ratio": 0.5,
        "huge": 10**30,
        "text": "x" * 256,
        "surrogate": "?",
        "small": [0, 1, 2],
        "matrix": [[1.0, 0.0], [0.0, 1.0]],
        "pair": [1, 2.0],
    }


def test_info_above_its_cap_is_cut() -> None:
    kept = loggable_info({f"key{index}": "x" * 250 for index in range(100)})

    assert 10 < len(kept) < 20
    assert len(json.dumps(kept)) <= MAX_INFO_BYTES


def test_a_later_verdict_is_written_into_the_episode_message_too() -> None:
    logger = a_logger()
    play(logger, 2)
    finished = logger.finish(success=False, fault=FaultClass.CONNECTION_LOST, fault_detail="reset by peer")

    judged = with_fault(finished, FaultClass.OUT_OF_MEMORY, "killed by the kernel")

    assert (judged.fault, judged.fault_detail) == (FaultClass.OUT_OF_MEMORY, "killed by the kernel")
    before = EpisodeDataMessage.model_validate_json(finished.episode_message)
    after = EpisodeDataMessage.model_validate_json(judged.episode_message)
    assert before.extra_metrics is not None
    assert after.extra_metrics == {**before.extra_metrics, "fault": "out_of_memory"}
    assert after.model_dump(exclude={"extra_metrics"}) == before.model_dump(exclude={"extra_metrics"})
    assert (after.final_reward, after.success) == (1.0, False)


def test_the_light_copy_keeps_the_outcome() -> None:
    logger = a_logger()
    play(logger, 3, over=True)
    finished = finish(logger)

    light = without_telemetry(finished)

    assert (light.steps, light.episode_return, light.success) == (3, 3.0, True)
    assert light.action_trace_sha256 == finished.action_trace_sha256
    assert (light.step_messages, light.action_trace, light.episode_message) == ((), b"", b"")


def test_the_job_is_named_in_every_message() -> None:
    logger = a_logger()
    play(logger, 2, over=True)

    messages = finish(logger).step_messages

    assert {json.loads(message)["submission_id"] for message in messages} == {a_job().submission_id}


def test_its_error_pickles() -> None:
    error = pickle.loads(pickle.dumps(RunAbandoned("void", CommitOutcome.STALE)))

    assert (str(error), error.commit) == ("void", CommitOutcome.STALE)
