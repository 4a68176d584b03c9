"""Whose fault an end was: a test for each row of what real nodes have shown, and for what a pod waits for."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.adapters.kubernetes.evidence import (
    GONE,
    PodView,
    Waiting,
    judge,
    newest_trouble,
    patience_seconds,
    view_of,
)
from orchestrator.adapters.kubernetes.pod_record import PodRecord
from orchestrator.domain.episodes import FaultClass
from orchestrator.ports import Evidence, Verdict

OURS, THEIRS = Verdict.INFRASTRUCTURE, Verdict.SUBMISSION


def condition(kind: str, status: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


DISRUPTED = {
    reason: condition("DisruptionTarget", "True", reason)
    for reason in (
        "TerminationByKubelet",
        "EvictionByEvictionAPI",
        "DeletionByTaintManager",
        "PreemptionByScheduler",
        "DeletionByPodGC",
    )
}
READY = [condition("Ready", "True"), condition("ContainersReady", "True")]


def view(
    *,
    phase: str = "Failed",
    state: dict[str, Any] | None = None,
    conditions: list[dict[str, Any]] | None = None,
    version: int = 1,
    deleted: bool = False,
    **status: Any,
) -> PodView:
    statuses = [] if state is None else [{"name": "submission", "state": state}]
    pod = {
        "metadata": {"name": "submission-1", "uid": "1", "resourceVersion": str(version)}
        | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleted else {}),
        "spec": {"nodeName": "node-1", "containers": [{"name": "submission", "image": "image"}]},
        "status": {"phase": phase, "conditions": conditions or [], "containerStatuses": statuses, **status},
    }
    return view_of(pod)


def terminated(code: int, reason: str = "Error", message: str = "") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


RUNS = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited 0 by itself"),
        (1, "exit code 1"),
        (139, "exit code 139 (SIGSEGV)"),
        (137, "exit code 137 (SIGKILL)"),
        (255, "exit code 255"),
    ],
)
def test_an_exit_code_is_the_submissions_crash(code: int, words: str) -> None:
    state = terminated(code, "Completed" if code == 0 else "Error")

    evidence = judge(view(phase="Succeeded" if code == 0 else "Failed", state=state))

    assert evidence == Evidence(False, words, THEIRS, FaultClass.CRASH, code)


def test_oom_killed_is_the_submissions_memory() -> None:
    evidence = judge(view(state=terminated(137, "OOMKilled")))

    assert evidence == Evidence(False, "out of memory", THEIRS, FaultClass.OUT_OF_MEMORY, 137)


def test_a_child_killed_for_memory_leaves_no_trace() -> None:
    record = PodRecord("submission-1")

    record.see(view(phase="Running", state=RUNS, conditions=READY))

    assert record.evidence == Evidence(True, "running")


def test_the_deadline_of_a_container_that_ran_is_the_submissions() -> None:
    evidence = judge(view(state=terminated(137), reason="DeadlineExceeded"))

    assert evidence == Evidence(False, "lifetime exceeded", THEIRS, FaultClass.CRASH, 137)


def test_the_deadline_of_a_container_that_never_ran_is_ours() -> None:
    evidence = judge(view(state=terminated(137, "ContainerStatusUnknown"), reason="DeadlineExceeded"))

    assert (evidence.verdict, evidence.fault) == (OURS, None)


def test_the_deadline_of_a_container_that_was_seen_to_run_is_the_submissions() -> None:
    record = PodRecord("submission-1")
    record.see(view(phase="Running", state=RUNS, conditions=READY))

    lost = terminated(137, "ContainerStatusUnknown")
    record.see(view(state=lost, reason="DeadlineExceeded", version=2))

    assert record.end is not None
    assert record.end.verdict is THEIRS


def test_an_eviction_for_its_own_storage_is_the_submissions_disk() -> None:
    message = 'Usage of EmptyDir volume "work" exceeds the limit "20Mi". '

    evidence = judge(view(state=terminated(137), reason="Evicted", message=message))

    assert (evidence.verdict, evidence.fault) == (THEIRS, FaultClass.OUT_OF_DISK)
    assert 'volume "work"' in evidence.reason


def test_an_eviction_by_a_node_that_is_short_of_something_is_ours() -> None:
    conditions = [DISRUPTED["TerminationByKubelet"]]

    evidence = judge(view(state=terminated(137), reason="Evicted", conditions=conditions))

    assert evidence.verdict is OURS


def test_an_eviction_for_the_nodes_sake_is_ours_also_without_the_condition() -> None:
    message = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. "

    assert judge(view(state=terminated(137), reason="Evicted", message=message)).verdict is OURS


@pytest.mark.parametrize(
    "reason", ["EvictionByEvictionAPI", "DeletionByTaintManager", "PreemptionByScheduler"]
)
@pytest.mark.parametrize("code", [137, 143, 0])
def test_a_disruption_by_the_cluster_is_ours_whatever_the_container_made_of_it(
    reason: str, code: int
) -> None:
    evidence = judge(view(state=terminated(code), conditions=[DISRUPTED[reason]]))

    assert evidence.verdict is OURS
    assert reason in evidence.reason


@pytest.mark.parametrize("reason", ["OutOfmemory", "OutOfcpu", "NodeAffinity", "UnexpectedAdmissionError"])
def test_a_pod_that_its_kubelet_does_not_take_is_ours(reason: str) -> None:
    evidence = judge(view(reason=reason, message="Pod was rejected"))

    assert (evidence.verdict, evidence.reason) == (OURS, f"{reason}: Pod was rejected")


def test_a_program_that_cannot_be_started_is_ours() -> None:
    evidence = judge(view(state=terminated(128, "StartError", 'exec: "pythn": not found')))

    assert evidence.verdict is OURS
    assert "pythn" in evidence.reason


def test_a_node_that_does_not_answer_is_ours() -> None:
    record = PodRecord("submission-1")

    conditions = [condition("Ready", "False"), condition("ContainersReady", "True")]
    record.see(view(phase="Running", state=RUNS, conditions=conditions))

    assert record.evidence is not None
    assert (record.evidence.running, record.evidence.verdict) == (False, OURS)


def test_a_node_that_answers_again_has_lost_nothing() -> None:
    record = PodRecord("submission-1")
    lost = [condition("Ready", "False"), condition("ContainersReady", "True")]
    record.see(view(phase="Running", state=RUNS, conditions=lost))

    record.see(view(phase="Running", state=RUNS, conditions=READY, version=2))

    assert record.evidence == Evidence(True, "running")


def test_a_pod_that_is_deleted_while_it_runs_is_ours() -> None:
    record = PodRecord("submission-1")

    record.see(view(phase="Running", state=RUNS, conditions=READY, deleted=True))
    record.see(view(state=terminated(143), deleted=True, version=2))

    assert record.end is not None
    assert record.end.verdict is OURS


def test_a_pod_that_is_gone_without_a_word_is_ours() -> None:
    record = PodRecord("submission-1")
    record.see(view(phase="Running", state=RUNS, conditions=READY))

    record.see_gone("1")

    assert record.end == GONE


# --------------------------------------------------------------------------------- what counts, and when


async def test_the_kubelets_own_reason_comes_with_the_phase_and_is_waited_for() -> None:
    record = PodRecord("submission-1")
    record.see(view(phase="Running", state=terminated(137)))
    before = record.evidence

    message = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "
    record.see(view(state=terminated(137), reason="Evicted", message=message, version=2))

    assert before is None
    assert record.end is not None
    assert record.end.fault is FaultClass.OUT_OF_DISK


async def test_an_end_whose_phase_never_comes_is_judged_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.adapters.kubernetes.pod_record.PHASE_SECONDS", 0.0)
    record = PodRecord("submission-1")
    record.see(view(phase="Running", state=terminated(3)))

    evidence = await record.settled()

    assert evidence == Evidence(False, "exit code 3", THEIRS, FaultClass.CRASH, 3)


def test_what_is_added_after_the_end_changes_nothing() -> None:
    record = PodRecord("submission-1")
    record.see(view(phase="Running", state=terminated(3)))

    late = [DISRUPTED["EvictionByEvictionAPI"]]
    record.see(view(state=terminated(3), conditions=late, deleted=True, version=2))
    record.see_gone("1")

    assert record.end == Evidence(False, "exit code 3", THEIRS, FaultClass.CRASH, 3)


def test_garbage_collection_of_a_pod_that_had_ended_excuses_nothing() -> None:
    ended = view(state=terminated(3), conditions=[DISRUPTED["DeletionByPodGC"]])
    cut_off = view(state=RUNS, conditions=[DISRUPTED["DeletionByPodGC"]])

    assert (judge(ended).verdict, judge(cut_off).verdict) == (THEIRS, OURS)


def test_news_of_before_and_of_another_pod_of_the_name_are_told_apart() -> None:
    record = PodRecord("submission-1")
    record.see(view(phase="Running", state=RUNS, conditions=READY, version=5))

    record.see(view(phase="Pending", version=4))
    record.see_gone("another uid")

    assert record.evidence == Evidence(True, "running")


@pytest.mark.parametrize(
    "pod", [{}, {"metadata": {}}, {"metadata": {"name": "a", "uid": "b"}}, {"status": 1}]
)
def test_what_is_no_pod_is_refused(pod: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        view_of(pod)


# ------------------------------------------------------------------------------------------ the waiting


@pytest.mark.parametrize(
    ("waiting", "seconds"),
    [
        (Waiting("ContainerCreating"), None),
        (Waiting("PodInitializing"), None),
        (Waiting("InvalidImageName", "couldn't parse"), 0.0),
        (Waiting("ErrImagePull", "failed to resolve reference: not found"), 0.0),
        (Waiting("ErrImagePull", "401 Unauthorized"), 0.0),
        (Waiting("ErrImagePull", "dial tcp: i/o timeout"), 60.0),
        (Waiting("ImagePullBackOff", "Back-off pulling image"), 60.0),
        (Waiting("CreateContainerConfigError", 'configmap "a" not found'), 5.0),
    ],
)
def test_what_cannot_get_better_is_not_waited_for(waiting: Waiting, seconds: float | None) -> None:
    assert patience_seconds(waiting) == seconds


def test_the_newest_event_that_tells_of_trouble_is_told() -> None:
    events = [
        {"type": "Normal", "reason": "Scheduled", "lastTimestamp": "2026-01-01T00:00:09Z"},
        {
            "type": "Warning",
            "reason": "FailedMount",
            "message": "old",
            "lastTimestamp": "2026-01-01T00:00:01Z",
        },
        {
            "type": "Warning",
            "reason": "FailedCreatePodSandBox",
            "message": "user namespaces\nare not supported \x1b[31m",
            "eventTime": "2026-01-01T00:00:05.000000Z",
        },
    ]

    assert newest_trouble(events) == "FailedCreatePodSandBox: user namespaces are not supported ?[31m"
    assert newest_trouble(events[:1]) == ""


def test_a_view_keeps_the_reason_for_which_no_node_takes_it() -> None:
    message = "0/3 nodes are available: 3 Insufficient cpu."
    pod = {
        "metadata": {"name": "a", "uid": "b", "resourceVersion": "3"},
        "spec": {"containers": [{"image": "image"}]},
        "status": {"conditions": [condition("PodScheduled", "False", "Unschedulable", message)]},
    }

    seen = view_of(pod)

    assert (seen.unschedulable, seen.is_scheduled) == (f"Unschedulable: {message}", False)
    assert seen.terminated is None


def test_a_container_that_the_cluster_adds_to_every_pod_is_not_taken_for_the_submission() -> None:
    pod = {
        "metadata": {"name": "submission-1", "uid": "1", "resourceVersion": "1"},
        "spec": {"containers": [{"name": "mesh", "image": "proxy"}, {"name": "submission", "image": "ours"}]},
        "status": {
            "phase": "Running",
            "containerStatuses": [
                {"name": "mesh", "state": {"running": {}}},
                {"name": "submission", "state": {"terminated": {"reason": "Error", "exitCode": 3}}},
            ],
        },
    }

    seen = view_of(pod)

    assert seen.image == "ours"
    assert seen.terminated is not None
    assert seen.terminated.exit_code == 3
    assert not seen.runs
