import json
import math
import tracemalloc
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.domain.errors import InvalidJob
from orchestrator.domain.job_documents import MAX_JOB_ID
from orchestrator.domain.messages import (
    EpisodeDataMessage,
    EpisodeStepDataMessage,
    EvalJobMessage,
    JobStatusUpdateMessage,
)

JOB = {"job_id": 5, "env_provider": "gymnasium", "benchmark_name": "CartPole-v1"}
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def parse(**fields: object) -> EvalJobMessage:
    return EvalJobMessage.parse(json.dumps({**JOB, **fields}))


def test_fields_that_nobody_knows_yet_are_kept() -> None:
    message = parse(colour="red", config={"mystery": [1]}, resources={"gpus": 1})

    again = json.loads(message.to_json())

    assert (again["colour"], again["config"], again["resources"]["gpus"]) == ("red", {"mystery": [1]}, 1)


def test_a_message_survives_the_wire() -> None:
    message = parse(config={"seed": 3}, artifact_expires_at="2026-01-02T03:04:05Z", tags={"a": "b"})

    assert EvalJobMessage.parse(message.to_json()) == message


def test_a_job_needs_no_more_than_its_id_and_its_benchmark() -> None:
    message = parse()

    assert (message.priority, message.protocol, message.job_config.score) == (0, "openpi", "success_rate")
    assert message.timestamp.utcoffset() is not None


@pytest.mark.parametrize("job_id", [0, MAX_JOB_ID])
def test_job_ids_reach_from_zero_to_the_largest_bigint(job_id: int) -> None:
    assert parse(job_id=job_id).job_id == job_id


@pytest.mark.parametrize("job_id", [-1, MAX_JOB_ID + 1, "five", None, 1.5])
def test_a_job_id_that_is_none_cannot_be_answered(job_id: object) -> None:
    with pytest.raises(InvalidJob) as refused:
        parse(job_id=job_id)

    assert refused.value.job_id is None


@pytest.mark.parametrize(
    "fields",
    [
        {"benchmark_name": ""},
        {"env_provider": None},
        {"config": {"score": "beauty"}},
        {"config": {"episodes_per_task": 0}},
        {"config": []},
        {"timeout_seconds": 0},
        {"artifact_sha256": "abc"},
        {"artifact_expires_at": "2026-01-02T03:04:05"},
        {"image": "ghcr.io/someone/policy:latest"},
        {"protocol": "telepathy"},
        {"resources": {"workers": 0}},
        {"priority": 2**31},
    ],
    ids=str,
)
def test_a_message_that_can_never_run_names_its_job_and_the_field(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidJob) as refused:
        parse(**fields)

    assert refused.value.job_id == 5
    assert (
        next(iter(fields)) in refused.value.reason
        or "score" in refused.value.reason
        or "episodes" in str(refused)
    )


@pytest.mark.parametrize("payload", [b"", b"not JSON", b"[]", b"null", b"\xff\xfe", b'{"job_id": 5'])
def test_a_payload_that_is_no_message_names_no_job(payload: bytes) -> None:
    with pytest.raises(InvalidJob) as refused:
        EvalJobMessage.parse(payload)

    assert refused.value.job_id is None


def test_the_reason_stays_short_whatever_was_sent() -> None:
    with pytest.raises(InvalidJob) as refused:
        parse(priority="x" * 1_000_000)

    assert len(refused.value.reason) < 1000


def test_a_status_update_names_its_type_and_time() -> None:
    document = json.loads(JobStatusUpdateMessage(job_id=1, validator_hotkey="v", status="RUNNING").to_json())

    assert (document["message_type"], document["status"]) == ("job_status_update", "RUNNING")
    assert datetime.fromisoformat(document["timestamp"]).utcoffset() is not None


def test_numbers_that_are_not_finite_leave_as_null() -> None:
    message = EpisodeStepDataMessage(
        job_id=1,
        env_name="e",
        benchmark_name="b",
        submission_id="s",
        task_id="t",
        episode_id=0,
        step=0,
        action={"type": "box", "value": [math.nan, 1.0], "shape": [2]},
        reward=-math.inf,
        done=False,
        truncated=False,
        step_timestamp=AT,
    )

    document = json.loads(message.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    assert document["action"]["value"] == [None, 1.0]


def test_an_episode_message_carries_its_return_bit_for_bit() -> None:
    message = EpisodeDataMessage(
        job_id=1,
        submission_id="s",
        task_id="t",
        episode_id=0,
        env_name="e",
        benchmark_name="b",
        final_reward=0.1 + 0.2,
        success=True,
        steps=3,
        start_time=AT,
        end_time=AT,
    )

    assert json.loads(message.to_json())["final_reward"] == 0.1 + 0.2


def test_a_long_key_with_many_fields_below_it_takes_no_more_memory_than_the_message() -> None:
    payload = json.dumps({**JOB, "k" * 400_000: dict.fromkeys(map(str, range(50_000)), 0)})
    tracemalloc.start()
    try:
        EvalJobMessage.parse(payload)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 200 * 2**20


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
)
FIELDS = st.dictionaries(st.sampled_from([*EvalJobMessage.model_fields, "colour"]), JSON_VALUES, max_size=4)


def parsed_or_refused(payload: str) -> EvalJobMessage | InvalidJob:
    try:
        return EvalJobMessage.parse(payload)
    except InvalidJob as refused:
        return refused


@settings(max_examples=200)
@given(fields=FIELDS)
def test_whatever_is_sent_is_refused_in_words_or_survives_the_wire(fields: dict[str, object]) -> None:
    payload = json.dumps({**JOB, **fields})

    given = parsed_or_refused(payload)

    if isinstance(given, InvalidJob):
        assert given.reason.isprintable()
        assert len(given.reason) < 3000
        assert EvalJobMessage.salvage(5, payload).job_id == 5
    else:
        assert EvalJobMessage.parse(given.to_json()) == given
        assert json.loads(given.to_json()).get("colour") == fields.get("colour")


@given(payload=st.binary(max_size=200))
def test_whatever_bytes_come_are_refused_and_name_no_job(payload: bytes) -> None:
    with pytest.raises(InvalidJob) as refused:
        EvalJobMessage.parse(payload)

    assert refused.value.job_id is None
    assert refused.value.reason.isprintable()
