import io
import json
import math
import os
from pathlib import Path

import pytest

from orchestrator.domain.episodes import EpisodeOutcome, FaultClass
from orchestrator.domain.errors import UsageError
from orchestrator.domain.lifecycle import JobStatus
from orchestrator.domain.messages import EvalJobMessage, EvalResultMessage
from orchestrator.domain.results import build_result
from orchestrator.presentation import (
    check_bundle_directory,
    make_console,
    results_json,
    results_table,
    write_bundle,
)
from tests.episode_outcomes import AT, outcome
from tests.golden_texts import check_golden

EPISODES = [
    outcome("reach-v3", 10.0, steps=100),
    outcome("reach-v3", 20.0, steps=100),
    outcome("pick-place-wall-v3", 1.0, steps=100),
    outcome("pick-place-wall-v3", 1.0, steps=100, success=False, fault=FaultClass.OUT_OF_MEMORY),
]


def result(status: JobStatus = JobStatus.COMPLETED, **fields: object) -> EvalResultMessage:
    message = EvalJobMessage(job_id=3, env_provider="metaworld", benchmark_name="MT10")
    return build_result(message, status, EPISODES, 4, validator_hotkey="v").model_copy(update=fields)


def shown(results: list[EvalResultMessage], columns: int | None = None) -> str:
    stream = io.StringIO()
    make_console(stream, columns=columns).print(results_table(results))
    return stream.getvalue()


def row(text: str, start: str) -> str:
    """The line that starts so, with one space between its words."""
    return " ".join(next(line for line in text.splitlines() if line.startswith(start)).split())


def test_the_table_has_a_row_a_task_and_a_total() -> None:
    text = shown([result()])

    assert row(text, "reach-v3") == "reach-v3 2 100.0 % 34.2 to 100.0 15.00 100.0 0"
    assert row(text, "pick-place") == "pick-place-wall-v3 2 50.0 % 9.5 to 90.5 1.00 100.0 1"
    assert row(text, "total") == "total 4 75.0 % 30.1 to 95.4 8.00 100.0 1"
    assert "faults of pick-place-wall-v3: 1 out_of_memory" in text


def test_in_a_pipe_it_is_text_without_escapes_and_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)

    text = shown([result()])

    assert "\x1b" not in text
    assert "mean steps" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("columns", "present", "absent"),
    [
        (90, ["mean steps", "mean return", "interval"], []),
        (80, ["mean return", "interval"], ["mean steps"]),
        (66, ["interval", "faults"], ["mean return"]),
        (40, ["success", "faults"], ["interval"]),
    ],
)
def test_a_narrow_terminal_loses_columns_and_never_digits(
    columns: int, present: list[str], absent: list[str]
) -> None:
    text = shown([result()], columns)

    assert all(title in text for title in present)
    assert not any(title in text for title in absent)
    assert max(map(len, text.splitlines())) <= columns
    assert row(text, "total").startswith("total 4 75.0 %")


def test_a_failure_shows_its_reason_and_the_end_of_the_log() -> None:
    text = shown([result(JobStatus.FAILED, error="no module [bold]foo[/bold]", logs="Traceback\n  boom\n")])

    assert "FAILED" in text
    assert "no module [bold]foo[/bold]" in text
    assert "  boom" in text


def test_a_job_that_ended_early_says_how_much_is_missing() -> None:
    message = EvalJobMessage(job_id=3, env_provider="metaworld", benchmark_name="MT10")
    timed_out = build_result(message, JobStatus.TIMEOUT, EPISODES, 10, validator_hotkey="v")

    assert "6 of 10 episodes missing" in shown([timed_out])
    assert "score" not in shown([timed_out]).splitlines()[0]


def test_a_result_without_details_still_shows() -> None:
    text = shown(
        [result(JobStatus.FAILED, extra_data=None, score=None, error="the message did not validate")]
    )

    assert "the message did not validate" in text


def test_a_log_is_shown_only_where_it_tells_more_than_the_error() -> None:
    refused = "the archive was refused: it holds a link"

    nothing_more = shown([result(JobStatus.FAILED, error=refused, logs=f"{refused}\n")])
    more = shown([result(JobStatus.FAILED, error=refused, logs=f"{refused}\nout of tokens\n")])

    assert "log" not in nothing_more
    assert "out of tokens" in more


def test_text_of_a_submission_cannot_drive_the_terminal() -> None:
    hostile = result(
        JobStatus.FAILED, error="\x1b]0;owned\x07", logs="\x1b[2J\rgone", benchmark_name="\x1b[31mMT10"
    )

    assert not set("\x1b\x07\r") & set(shown([hostile]))


def result_of(
    outcomes: list[EpisodeOutcome],
    status: JobStatus = JobStatus.COMPLETED,
    planned: int | None = None,
    **more: str,
) -> EvalResultMessage:
    message = EvalJobMessage(job_id=3, env_provider="metaworld", benchmark_name="MT10")
    return build_result(message, status, outcomes, planned or len(outcomes), validator_hotkey="v", **more)


def without_trailing_spaces(text: str) -> str:
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


TRACEBACK = """Traceback (most recent call last):
  File "agent.py", line 12, in act
    return self.policy(observation["joints"])
KeyError: 'joints'
"""


