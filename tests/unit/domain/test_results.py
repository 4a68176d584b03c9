import json
import math

import pytest

from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.lifecycle import FINAL, JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.domain.results import MAX_EXAMPLE_CHARS, build_result
from tests.episode_outcomes import outcome


def job(**fields: object) -> EvalJobMessage:
    return EvalJobMessage.model_validate(
        {
            "job_id": 7,
            "competition_id": "c",
            "submission_id": "s",
            "miner_hotkey": "m",
            "env_provider": "gymnasium",
            "benchmark_name": "CartPole-v1",
            **fields,
        }
    )


OUTCOMES = [
    outcome("a", 10.0),
    outcome("a", 20.0, success=False),
    outcome("b", 30.0),
    outcome("b", 5.0, fault=FaultClass.CRASH),
]


def test_a_completed_job_is_scored_by_its_success_rate() -> None:
    result = build_result(job(), JobStatus.COMPLETED, OUTCOMES, 4, validator_hotkey="v")

    assert result.score == result.success_rate == 0.5
    assert result.avg_reward == 65.0 / 4
    assert (result.total_episodes, result.validator_hotkey, result.miner_hotkey) == (4, "v", "m")


def test_the_job_may_ask_for_the_mean_return_as_score() -> None:
    message = job(config={"score": "avg_reward"})

    result = build_result(message, JobStatus.COMPLETED, OUTCOMES, 4, validator_hotkey="v")

    assert result.score == result.avg_reward == 65.0 / 4


def test_a_task_with_faults_only_leaves_an_avg_reward_score_unknown() -> None:
    message = job(config={"score": "avg_reward"})
    outcomes = [outcome("a", 10.0), outcome("b", 99.0, fault=FaultClass.CRASH)]

    result = build_result(message, JobStatus.COMPLETED, outcomes, 2, validator_hotkey="v")

    assert (result.score, result.avg_reward, result.success_rate) == (None, None, 0.5)


def test_the_first_episode_of_each_class_of_faults_is_told_of_in_words() -> None:
    outcomes = [
        outcome("a", 10.0),
        outcome("a", 1.0, fault=FaultClass.STEP_TIMEOUT, episode_id=1, detail="step 3: no whole reply"),
        outcome("b", 1.0, fault=FaultClass.CRASH, episode_id=0, detail="first"),
        outcome("b", 1.0, fault=FaultClass.CRASH, episode_id=1, detail="second"),
    ]

    result = build_result(job(), JobStatus.COMPLETED, outcomes, 4, validator_hotkey="v")

    assert result.extra_data is not None
    assert result.extra_data["fault_examples"] == [
        {"fault": "crash", "task_id": "b", "episode_id": 0, "detail": "first"},
        {"fault": "step_timeout", "task_id": "a", "episode_id": 1, "detail": "step 3: no whole reply"},
    ]


def test_a_long_fault_is_told_of_by_its_beginning_and_its_end() -> None:
    long = outcome("a", 1.0, fault=FaultClass.CRASH, detail="step 3: " + "x" * 100_000 + " KeyError")

    result = build_result(job(), JobStatus.COMPLETED, [long], 1, validator_hotkey="v")

    assert result.extra_data is not None
    ((words,),) = [[example["detail"] for example in result.extra_data["fault_examples"]]]
    assert len(words) == MAX_EXAMPLE_CHARS
    assert words.startswith("step 3: x")
    assert words.endswith("x KeyError")


def test_clipped_actions_are_counted_by_task_and_in_all() -> None:
    outcomes = [outcome("a", clipped_actions=3), outcome("a"), outcome("b", clipped_actions=2), outcome("c")]

    result = build_result(job(), JobStatus.COMPLETED, outcomes, 4, validator_hotkey="v")

    assert result.extra_data is not None
    summaries = [*result.extra_data["tasks"], result.extra_data["overall"]]
    counts = [(summary["clipped_episodes"], summary["clipped_actions"]) for summary in summaries]
    assert counts == [(1, 3), (1, 2), (0, 0), (2, 5)]


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.TIMEOUT, JobStatus.CANCELLED])
def test_an_unfinished_job_has_no_score_but_says_what_was_found(status: JobStatus) -> None:
    result = build_result(job(), status, OUTCOMES[:3], 10, validator_hotkey="v", error="why")

    assert (result.score, result.success_rate, result.total_episodes) == (None, 2 / 3, 3)
    assert result.error == "why"
    assert result.extra_data is not None
    assert (result.extra_data["planned_episodes"], result.extra_data["missing_episodes"]) == (10, 7)


def test_a_deadline_after_the_last_outcome_costs_no_score() -> None:
    assert build_result(job(), JobStatus.TIMEOUT, OUTCOMES, 4, validator_hotkey="v").score == 0.5


def test_a_job_that_never_planned_an_episode_has_no_score() -> None:
    result = build_result(job(), JobStatus.FAILED, [], 0, validator_hotkey="v", error="no such benchmark")

    assert (result.score, result.success_rate, result.avg_reward, result.total_episodes) == (
        None,
        None,
        None,
        0,
    )


def test_completed_with_outcomes_missing_is_a_bug() -> None:
    with pytest.raises(ValueError, match="COMPLETED with 4 outcomes of 5"):
        build_result(job(), JobStatus.COMPLETED, OUTCOMES, 5, validator_hotkey="v")


@pytest.mark.parametrize("status", sorted(set(JobStatus) - FINAL))
def test_only_final_jobs_have_results(status: JobStatus) -> None:
    with pytest.raises(ValueError, match="is not final"):
        build_result(job(), status, OUTCOMES, 4, validator_hotkey="v")


def test_the_details_hold_tasks_intervals_faults_and_versions() -> None:
    result = build_result(
        job(seed_group="spring"),
        JobStatus.COMPLETED,
        OUTCOMES,
        4,
        validator_hotkey="v",
        versions={"gymnasium": "1.2"},
        success_rule="the pole stands",
        extra={"containers": 2, "tasks": "never this"},
    )

    details = result.extra_data
    assert details is not None
    assert [task["task_id"] for task in details["tasks"]] == ["a", "b"]
    assert details["tasks"][1]["faults"] == details["faults"] == {"crash": 1}
    low, high = details["overall"]["interval"]
    assert low < 0.5 < high
    assert details["versions"] == {"gymnasium": "1.2"}
    assert details["success_rule"] == "the pole stands"
    assert (details["containers"], details["seed_group"], details["confidence"]) == (2, "spring", 0.95)


@pytest.mark.parametrize(("config", "seeds"), [({}, "derived"), ({"seed": 0}, "open")])
def test_the_result_says_whether_anyone_can_repeat_its_seeds(config: dict[str, int], seeds: str) -> None:
    result = build_result(job(config=config), JobStatus.COMPLETED, OUTCOMES, 4, validator_hotkey="v")

    assert result.extra_data is not None
    assert result.extra_data["seeds"] == seeds


def test_a_result_is_valid_json_even_with_returns_that_are_not_finite() -> None:
    result = build_result(
        job(), JobStatus.COMPLETED, [outcome(episode_return=math.inf)], 1, validator_hotkey="v"
    )

    document = json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert document["extra_data"]["overall"]["mean_return"] is None
    assert EvalResultMessage.model_validate(document).score == 1.0
