"""What is kept of an episode's steps: the trace of its actions, and the messages for the validator."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
from pydantic_core import to_json

from orchestrator.adapters.benchmarks.spaces import action_record
from orchestrator.domain.episodes import EpisodeRun
from orchestrator.domain.errors import OrchestratorError
from orchestrator.domain.messages import EvalJobMessage
from orchestrator.ports import StepResult
from orchestrator.submission.wire import WireError, packb, unpackb

MAX_TRACE_BYTES = 64 * 2**20
TRACE_CHUNK_BYTES = 2**16
MAX_INFO_BYTES = 4096
MAX_INFO_TEXT_CHARS = 256
MAX_INFO_ARRAY_ITEMS = 64
SCALAR_DTYPE_KINDS = "biuf"


@dataclass(slots=True)
class ActionTrace:
    """Every action that was played, as msgpack values one after the other: hashed, and compressed on the way.

    The hash covers all bytes. Above `MAX_TRACE_BYTES` compressed, the bytes themselves are dropped.
    """

    _hash: Any = field(default_factory=hashlib.sha256)
    _compressor: Any = field(default_factory=zlib.compressobj)
    _chunks: list[bytes] = field(default_factory=list)
    _compressed_bytes: int = 0
    dropped: bool = False

    def add(self, action: Any) -> None:
        packed = packb(action)
        self._hash.update(packed)
        if not self.dropped:
            self._keep(self._compressor.compress(packed))

    def finish(self) -> tuple[bytes, str]:
        """The compressed bytes (b"" if they were dropped) and the hex SHA-256 of the uncompressed ones."""
        if not self.dropped:
            self._keep(self._compressor.flush())
        return b"".join(self._chunks), self._hash.hexdigest()

    def _keep(self, compressed: bytes) -> None:
        if compressed:
            self._chunks.append(compressed)
            self._compressed_bytes += len(compressed)
        if self._compressed_bytes > MAX_TRACE_BYTES:
            self._chunks.clear()
            self.dropped = True


class UnreadableTrace(OrchestratorError):
    """A stored trace that no `ActionTrace` wrote."""


def trace_sha256(trace: bytes) -> str:
    """The hex SHA-256 of a trace's uncompressed bytes: that of its episode, unless somebody changed one.

    Raises:
        UnreadableTrace: it is not whole, or no compressed data.
    """
    digest = hashlib.sha256()
    for chunk in _uncompressed(trace):
        digest.update(chunk)
    return digest.hexdigest()


def recorded_actions(trace: bytes) -> Iterator[Any]:
    """The actions of a trace in order, a little at a time: compressed, it may be a thousandth of its size.

    Raises:
        UnreadableTrace: it is not whole, or holds something else.
    """
    boundaries = msgpack.Unpacker()
    buffer, consumed = bytearray(), 0
    for chunk in _uncompressed(trace):
        boundaries.feed(chunk)
        buffer += chunk
        while (end := _next_boundary(boundaries)) is not None:
            try:
                yield unpackb(bytes(buffer[: end - consumed]), writable=True)
            except WireError as error:
                raise UnreadableTrace(f"an action cannot be decoded: {error}") from error
            del buffer[: end - consumed]
            consumed = end
    if buffer:
        raise UnreadableTrace("the last action is cut short")


def _next_boundary(unpacker: Any) -> int | None:
    """Where the next value that was fed ends; None where its end was not fed yet."""
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        return None
    except (ValueError, msgpack.UnpackException) as error:
        raise UnreadableTrace("an action cannot be decoded: it is not msgpack") from error
    return int(unpacker.tell())


def _uncompressed(trace: bytes) -> Iterator[bytes]:
    decompressor = zlib.decompressobj()
    left = trace
    try:
        while not decompressor.eof:
            chunk = decompressor.decompress(left, TRACE_CHUNK_BYTES)
            left = decompressor.unconsumed_tail
            if not chunk and not left and not decompressor.eof:
                raise UnreadableTrace("the compressed data is cut short")
            yield chunk
    except zlib.error as error:
        raise UnreadableTrace(f"the compressed data is damaged: {error}") from error


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One step as it happened. `truncated` counts our own limit besides the environment's."""

    index: int
    action: Any
    result: StepResult
    truncated: bool
    at: datetime


class StepEncoder:
    """Makes the JSON of `EpisodeStepDataMessage` for the steps of one episode run.

    What all its messages share is encoded once; building the model for every step costs several times more.
    """

    def __init__(self, job: EvalJobMessage, run: EpisodeRun, env_name: str) -> None:
        shared = {
            "message_type": "episode_step_data",
            "job_id": run.job_id,
            "env_name": env_name,
            "benchmark_name": job.benchmark_name,
            "submission_id": job.submission_id,
            "task_id": run.task_id,
            "episode_id": run.episode_id,
            "observation_refs": {},
        }
        self._opening = to_json(shared)[:-1] + b","

    def encode(self, step: LoggedStep) -> bytes:
        """The message, UTF-8; numbers that are not finite are null."""
        fields: dict[str, Any] = {
            "timestamp": step.at,
            "step": step.index,
            "action": action_record(step.action),
            "reward": step.result.reward,
            "done": step.result.terminated or step.truncated,
            "truncated": step.truncated,
        }
        info = loggable_info(step.result.info)
        if info:
            fields["info"] = info
        fields["step_timestamp"] = step.at
        return self._opening + to_json(fields, inf_nan_mode="null")[1:]


def loggable_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a step's info that goes into telemetry: named scalars, short texts and small arrays.

    Entries are taken in order while the JSON stays within `MAX_INFO_BYTES`.
    """
    kept: dict[str, Any] = {}
    budget = MAX_INFO_BYTES
    for name, value in info.items():
        if not isinstance(name, str):
            continue
        plain = _plain(value)
        if plain is None:
            continue
        safe_name = _printable(name)
        cost = len(to_json({safe_name: plain}, inf_nan_mode="null"))
        if cost <= budget:
            kept[safe_name] = plain
            budget -= cost
    return kept


def _plain(value: Any) -> Any:
    """`value` as plain Python numbers, text or lists of numbers; None where it is anything else."""
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, (np.ndarray, np.generic)):
        small = value.size <= MAX_INFO_ARRAY_ITEMS and value.dtype.kind in SCALAR_DTYPE_KINDS
        return value.tolist() if small else None
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)) and len(value) <= MAX_INFO_ARRAY_ITEMS:
        items = [item.item() if isinstance(item, np.generic) else item for item in value]
        return items if all(isinstance(item, (bool, int, float)) for item in items) else None
    return None


def _printable(text: str) -> str:
    # Lone surrogates are legal in a Python string and illegal in UTF-8.
    return text[:MAX_INFO_TEXT_CHARS].encode("utf-8", "replace").decode()