def test_faults_are_shown_by_task_and_the_first_of_each_class_in_words() -> None:
    crash = "step 4: the submission ended: killed by SIGSEGV\nthe end of its log:\nFatal Python error: ..."
    raised = f"step 0: the policy raised an exception:\n{TRACEBACK}"
    outcomes = [
        outcome("reach-v3", episode_id=0, steps=100),
        outcome(
            "reach-v3", 2.0, success=False, fault=FaultClass.POLICY_EXCEPTION, episode_id=1, detail=raised
        ),
        outcome("push-v3", 2.0, success=False, fault=FaultClass.CRASH, episode_id=0, detail=crash),
        outcome(
            "push-v3", 2.0, success=False, fault=FaultClass.POLICY_EXCEPTION, episode_id=1, detail="later"
        ),
    ]

    check_golden("bad_submissions", "eval_faults", without_trailing_spaces(shown([result_of(outcomes)], 100)))


def test_clipped_actions_are_told_of_below_the_table() -> None:
    outcomes = [
        outcome("reach-v3", episode_id=0, clipped_actions=7),
        outcome("reach-v3", episode_id=1),
        outcome("push-v3", episode_id=0, clipped_actions=5),
    ]

    check_golden(
        "bad_submissions", "eval_clipped", without_trailing_spaces(shown([result_of(outcomes)], 100))
    )
    assert "clipped" not in shown([result_of(outcomes[1:2])])


def test_a_submission_that_did_not_load_shows_its_traceback_once() -> None:
    error = f"the submission did not load:\n{TRACEBACK}"
    logs = f"reading weights\n{error}\nmore\n"

    failed = result_of([], JobStatus.FAILED, 20, error=error, logs=logs)

    check_golden("bad_submissions", "eval_did_not_load", without_trailing_spaces(shown([failed], 100)))


def test_a_submission_that_ended_too_often_shows_the_table_the_faults_the_reason_and_the_log() -> None:
    detail = "step 10: the submission ended: out of memory: 2216689664 bytes of 2147483648 allowed"
    outcomes = [
        outcome(
            "reach-v3", 2.0, success=False, fault=FaultClass.OUT_OF_MEMORY, episode_id=number, detail=detail
        )
        for number in range(2)
    ]
    error = (
        "the submission ended or hung in more than 2 episodes, the limit of this installation; "
        f"the last was episode 2 of reach-v3, {detail}"
    )

    failed = result_of(outcomes, JobStatus.FAILED, 10, error=error, logs="loading the replay buffer\n")

    check_golden("bad_submissions", "eval_ended_too_often", without_trailing_spaces(shown([failed], 100)))


def test_of_many_tasks_with_faults_the_first_are_shown() -> None:
    outcomes = [
        outcome(f"task-{number}", success=False, fault=FaultClass.CRASH, detail="step 1: gone")
        for number in range(25)
    ]

    text = shown([result_of(outcomes)])

    assert text.count("faults of task-") == 20
    assert "and faults of 5 more tasks" in text


def test_the_words_of_a_fault_cannot_drive_the_terminal() -> None:
    hostile = outcome(
        "reach-v3", success=False, fault=FaultClass.POLICY_EXCEPTION, detail="\x1b[2J\rgone\x07"
    )

    assert not set("\x1b\x07\r") & set(shown([result_of([hostile])]))


def test_the_json_keeps_every_key_and_is_valid_where_numbers_are_not_finite() -> None:
    text = results_json([result(score=None, avg_reward=math.nan)])

    (document,) = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["results"]

    assert (document["score"], document["avg_reward"], document["logs"]) == (None, None, None)
    assert EvalResultMessage.model_validate(document).job_id == 3


def test_the_bundle_holds_result_episodes_and_summary(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    episodes = [*EPISODES, outcome("reach-v3", math.inf)]

    paths = write_bundle(directory, [result()], {3: episodes})

    assert sorted(path.name for path in paths) == sorted(os.listdir(directory))
    lines = [json.loads(line) for line in (directory / "episodes.jsonl").read_text().splitlines()]
    assert [line["episode_return"] for line in lines] == [10.0, 20.0, 1.0, 1.0, None]
    assert (lines[3]["job_id"], lines[3]["fault"], lines[3]["started_at"]) == (
        3,
        "out_of_memory",
        AT.isoformat(),
    )
    assert json.loads((directory / "result.json").read_text())["results"][0]["score"] == 0.75
    assert "reach-v3" in (directory / "summary.txt").read_text()


def test_a_bundle_replaces_the_one_before_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")

    write_bundle(tmp_path, [result()], {3: EPISODES})

    assert json.loads((tmp_path / "result.json").read_text())["results"]
    assert sorted(os.listdir(tmp_path)) == ["episodes.jsonl", "notes.txt", "result.json", "summary.txt"]


def test_a_bundle_that_cannot_be_written_leaves_the_old_files_whole(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()

    with pytest.raises(UsageError, match=r"result\.json cannot be written"):
        write_bundle(tmp_path, [result()], {3: EPISODES})

    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_file_is_no_place_for_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="cannot hold the results"):
        check_bundle_directory(tmp_path / "file")
