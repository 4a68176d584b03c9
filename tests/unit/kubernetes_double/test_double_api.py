"""The double keeps the promises of a real API server, which the adapter is tested against."""

from __future__ import annotations

import asyncio

import pytest

from tests.kubernetes_double import Account, ApiDouble
from tests.kubernetes_double.refusals import Json
from tests.kubernetes_double.server import cut_log
from tests.unit.kubernetes_double.double_client import Client, a_config_map, a_pod


async def test_a_name_is_taken_until_its_object_is_gone(client: Client) -> None:
    first = await client.create(a_config_map("one"))
    second = await client.create(a_config_map("one"))

    assert (first.status, second.status) == (201, 409)
    assert second.json["reason"] == "AlreadyExists"
    assert second.json["message"] == 'configmaps "one" already exists'


async def test_items_of_a_list_do_not_say_what_they_are(client: Client) -> None:
    await client.create(a_config_map("one"))

    answer = (await client.call("GET", "configmaps")).json

    assert answer["kind"] == "ConfigMapList"
    assert "kind" not in answer["items"][0]
    assert int(answer["metadata"]["resourceVersion"]) > 0


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ({"labelSelector": "color=red"}, ["a"]),
        ({"labelSelector": "color!=red"}, ["b", "c"]),
        ({"labelSelector": "color in (red, blue),size"}, ["b"]),
        ({"labelSelector": "!color"}, ["c"]),
        ({"labelSelector": "color notin (red)"}, ["b", "c"]),
        ({"fieldSelector": "metadata.name=b"}, ["b"]),
        ({"fieldSelector": "metadata.name!=b"}, ["a", "c"]),
    ],
)
async def test_selectors_choose_as_the_servers_do(client: Client, query: Json, names: list[str]) -> None:
    for name, labels in (("a", {"color": "red"}), ("b", {"color": "blue", "size": "9"}), ("c", {})):
        created = a_config_map(name)
        created["metadata"]["labels"] = labels
        await client.create(created)

    found = (await client.call("GET", "configmaps", None, **query)).json["items"]

    assert [item["metadata"]["name"] for item in found] == names


async def test_a_field_that_the_server_does_not_select_by_is_refused(client: Client) -> None:
    answer = await client.call("GET", "pods", fieldSelector="spec.color=red")

    assert (answer.status, answer.json["message"]) == (400, "field label not supported: spec.color")


async def test_a_long_list_comes_in_pages(client: Client) -> None:
    for name in "abc":
        await client.create(a_config_map(name))

    first = (await client.call("GET", "configmaps", limit="2")).json
    rest = (
        await client.call("GET", "configmaps", limit="2", **{"continue": first["metadata"]["continue"]})
    ).json

    assert [len(page["items"]) for page in (first, rest)] == [2, 1]
    assert "continue" not in rest["metadata"]


async def test_a_dry_run_is_checked_as_the_real_one_and_leaves_nothing(client: Client) -> None:
    weak = a_pod("two")
    weak["spec"]["securityContext"].pop("runAsNonRoot")

    answers = [await client.create(pod, dryRun="All") for pod in (a_pod("one"), weak)]

    assert [answer.status for answer in answers] == [201, 403]
    assert client.double.names("pods") == []
    assert [call.dry_run for call in client.double.calls] == [True, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pod: pod["spec"].update(hostNetwork=True), 'violates PodSecurity "restricted:latest"'),
        (lambda pod: pod["spec"].update(automountServiceAccountToken=True), "token automount"),
        (lambda pod: pod["spec"].update(serviceAccountName="admin"), 'serviceaccount "admin" not found'),
        (lambda pod: pod["spec"].update(runtimeClassName="gvisor"), 'RuntimeClass "gvisor" not found'),
        (lambda pod: pod["spec"].update(priorityClassName="high"), "no PriorityClass with name high"),
        (lambda pod: pod["spec"]["containers"][0]["resources"].clear(), "no limits"),
    ],
)
async def test_a_pod_that_may_not_be_is_refused_with_the_reason(client: Client, change, words: str) -> None:
    pod = a_pod("one")
    change(pod)

    answer = await client.create(pod)

    assert (answer.status, answer.json["reason"]) == (403, "Forbidden")
    assert words in answer.json["message"]


async def test_a_field_that_does_not_exist_and_a_wrong_type_are_refused(client: Client) -> None:
    unknown, wrong = a_pod("one"), a_pod("two")
    unknown["spec"]["containers"][0]["cpu"] = 1
    wrong["spec"]["activeDeadlineSeconds"] = "60"

    answers = [await client.create(pod) for pod in (unknown, wrong)]

    assert [answer.status for answer in answers] == [400, 400]
    assert 'unknown field "spec.containers[0].cpu"' in answers[0].json["message"]
    assert "activeDeadlineSeconds" in answers[1].json["message"]


async def test_a_quota_refuses_with_its_name_what_is_too_much(double: ApiDouble, client: Client) -> None:
    double.set_quota("submissions", {"pods": "1", "limits.memory": "1Gi"})
    await client.create(a_pod("one"))

    refused = await client.create(a_pod("two"))

    assert refused.status == 403
    assert (
        "exceeded quota: submissions, requested: pods=1, used: pods=1, limited: pods=1"
        in (refused.json["message"])
    )


