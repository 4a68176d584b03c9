"""The objects of the double, as etcd and the watch cache keep them: versions, history, selectors."""

from __future__ import annotations

import asyncio
import copy
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from tests.kubernetes_double.refusals import (
    Json,
    already_exists,
    bad_request,
    conflict,
    gone,
    not_found,
)

HISTORY_LENGTH = 50_000


@dataclass(frozen=True, slots=True)
class Kind:
    """A resource of the API."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


KINDS = {
    kind.plural: kind
    for kind in (
        Kind("", "v1", "pods", "Pod"),
        Kind("", "v1", "configmaps", "ConfigMap"),
        Kind("", "v1", "events", "Event"),
        Kind("", "v1", "namespaces", "Namespace", namespaced=False),
        Kind("", "v1", "resourcequotas", "ResourceQuota"),
        Kind("", "v1", "serviceaccounts", "ServiceAccount"),
        Kind("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
        Kind("node.k8s.io", "v1", "runtimeclasses", "RuntimeClass", namespaced=False),
        Kind("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", namespaced=False),
    )
}

# The fields that the real server selects by; any other is refused.
FIELDS = {
    "pods": (
        "metadata.name",
        "metadata.namespace",
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    ),
    "events": (
        "metadata.name",
        "metadata.namespace",
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ),
}
NAME_AND_NAMESPACE = ("metadata.name", "metadata.namespace")


def timestamp(at: datetime | None = None) -> str:
    """RFC 3339 in whole seconds, as the API server writes them."""
    return (at or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Key:
    plural: str
    namespace: str  # "" where it has none
    name: str


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the history. `before` is None for what was added, `after` for what was removed."""

    version: int
    key: Key
    before: Json | None
    after: Json | None


class ObjectStore:
    """Whatever is read from it or written to it is a copy."""

    def __init__(self) -> None:
        self._objects: dict[Key, Json] = {}
        self._versions = itertools.count(1001)
        self.version = 1000
        self._oldest = 1000  # a watch from before this is answered with 410
        self._history: deque[Change] = deque()
        self._bell = asyncio.Event()

    # ------------------------------------------------------------------------------------------ reading

    def get(self, key: Key) -> Json:
        try:
            return copy.deepcopy(self._objects[key])
        except KeyError:
            raise not_found(key.plural, key.name) from None

    def find(self, key: Key) -> Json | None:
        return copy.deepcopy(self._objects.get(key))

    def select(
        self, plural: str, namespace: str | None = None, wanted: Selector | None = None
    ) -> list[tuple[Key, Json]]:
        """In the order of their names, as etcd keeps them."""
        found = [
            (key, copy.deepcopy(stored))
            for key, stored in self._objects.items()
            if key.plural == plural
            and namespace in (None, "", key.namespace)
            and (wanted is None or wanted(stored))
        ]
        return sorted(found, key=lambda pair: (pair[0].namespace, pair[0].name))

    def uids(self, namespace: str) -> set[str]:
        return {
            stored["metadata"]["uid"] for key, stored in self._objects.items() if key.namespace == namespace
        }

    # ------------------------------------------------------------------------------------------ writing

    def add(self, kind: Kind, namespace: str, given: Json, *, dry_run: bool = False) -> Json:
        """The object as it was created.

        Raises:
            Refused: the name is taken, by something that is perhaps being deleted.
        """
        stored = copy.deepcopy(given)
        metadata = stored.setdefault("metadata", {})
        if "name" not in metadata and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid4().hex[:5]
        key = Key(kind.plural, namespace if kind.namespaced else "", metadata["name"])
        if (there := self._objects.get(key)) is not None:
            raise already_exists(
                kind.plural, key.name, being_deleted="deletionTimestamp" in there["metadata"]
            )
        stored |= {"kind": kind.kind, "apiVersion": kind.api_version}
        metadata |= {"uid": str(uuid4()), "creationTimestamp": timestamp()}
        if kind.namespaced:
            metadata["namespace"] = namespace
        if not dry_run:
            self._write(key, None, stored)
        return copy.deepcopy(stored)

    def change(self, key: Key, change: Callable[[Json], None], uid: str | None = None) -> Json:
        """The object after the change; one that changes nothing makes no new version.

        Raises:
            Refused: there is none, or it is another one of the same name.
        """
        before = self._objects.get(key)
        if before is None:
            raise not_found(key.plural, key.name)
        if uid is not None and before["metadata"]["uid"] != uid:
            raise conflict(f"the UID in the precondition ({uid}) is not that of the object")
        after = copy.deepcopy(before)
        change(after)
        if after != before:
            self._write(key, before, after)
        return copy.deepcopy(after)

    def remove(self, key: Key, uid: str | None = None) -> Json | None:
        """What was removed; None where there was none (of this uid)."""
        before = self._objects.get(key)
        if before is None or (uid is not None and before["metadata"]["uid"] != uid):
            return None
        del self._objects[key]
        self._write(key, before, None)
        return copy.deepcopy(before)

    def _write(self, key: Key, before: Json | None, after: Json | None) -> None:
        self.version = next(self._versions)
        if after is not None:
            after["metadata"]["resourceVersion"] = str(self.version)
            self._objects[key] = after
        self._history.append(Change(self.version, key, before, after))
        while len(self._history) > HISTORY_LENGTH:
            self._oldest = self._history.popleft().version
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    # ---------------------------------------------------------------------------------------- watching

    def compact(self) -> None:
        """Forget the history: every watch from an earlier version is answered with 410."""
        self._history.clear()
        self._oldest = self.version

    def changes_after(self, version: int) -> list[Change]:
        """What happened since.

        Raises:
            Refused: 410, that long ago nobody remembers.
        """
        if version < self._oldest:
            raise gone(f"too old resource version: {version} ({self._oldest})")
        newer: list[Change] = []
        for change in reversed(self._history):
            if change.version <= version:
                break
            newer.append(change)
        return newer[::-1]

    @property
    def next_change(self) -> asyncio.Event:
        """Is set by the next write. Take it before looking at what there is, if you await between the two."""
        return self._bell


