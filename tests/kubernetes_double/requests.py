"""What a request asks for, read from its path and query as the API server's RequestInfo does."""

from __future__ import annotations

from collections.abc import Mapping

from tests.kubernetes_double.objects import KINDS, Kind
from tests.kubernetes_double.refusals import Refused, bad_request
from tests.kubernetes_double.rights import Call

_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch"}


def read_call(method: str, path: str, query: Mapping[str, str]) -> Call:
    """The call.

    Raises:
        Refused: 404, there is no such path.
    """
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 2:
        group, rest = "", parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 3:
        group, rest = parts[1], parts[3:]
    else:
        raise Refused(404, "NotFound", "the server could not find the requested resource")
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 1:
        namespace = rest[1]
        rest = rest[2:] if len(rest) > 2 else rest  # a namespace itself is a resource in itself
    resource, name, subresource = (*rest, "", "", "")[:3]
    return Call(
        verb=_verb(method, name, query),
        group=group,
        resource=resource,
        subresource=subresource,
        namespace=namespace,
        name=name,
        dry_run=query.get("dryRun") == "All",
    )


def _verb(method: str, name: str, query: Mapping[str, str]) -> str:
    if method == "GET":
        watches = query.get("watch", "").lower() in ("1", "true")
        return "watch" if watches else ("get" if name else "list")
    if method == "DELETE":
        return "delete" if name else "deletecollection"
    try:
        return _VERBS[method]
    except KeyError:
        raise Refused(405, "MethodNotAllowed", "the server does not allow this method") from None


def kind_of(call: Call) -> Kind:
    """What kind of resource it is about.

    Raises:
        Refused: 404, this server has none of that name in that group.
    """
    kind = KINDS.get(call.resource)
    if kind is None or kind.group != call.group:
        raise Refused(404, "NotFound", "the server could not find the requested resource")
    return kind


def number(query: Mapping[str, str], name: str) -> int | None:
    """A query parameter that is a number.

    Raises:
        Refused: 400.
    """
    text = query.get(name)
    if text is None or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        raise bad_request(f"invalid {name}: {text!r}") from None
