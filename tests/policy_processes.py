"""Submission hosts and policy servers as real processes, for the tests of several folders."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ECHO_AGENT = "class Agent:\n    def act(self, observation):\n        return observation\n"


@dataclass
class RunningServer:
    """A process that listens on loopback, and what it has printed until now."""

    process: subprocess.Popen[bytes]
    port: int
    printed: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_line(self, part: str) -> None:
        """Returns once a line with `part` in it was printed."""
        with self.changed:
            found = self.changed.wait_for(lambda: any(part in line for line in self.printed), 30)
        assert found, "\n".join(self.printed)


@contextmanager
def running(
    command: list[str],
    pass_fds: tuple[int, ...] = (),
    environment: dict[str, str] | None = None,
    python: Path = Path(sys.executable),
    below: Sequence[str] = (),
) -> Iterator[RunningServer]:
    """The process, once it has printed a line that ends in its port; killed and reaped afterwards.

    `below` is a command that runs what stands behind it.
    """
    process = subprocess.Popen(
        [*below, str(python), "-u", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=pass_fds,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    server = RunningServer(process, 0)
    listening = threading.Event()

    def read() -> None:
        for line in process.stdout:  # type: ignore[union-attr]
            text = line.decode("utf-8", "replace").rstrip("\n")
            with server.changed:
                server.printed.append(text)
                server.changed.notify_all()
            head, _, port = text.rpartition(":")
            if not listening.is_set() and head and port.isdigit():
                server.port = int(port)
                listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert listening.wait(60), "the process never said where it listens"
        assert server.port, "\n".join(server.printed)
        yield server
    finally:
        # Only under `make coverage`: what is killed takes along what was measured since its last save.
        getattr(sys.modules.get("sitecustomize"), "let_others_save", lambda: None)()
        process.kill()
        process.wait(30)
        reader.join(30)
        process.stdout.close()


def write_agent(directory: Path, source: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "agent.py").write_text(source)
    return directory


@contextmanager
def running_policy_server(directory: Path, *options: str) -> Iterator[RunningServer]:
    """The policy server of a directory with an `agent.py`, without a session key."""
    module = "orchestrator.submission.policy_server"
    command = ["-m", module, "--directory", str(directory), "--port", "0", *options]
    with running(command) as server:
        yield server


@contextmanager
def running_host(workdir: Path, session_key: bytes, *options: str) -> Iterator[RunningServer]:
    """A submission host that waits for its archive."""
    reader, writer = os.pipe()
    os.write(writer, session_key)
    os.close(writer)
    command = ["-m", "orchestrator.submission.host", "--directory", str(workdir), "--key-fd", str(reader)]
    try:
        with running([*command, *options], pass_fds=(reader,)) as server:
            yield server
    finally:
        os.close(reader)


def write_archive(path: Path, files: dict[str, str]) -> str:
    """A .tar.gz of these files; its sha256."""
    # Without the time of day: the same files give the same bytes.
    with gzip.GzipFile(path, "wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for name, text in files.items():
            content = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()
