from itertools import product

import pytest

from orchestrator.domain.errors import IllegalTransition
from orchestrator.domain.lifecycle import FINAL, HELD, TRANSITIONS, JobStatus, check_transition, may_become

# Written out on purpose, a row a status: the walk shows every difference from the table.
ALLOWED = {
    JobStatus.QUEUED: {JobStatus.STARTING, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.STARTING: set(JobStatus) - {JobStatus.QUEUED},
    JobStatus.RUNNING: set(JobStatus) - {JobStatus.QUEUED, JobStatus.RUNNING},
    JobStatus.COMPLETED: set(),
    JobStatus.FAILED: set(),
    JobStatus.TIMEOUT: set(),
    JobStatus.CANCELLED: set(),
}


@pytest.mark.parametrize(("current", "requested"), list(product(JobStatus, JobStatus)))
def test_every_pair_of_statuses_is_allowed_or_refused(current: JobStatus, requested: JobStatus) -> None:
    allowed = requested in ALLOWED[current]

    assert may_become(current, requested) is allowed
    if allowed:
        check_transition(1, current, requested)
    else:
        with pytest.raises(IllegalTransition, match=f"job 1: {current} may not become {requested}"):
            check_transition(1, current, requested)


def test_every_transition_says_what_makes_it_happen() -> None:
    assert all(reason.strip() for reason in TRANSITIONS.values())


def test_a_final_status_is_final() -> None:
    assert {current for current, _ in TRANSITIONS} == set(JobStatus) - FINAL


def test_every_status_can_be_reached_and_every_life_can_end() -> None:
    reachable = closure({JobStatus.QUEUED})

    assert reachable == set(JobStatus)
    assert all(closure({status}) & FINAL for status in JobStatus)


def test_no_status_is_held_and_final_and_only_a_queued_one_is_neither() -> None:
    assert not FINAL & HELD
    assert set(JobStatus) - FINAL - HELD == {JobStatus.QUEUED}
    assert all(status.is_final == (status in FINAL) for status in JobStatus)
    assert all(status.is_held == (status in HELD) for status in JobStatus)


def closure(statuses: set[JobStatus]) -> set[JobStatus]:
    while True:
        further = statuses | {after for before, after in TRANSITIONS if before in statuses}
        if further == statuses:
            return statuses
        statuses = further