# ---------------------------------------------------------------------------------------- selectors

Selector = Callable[[Json], bool]

_SET_TERM = re.compile(r"^(?P<key>[^\s!=,()]+)\s+(?P<operator>in|notin)\s+\((?P<values>[^)]*)\)$")
_EQUALITY_TERM = re.compile(r"^(?P<key>[^\s!=,()]+)\s*(?P<operator>==|!=|=)\s*(?P<value>[^\s!=,()]*)$")
_PRESENCE_TERM = re.compile(r"^(?P<negated>!?)\s*(?P<key>[^\s!=,()]+)$")


def selector(plural: str, labels: str, fields: str) -> Selector:
    """What `labelSelector` and `fieldSelector` ask for together.

    Raises:
        Refused: 400, they cannot be read, or select by a field that the server does not know.
    """
    terms = [_label_term(term) for term in _split(labels)] + [
        _field_term(plural, term) for term in _split(fields)
    ]
    return lambda stored: all(term(stored) for term in terms)


def _split(text: str) -> Iterator[str]:
    return (term.strip() for term in re.split(r",(?![^(]*\))", text) if term.strip())


def _label_term(text: str) -> Selector:
    def labels(stored: Json) -> Json:
        found: Json = stored["metadata"].get("labels") or {}
        return found

    if match := _SET_TERM.match(text):
        key, among = match["key"], {value.strip() for value in match["values"].split(",")}
        if match["operator"] == "in":
            return lambda stored: labels(stored).get(key) in among
        return lambda stored: labels(stored).get(key) not in among
    if match := _EQUALITY_TERM.match(text):
        key, value, negated = match["key"], match["value"], match["operator"] == "!="
        return lambda stored: (labels(stored).get(key) == value) is not negated
    if match := _PRESENCE_TERM.match(text):
        key, absent = match["key"], bool(match["negated"])
        return lambda stored: (key in labels(stored)) is not absent
    raise bad_request(f"unable to parse requirement: {text}")


def _field_term(plural: str, text: str) -> Selector:
    match = _EQUALITY_TERM.match(text)
    if match is None:
        raise bad_request(f"invalid field selector: {text!r}")
    field, value, negated = match["key"], match["value"], match["operator"] == "!="
    if field not in FIELDS.get(plural, NAME_AND_NAMESPACE):
        raise bad_request(f"field label not supported: {field}")

    def holds(stored: Json) -> bool:
        found: object = stored
        for part in field.split("."):
            found = found.get(part, "") if isinstance(found, dict) else ""
        return (str(found) == value) is not negated

    return holds


def deletion_time(grace_seconds: float) -> str:
    return timestamp(datetime.now(UTC) + timedelta(seconds=grace_seconds))