async def test_an_expired_token_is_refused_and_a_new_one_taken(double: ApiDouble, client: Client) -> None:
    old = double.token
    double.expire_token("second-token")

    refused = await client.call("GET", "pods", token=old)
    taken = await client.call("GET", "pods")

    assert (refused.status, refused.json["reason"]) == (401, "Unauthorized")
    assert taken.status == 200


async def test_a_role_lets_through_what_it_names_and_nothing_else(double: ApiDouble, client: Client) -> None:
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    double.accounts.tokens["weak"] = Account("system:serviceaccount:x:weak", {double.namespace: rules})

    allowed = await client.call("GET", "pods", token="weak")
    watching = await client.call("GET", "pods", token="weak", watch="1")
    elsewhere = await client.call("GET", "/api/v1/namespaces/default/pods", token="weak")
    log = await client.call("GET", "pods/none/log", token="weak")

    assert [each.status for each in (allowed, watching, elsewhere, log)] == [200, 403, 403, 404]
    assert 'cannot watch resource "pods" in API group ""' in watching.json["message"]


@pytest.mark.parametrize(
    ("resource", "subresource", "allowed"),
    [("pods", "log", True), ("pods", "exec", False), ("pods", "", False)],
)
async def test_an_access_review_tells_what_the_account_may_do(
    double: ApiDouble, client: Client, resource: str, subresource: str, allowed: bool
) -> None:
    rules = [{"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]}]
    double.accounts.tokens["weak"] = Account("weak", {double.namespace: rules})
    asked = {"namespace": double.namespace, "verb": "get", "resource": resource, "subresource": subresource}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }

    answer = await client.call(
        "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review, token="weak"
    )

    assert answer.json["status"]["allowed"] is allowed


async def test_namespaces_and_their_policies_can_be_read(double: ApiDouble, client: Client) -> None:
    namespace = await client.call("GET", f"/api/v1/namespaces/{double.namespace}")
    policies = await client.call(
        "GET", f"/apis/networking.k8s.io/v1/namespaces/{double.namespace}/networkpolicies"
    )

    assert namespace.json["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert [each["metadata"]["name"] for each in policies.json["items"]] == ["default-deny"]


async def test_a_watch_shows_every_change_since_its_version_to_who_selected_it(client: Client) -> None:
    version = (await client.call("GET", "configmaps")).json["metadata"]["resourceVersion"]
    red, blue = a_config_map("red"), a_config_map("blue")
    red["metadata"]["labels"] = {"color": "red"}
    await client.create(red)
    await client.create(blue)
    await client.call("DELETE", "configmaps/red")

    events = [
        (event["type"], event["object"]["metadata"]["name"], event["object"]["kind"])
        async for event in client.watch(
            "configmaps", resourceVersion=version, labelSelector="color=red", timeoutSeconds="1"
        )
    ]

    assert events == [("ADDED", "red", "ConfigMap"), ("DELETED", "red", "ConfigMap")]


async def test_a_watch_without_a_version_begins_with_what_is_there(client: Client) -> None:
    await client.create(a_config_map("one"))

    events = [event async for event in client.watch("configmaps", timeoutSeconds="1")]

    assert [(event["type"], event["object"]["metadata"]["name"]) for event in events] == [("ADDED", "one")]


async def test_bookmarks_come_to_who_wants_them_and_carry_only_a_version(client: Client) -> None:
    version = (await client.call("GET", "pods")).json["metadata"]["resourceVersion"]

    events = [
        event
        async for event in client.watch(
            "pods", resourceVersion=version, allowWatchBookmarks="true", timeoutSeconds="1"
        )
    ]

    assert {event["type"] for event in events} == {"BOOKMARK"}
    assert events[-1]["object"]["metadata"]["resourceVersion"] == version
    assert "name" not in events[-1]["object"]["metadata"]


@pytest.mark.parametrize("as_status", [False, True])
async def test_a_version_that_is_forgotten_is_answered_with_410(
    double: ApiDouble, client: Client, as_status: bool
) -> None:
    version = (await client.call("GET", "configmaps")).json["metadata"]["resourceVersion"]
    await client.create(a_config_map("one"))
    double.store.compact()
    double.server.gone_as_status = as_status

    [event] = [event async for event in client.watch("configmaps", resourceVersion=version)]

    assert event["type"] == ("STATUS" if as_status else "ERROR")
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")


async def test_a_version_of_the_future_is_met_with_silence(client: Client) -> None:
    events = client.watch("configmaps", resourceVersion="99999999", timeoutSeconds="1")
    seen = asyncio.ensure_future(anext(events, None))
    await client.create(a_config_map("one"))

    assert await seen is None


async def test_deleting_under_the_wrong_uid_is_a_conflict(client: Client) -> None:
    await client.create(a_config_map("one"))

    answer = await client.call("DELETE", "configmaps/one", {"preconditions": {"uid": "another"}})

    assert (answer.status, answer.json["reason"]) == (409, "Conflict")
    assert client.double.names("configmaps") == ["one"]


@pytest.mark.parametrize(
    ("tail_lines", "limit_bytes", "expected"),
    [(None, None, b"one\ntwo\nthree\n"), (2, None, b"two\nthree\n"), (2, 5, b"two\nt"), (0, None, b"")],
)
def test_a_log_is_cut_to_the_first_bytes_of_its_last_lines(
    tail_lines: int | None, limit_bytes: int | None, expected: bytes
) -> None:
    assert cut_log(b"one\ntwo\nthree\n", tail_lines, limit_bytes) == expected
