"""A Kubernetes API server with one node, for tests: it keeps what a real one promises, and its oddities.

Pods run as processes of this machine, each on a loopback address of its own; what they do is real, and so is
how they end. Not shown by it: another user, a read-only root, the kernel's isolation, and who may connect.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Self

from aiohttp import web

from tests.archive_server import Certificate
from tests.kubernetes_double.node import Node
from tests.kubernetes_double.objects import KINDS, Key, ObjectStore
from tests.kubernetes_double.plans import Plan, Timing, real_timing
from tests.kubernetes_double.pods import Stop, disruption
from tests.kubernetes_double.refusals import Json
from tests.kubernetes_double.rights import Account, Accounts, Call
from tests.kubernetes_double.server import ApiServer

__all__ = ["Account", "ApiDouble", "Call", "Plan", "PodControl", "Timing", "double_in_thread", "real_timing"]

NAMESPACE = "orchestrator-submissions"
SERVICE_ACCOUNT = "submission"
ADMIN_TOKEN = "admin-token"


class ApiDouble:
    """The server at `url`, from `async with` on; nothing is left of it or its pods afterwards."""

    def __init__(
        self,
        *,
        namespace: str = NAMESPACE,
        timing: Timing | None = None,
        hardened: bool = True,
        rights: Mapping[str, Sequence[Json]] | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        """`rights`: what the account of the kubeconfigs may do, rules by namespace; None: everything.

        With a certificate it speaks TLS, as every real one.
        """
        self.namespace = namespace
        self.token = ADMIN_TOKEN
        self.accounts = Accounts(
            {ADMIN_TOKEN: Account("system:serviceaccount:orchestrator:orchestrator", rights)}
        )
        self.store = ObjectStore()
        self._timing = timing or Timing()
        self._hardened = hardened
        self._certificate = certificate
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kubernetes-double-"))
            self.node = Node(self.store, Path(directory), self._timing)
            self.server = ApiServer(self.store, self.node, self.accounts, hardened=self._hardened)
            self._furnish()
            runner = web.AppRunner(self.server.application(), access_log=None, shutdown_timeout=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            stack.push_async_callback(self.node.close)
            stack.callback(self.server.closing.set)
            secure = None if self._certificate is None else self._certificate.context()
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=secure).start()
            scheme = "http" if secure is None else "https"
            self.url = f"{scheme}://127.0.0.1:{runner.addresses[0][1]}"
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def _furnish(self) -> None:
        """What the operator's manifests put there."""
        labels = {
            "kubernetes.io/metadata.name": self.namespace,
            "pod-security.kubernetes.io/enforce": "restricted",
            "pod-security.kubernetes.io/enforce-version": "latest",
        }
        self.add("namespaces", "", {"metadata": {"name": self.namespace, "labels": labels}})
        for account in ("default", SERVICE_ACCOUNT):
            self.add("serviceaccounts", self.namespace, {"metadata": {"name": account}})
        deny = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        self.add("networkpolicies", self.namespace, {"metadata": {"name": "default-deny"}, "spec": deny})

    # ---------------------------------------------------------------------------------- what there is

    @property
    def calls(self) -> list[Call]:
        """Every call so far, in order."""
        return self.server.calls

    def add(self, plural: str, namespace: str, stored: Json) -> Json:
        """Put an object there, past every check."""
        return self.store.add(KINDS[plural], namespace, stored)

    def set_quota(self, name: str, hard: Json) -> None:
        self.add("resourcequotas", self.namespace, {"metadata": {"name": name}, "spec": {"hard": hard}})

    def remove(self, plural: str, name: str) -> None:
        """Take an object away at once."""
        self.store.remove(Key(plural, self.namespace if KINDS[plural].namespaced else "", name))

    def names(self, plural: str) -> list[str]:
        return [key.name for key, _ in self.store.select(plural, self.namespace)]

    def pod(self, name: str) -> PodControl:
        """What can be done to this pod.

        Raises:
            Refused: there is none.
        """
        return PodControl(self, self.store.get(Key("pods", self.namespace, name)))

    def pods(self) -> list[PodControl]:
        return [PodControl(self, pod) for _, pod in self.store.select("pods", self.namespace)]

    def next_pod(self, *plans: Plan) -> None:
        """The pods that are created next fare so, one plan each."""
        self.node.plans.extend(plans)

    # -------------------------------------------------------------------------------------- its clients

    def kubeconfig(self, url: str | None = None, token_file: Path | None = None) -> Json:
        """A kubeconfig that leads here, or to a proxy in front of it."""
        user = {"token": self.token} if token_file is None else {"tokenFile": str(token_file)}
        cluster = {"server": url or self.url}
        if self._certificate is not None:
            authority = base64.b64encode(self._certificate.file.read_bytes()).decode()
            cluster["certificate-authority-data"] = authority
        context = {"cluster": "double", "user": "tests", "namespace": self.namespace}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "double",
            "clusters": [{"name": "double", "cluster": cluster}],
            "users": [{"name": "tests", "user": user}],
            "contexts": [{"name": "double", "context": context}],
        }

    def write_kubeconfig(self, path: Path, url: str | None = None, token_file: Path | None = None) -> Path:
        path.write_text(json.dumps(self.kubeconfig(url, token_file)))  # JSON is YAML
        path.chmod(0o600)
        return path

    def expire_token(self, successor: str) -> None:
        """The token of the kubeconfigs so far is refused from now on; this one is good."""
        account = self.accounts.tokens.pop(self.token)
        self.accounts.tokens[successor] = account
        self.token = successor


