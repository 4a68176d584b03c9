"""The API server: authentication, rights, admission, then the store; answers as the real one gives them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from uuid import uuid4

from aiohttp import web

from tests.kubernetes_double.admission import admit_pod, check_type, validate
from tests.kubernetes_double.node import Node
from tests.kubernetes_double.objects import Key, Kind, ObjectStore, selector, timestamp
from tests.kubernetes_double.refusals import Json, Refused, bad_request, conflict
from tests.kubernetes_double.requests import kind_of, number, read_call
from tests.kubernetes_double.rights import Accounts, Call
from tests.kubernetes_double.strict import unknown_fields
from tests.kubernetes_double.watches import Watch

MAX_BODY_BYTES = 3 * 2**20
PROPAGATIONS = ("Background", "Foreground", "Orphan")


class ApiServer:
    """Answers requests out of the store, and tells the node of new pods."""

    def __init__(self, store: ObjectStore, node: Node, accounts: Accounts, *, hardened: bool) -> None:
        self.calls: list[Call] = []
        self.gone_as_status = False  # a watch of long ago: HTTP 410 instead of an ERROR event
        self.on_call: Callable[[Call], None] = lambda call: None
        self._store = store
        self._node = node
        self._accounts = accounts
        self._hardened = hardened
        self.closing = asyncio.Event()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_route("*", "/{path:.*}", self._answer)
        return application

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._respond(request)
        except Refused as refused:
            headers = {}
            if refused.retry_after_seconds is not None:
                headers["Retry-After"] = str(refused.retry_after_seconds)
            return web.json_response(refused.status(), status=refused.code, headers=headers)

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        account = self._accounts.of(request.headers.get("Authorization", ""))
        if request.path in ("/livez", "/readyz", "/healthz"):
            return web.Response(text="ok")
        if request.path == "/version":
            return web.json_response({"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
        call = read_call(request.method, request.path, request.query)
        self.calls.append(call)
        self.on_call(call)
        account.check(call)
        if call.resource == "selfsubjectaccessreviews" and call.verb == "create":
            review = json.loads(await request.read())
            return web.json_response(self._review(review, request.headers["Authorization"]), status=201)
        kind = kind_of(call)
        if call.verb == "watch":
            watch = Watch(self._store, kind, call, request.query, self._node.timing.bookmark_seconds)
            return await watch.serve(request, self.closing, gone_as_status=self.gone_as_status)
        if call.subresource:
            return self._log(call, request.query)
        return await self._do(kind, call, request)

    async def _do(self, kind: Kind, call: Call, request: web.Request) -> web.Response:
        if call.verb == "list":
            return web.json_response(self._list(kind, call, request.query))
        if call.verb == "get":
            return web.json_response(self._store.get(_key(call)))
        if call.verb == "create":
            return web.json_response(self._create(kind, call, await request.read()), status=201)
        if call.verb == "delete":
            return web.json_response(self._delete(kind, call, await request.read(), request.query))
        raise Refused(405, "MethodNotAllowed", f"the double has no {call.verb}: nothing of ours may need it")

    # ------------------------------------------------------------------------------------------ verbs

    def _list(self, kind: Kind, call: Call, query: Mapping[str, str]) -> Json:
        wanted = selector(kind.plural, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        found = self._store.select(kind.plural, call.namespace, wanted)
        # Items of a list do not say what they are; the list does.
        items = [
            {field: value for field, value in stored.items() if field not in ("kind", "apiVersion")}
            for _, stored in found
        ]
        metadata: Json = {"resourceVersion": str(self._store.version)}
        start, most = number(query, "continue") or 0, number(query, "limit")
        if most and len(items) > start + most:
            metadata |= {"continue": str(start + most), "remainingItemCount": len(items) - start - most}
        items = items[start : start + most] if most else items[start:]
        return {
            "kind": f"{kind.kind}List",
            "apiVersion": kind.api_version,
            "metadata": metadata,
            "items": items,
        }

    def _create(self, kind: Kind, call: Call, body: bytes) -> Json:
        given = check_type(kind.plural, _json(body))
        if unknown := unknown_fields(kind, given):
            raise bad_request(f"strict decoding error: {', '.join(unknown)}")
        if kind.namespaced:
            self._store.get(Key("namespaces", "", call.namespace))
        validate(kind.plural, given)
        asked_for = given["metadata"].get("namespace")
        if asked_for not in (None, call.namespace):
            raise bad_request("the namespace of the provided object does not match the namespace sent")
        if kind.plural == "pods":
            admit_pod(self._store, call.namespace, given, hardened=self._hardened)
            given["spec"].setdefault("terminationGracePeriodSeconds", 30)
            given["status"] = {"phase": "Pending", "qosClass": "Guaranteed"}
        created = self._store.add(kind, call.namespace, given, dry_run=call.dry_run)
        if not call.dry_run:
            if kind.plural == "pods":
                self._node.adopt(created)
            elif created["metadata"].get("ownerReferences"):
                self._node.collect_garbage()
        return created

    def _delete(self, kind: Kind, call: Call, body: bytes, query: Mapping[str, str]) -> Json:
        options = _json(body) if body else {}
        key = _key(call)
        stored = self._store.get(key)
        uid = stored["metadata"]["uid"]
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted not in (None, uid):
            raise conflict(f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}")
        propagation = query.get("propagationPolicy") or options.get("propagationPolicy") or "Background"
        if propagation not in PROPAGATIONS:
            raise Refused(422, "Invalid", f"propagationPolicy: Unsupported value: {propagation!r}")
        if call.dry_run or options.get("dryRun"):
            return stored
        if kind.plural == "pods":
            grace = number(query, "gracePeriodSeconds")
            if grace is None:
                grace = options.get("gracePeriodSeconds")
            return self._node.delete_pod(key, uid, grace)
        deleted = self._node.delete(key, uid, propagation)
        if "deletionTimestamp" in deleted["metadata"]:
            return deleted
        details = {"name": key.name, "kind": kind.plural, "uid": uid}
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Success",
            "details": details,
        }

    def _log(self, call: Call, query: Mapping[str, str]) -> web.Response:
        if (call.resource, call.subresource, call.verb) != ("pods", "log", "get"):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        pod = self._store.get(Key("pods", call.namespace, call.name))
        container = pod["spec"]["containers"][0]["name"]
        if query.get("container", container) != container:
            raise bad_request(f"container {query['container']} is not valid for pod {call.name}")
        statuses = (pod.get("status") or {}).get("containerStatuses") or [{"state": {"waiting": {}}}]
        if (waiting := statuses[0]["state"].get("waiting")) is not None:
            why = waiting.get("reason", "ContainerCreating")
            raise bad_request(f'container "{container}" in pod "{call.name}" is waiting to start: {why}')
        run = self._node.runs.get(pod["metadata"]["uid"])
        log = b"" if run is None else run.log
        return web.Response(
            body=cut_log(log, number(query, "tailLines"), number(query, "limitBytes")),
            content_type="text/plain",
        )

    def _review(self, review: Json, authorization: str) -> Json:
        asked = review["spec"].get("resourceAttributes") or {}
        call = Call(
            verb=asked.get("verb", ""),
            group=asked.get("group", ""),
            resource=asked.get("resource", ""),
            subresource=asked.get("subresource", ""),
            namespace=asked.get("namespace", ""),
            name=asked.get("name", ""),
        )
        allowed = self._accounts.of(authorization).may(call)
        return replace_status(review, allowed)


def replace_status(review: Json, allowed: bool) -> Json:
    reason = 'RBAC: allowed by RoleBinding "control/orchestrator"' if allowed else ""
    metadata = {"creationTimestamp": None, "uid": str(uuid4()), "managedFields": [{"time": timestamp()}]}
    return {**review, "metadata": metadata, "status": {"allowed": allowed, "reason": reason}}


def cut_log(log: bytes, tail_lines: int | None, limit_bytes: int | None) -> bytes:
    """As the kubelet cuts it: of the last lines the *first* bytes, which is seldom what is wanted."""
    if tail_lines is not None:
        lines = log.splitlines(keepends=True)
        log = b"".join(lines[-tail_lines:] if tail_lines else [])
    return log if limit_bytes is None else log[:limit_bytes]


def _key(call: Call) -> Key:
    return Key(call.resource, "" if call.resource == "namespaces" else call.namespace, call.name)


def _json(body: bytes) -> Json:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise bad_request(f"couldn't get version/kind; json parse error: {error}") from None
    if not isinstance(found, dict):
        raise bad_request("the object provided is unrecognized")
    return found
