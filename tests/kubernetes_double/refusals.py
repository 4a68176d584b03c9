"""What the API server says when it does not do as it was asked: a `Status` object and its HTTP code."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


class Refused(Exception):
    """The request is answered with this code and a `Status` of this reason."""

    def __init__(self, code: int, reason: str, message: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(code, reason, message, retry_after_seconds)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds

    def status(self) -> Json:
        """The body of the answer."""
        details = {} if self.retry_after_seconds is None else {"retryAfterSeconds": self.retry_after_seconds}
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": details,
            "code": self.code,
        }


def not_found(plural: str, name: str) -> Refused:
    return Refused(404, "NotFound", f'{plural} "{name}" not found')


def already_exists(plural: str, name: str, *, being_deleted: bool) -> Refused:
    prefix = "object is being deleted: " if being_deleted else ""
    return Refused(409, "AlreadyExists", f'{prefix}{plural} "{name}" already exists')


def conflict(message: str) -> Refused:
    return Refused(409, "Conflict", message)


def gone(message: str = "too old resource version: 1 (2)") -> Refused:
    return Refused(410, "Expired", message)


def forbidden(plural: str, name: str, why: str) -> Refused:
    return Refused(403, "Forbidden", f'{plural} "{name}" is forbidden: {why}')


def bad_request(message: str) -> Refused:
    return Refused(400, "BadRequest", message)


def unauthorized() -> Refused:
    return Refused(401, "Unauthorized", "Unauthorized")
