"""The errors that cross module and process borders.

Every error passes its positional arguments to `super().__init__` and formats itself in `__str__`, so that it
survives pickling across Ray.
"""

from __future__ import annotations


class OrchestratorError(Exception):
    """Base of every error that this package raises on purpose."""


class UsageError(OrchestratorError):
    """The caller asked for something that cannot be: say what, and what would do."""


class InvalidJob(UsageError):
    """A job message that can never run, with the reason a person can act on."""

    def __init__(self, job_id: int | None, reason: str) -> None:
        super().__init__(job_id, reason)
        self.job_id = job_id
        self.reason = reason

    def __str__(self) -> str:
        return self.reason if self.job_id is None else f"job {self.job_id}: {self.reason}"


class UnknownJob(UsageError):
    """No job has this id in the database that was asked."""

    def __init__(self, job_id: int, place: str) -> None:
        super().__init__(job_id, place)
        self.job_id = job_id
        self.place = place

    def __str__(self) -> str:
        return f"there is no job {self.job_id} on {self.place}; `orchestrator jobs` lists those there are"


class JobIdTaken(UsageError):
    """Another job, with other content, has this id."""

    def __init__(self, job_id: int) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return f"job {self.job_id} exists with other content: submit it under another job_id"


class Superseded(UsageError):
    """A newer generation of the control plane runs: this one has no right to start."""

    def __init__(self, newest: int, own: int) -> None:
        super().__init__(newest, own)
        self.newest = newest
        self.own = own

    def __str__(self) -> str:
        return (
            f"generation {self.newest} of this installation's control plane runs on the cluster already, and "
            f"this one is {self.own}: somebody has started newer code or other settings since. Start again "
            "to take its place"
        )


class KeyReused(UsageError):
    """An Idempotency-Key came before, with another request."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return "this Idempotency-Key was used for another job: send a new key with a new job"


class JobNotFinished(OrchestratorError):
    """A wait for a job's end was given up; the job goes on."""

    def __init__(self, job_id: int, status: str, seconds: float) -> None:
        super().__init__(job_id, status, seconds)
        self.job_id = job_id
        self.status = status
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"job {self.job_id} is still {self.status} after {self.seconds:g} s: "
            f"`orchestrator status {self.job_id}` says what it waits for"
        )


class SubmissionError(OrchestratorError):
    """The submission is at fault: fail the job and show why."""

    def __init__(self, reason: str, log_tail: str = "") -> None:
        super().__init__(reason, log_tail)
        self.reason = reason
        self.log_tail = log_tail

    def __str__(self) -> str:
        return self.reason


class SubmissionKilled(SubmissionError):
    """Somebody killed the submission before it answered: perhaps itself, perhaps not."""


class InfrastructureError(OrchestratorError):
    """Our side is at fault: retry, and never charge the submission."""


class SubmissionSilent(InfrastructureError):
    """A submission has its archive, and does not answer as its server should: its doing, or the network's."""


class PolicyError(OrchestratorError):
    """What a worker saw on a policy connection; the evidence decides later whose fault it was."""


class PolicyLost(PolicyError):
    """The connection to the policy is gone (refused, reset, closed or half-closed)."""


class PolicyLate(PolicyError):
    """No whole reply came within the deadline. The connection must not be used again."""


class PolicyProtocolError(PolicyError):
    """The peer sent something that the wire does not allow (frame, codec, dtype, size, sequence)."""


class PolicyRaised(PolicyError):
    """The policy raised an exception while it computed a reply; the text is its traceback."""


class AuthenticationFailed(PolicyError):
    """The peer did not prove the session key: it is not our container."""


class IllegalTransition(OrchestratorError):
    """A status change that the lifecycle does not allow: a bug, never an input error."""

    def __init__(self, job_id: int, current: str, requested: str) -> None:
        super().__init__(job_id, current, requested)
        self.job_id = job_id
        self.current = current
        self.requested = requested

    def __str__(self) -> str:
        return f"job {self.job_id}: {self.current} may not become {self.requested}"


class Fenced(OrchestratorError):
    """Another incarnation holds the job: stop at once, and remove nothing by name or handle."""

    def __init__(self, job_id: int, epoch: int) -> None:
        super().__init__(job_id, epoch)
        self.job_id = job_id
        self.epoch = epoch

    def __str__(self) -> str:
        return f"job {self.job_id}: epoch {self.epoch} is not the current one any more"


class HandedOver(OrchestratorError):
    """The job was let go in good order, for another supervisor to go on with."""


class SchemaMismatch(OrchestratorError):
    """The database's schema is not the one that this version of the code works with."""

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(found, expected)
        self.found = found
        self.expected = expected

    def __str__(self) -> str:
        if self.found > self.expected:
            return (
                f"the database has schema version {self.found}, this orchestrator knows {self.expected}: "
                "install the newer orchestrator, or use another database"
            )
        return (
            f"the database has schema version {self.found}, this orchestrator needs {self.expected}: "
            "run `orchestrator db migrate`"
        )
