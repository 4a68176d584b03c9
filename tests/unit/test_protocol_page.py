"""docs/protocol.md says what the code does: its bytes, its limits, its deadlines."""

from __future__ import annotations

import hmac
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.domain.episodes import FaultClass
from orchestrator.settings import Settings
from orchestrator.submission import hosting, sealing
from orchestrator.submission.handshake import MAGIC, MAX_MESSAGE_BYTES, HostState
from orchestrator.submission.transport import MAX_FRAGMENTS, MAX_HTTP_HEAD_BYTES, TEXT_CAP_BYTES
from orchestrator.submission.wire import _DTYPES, MAX_DIMENSION, MAX_DIMENSIONS, WireLimits, packb, unpackb

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
EXAMPLES = re.findall(r"<!-- (bytes|request) -->\n```python\n(.+?)\n```\n```hex\n(.+?)```", PAGE, re.DOTALL)


def from_hex(text: str) -> bytes:
    return bytes.fromhex(" ".join(line.partition(";")[0] for line in text.splitlines()))


def plain(value: Any) -> Any:
    """With lists in the place of arrays, so that it can be compared."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tolist()
    return value


@pytest.mark.parametrize(("kind", "expression", "dump"), EXAMPLES, ids=[each[1] for each in EXAMPLES])
def test_the_bytes_of_the_page_are_those_of_the_codec(kind: str, expression: str, dump: str) -> None:
    value, message = eval(expression, {"np": np}), from_hex(dump)
    if kind == "request":
        length, message = message[:4], message[4:]
        assert int.from_bytes(length, "big") == len(message)

    assert packb(value) == message
    assert plain(unpackb(message)) == plain(value)


def test_the_proof_of_a_closed_network_is_that_of_the_code() -> None:
    dials = f"{sealing.DIALS} times, {sealing.DIAL_PAUSE_SECONDS * 1000:g} ms apart"

    for words in (
        dials,
        f"not answered within {sealing.DIAL_SECONDS:g} s",
        f"after {sealing.SAID_AFTER_SECONDS:g} s `where`",
        f"{hosting.SEAL_SECONDS:g} s without a proof",
    ):
        assert words in PAGE


def test_the_page_has_its_examples() -> None:
    assert len(EXAMPLES) == 11


def test_the_limits_of_the_page_are_those_of_the_code() -> None:
    limits = WireLimits()

    for words in (
        f"| size | {limits.frame_bytes >> 20} MiB |",
        f"| nesting of lists and maps | {limits.depth} |",
        f"all together | {limits.items} |",
        f"| arrays | {limits.arrays} |",
        f"| dimensions of an array | {MAX_DIMENSIONS}, each at most 2^{MAX_DIMENSION.bit_length() - 1} |",
        f"at most {MAX_FRAGMENTS} of them",
        f"at most {MAX_HTTP_HEAD_BYTES >> 10} KiB",
        f"up to {TEXT_CAP_BYTES >> 10} KiB of such a text",
        f"at most {MAX_MESSAGE_BYTES >> 10} KiB: a map of plain values",
        f"`{MAGIC.hex(' ')}`",
    ):
        assert words in PAGE


def test_the_deadlines_of_the_page_are_the_defaults() -> None:
    rows = re.findall(r"\| (\d+) \(`(\w+)`\) \|", PAGE)

    assert len(rows) == 5
    assert all(getattr(Settings(), name) == float(seconds) for seconds, name in rows)
    assert f"in {Settings().max_containers_per_job} episodes of a job (`max_containers_per_job`)" in PAGE


def test_every_dtype_fault_and_state_is_on_the_page() -> None:
    kinds = {name.lstrip("<>|") for name in _DTYPES}

    assert all(re.search(rf"`\|?{kind}`", PAGE) for kind in kinds)
    assert all(f"`{fault.value}`" in PAGE for fault in FaultClass)
    assert all(f"`{state.value}`" in PAGE for state in HostState)


def test_the_proofs_of_the_page_are_right() -> None:
    key, client, server = bytes(range(32)), b"\xaa" * 32, b"\xbb" * 32

    assert f"server: {hmac.digest(key, b'server' + client + server, 'sha256').hex()}" in PAGE
    assert f"client: {hmac.digest(key, b'client' + server + client, 'sha256').hex()}" in PAGE