class PodControl:
    """What others than its owner do to a pod."""

    def __init__(self, double: ApiDouble, pod: Json) -> None:
        self._double = double
        self.name: str = pod["metadata"]["name"]
        self.uid: str = pod["metadata"]["uid"]
        self.key = Key("pods", pod["metadata"]["namespace"], self.name)

    @property
    def object(self) -> Json:
        return self._double.store.get(self.key)

    @property
    def pid(self) -> int | None:
        process = self._double.node.runs[self.uid].process
        return None if process is None else process.pid

    def _stop(self, grace_seconds: float, reason: str, message: str) -> None:
        self._double.node.runs[self.uid].stop(Stop(grace_seconds, reason, message))

    def evict_for_its_storage(self) -> None:
        """By the kubelet, for what it wrote itself."""
        self._stop(
            0, "Evicted", "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "
        )

    def evict_by_kubelet(self) -> None:
        """Because the node is short of something."""
        message = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. "
        self._disturb("TerminationByKubelet", message)
        self._stop(0, "Evicted", message)

    def evict_by_api(self) -> None:
        """As `kubectl drain` does."""
        self._double.node.disrupt(self.key, self.uid, "EvictionByEvictionAPI", "Eviction API: evicting")

    def preempt(self) -> None:
        """By the scheduler, for a pod of a higher priority."""
        self._double.node.disrupt(
            self.key, self.uid, "PreemptionByScheduler", "default-scheduler: preempting to accommodate a pod"
        )

    def delete_by_taint_manager(self) -> None:
        self._double.node.disrupt(
            self.key, self.uid, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint"
        )

    def delete_by_another(self) -> None:
        """By somebody with the right to, who gives no reason."""
        self._double.node.delete_pod(self.key, self.uid, None)

    def exceed_deadline(self) -> None:
        self._stop(5, "DeadlineExceeded", "Pod was active on the node longer than the specified deadline")

    def kill_for_memory(self) -> None:
        self._double.node.runs[self.uid].kill_for_memory()

    def kill_node(self) -> None:
        self._double.node.runs[self.uid].kill_node()

    def add_condition_afterwards(self) -> None:
        """What can still be added to a pod that has ended."""
        self._disturb("DeletionByPodGC", "PodGC: node no longer exists")

    def _disturb(self, reason: str, message: str) -> None:
        self._double.store.change(self.key, lambda pod: disruption(pod, reason, message), self.uid)

    async def reaches(self, phase: str, timeout_seconds: float = 20) -> Json:
        """The pod once it is in this phase."""
        async with asyncio.timeout(timeout_seconds):
            while (pod := self.object)["status"]["phase"] != phase:
                await self._double.store.next_change.wait()
        return pod


@contextlib.contextmanager
def double_in_thread(**options: object) -> Iterator[ApiDouble]:
    """A double on a loop of its own: for tests that block theirs, and for other processes."""
    opened: Future[ApiDouble] = Future()
    close: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        finished = asyncio.Event()
        close.append((asyncio.get_running_loop(), finished))
        async with ApiDouble(**options) as double:  # type: ignore[arg-type]
            opened.set_result(double)
            await finished.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    thread = Thread(target=run, name="kubernetes-double")
    thread.start()
    try:
        yield opened.result(timeout=30)
    finally:
        loop, finished = close[0]
        loop.call_soon_threadsafe(finished.set)
        thread.join()


@contextlib.asynccontextmanager
async def emptied(double: ApiDouble) -> AsyncIterator[None]:
    """Assert that the block leaves neither pods nor ConfigMaps, given a moment."""
    yield
    async with asyncio.timeout(30):
        while double.names("pods") or double.names("configmaps"):
            await double.store.next_change.wait()
