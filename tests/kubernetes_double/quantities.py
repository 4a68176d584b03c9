"""Quantities of Kubernetes (`500m`, `2Gi`) as numbers, and what a pod asks for in all."""

from __future__ import annotations

import re
from collections import Counter

from tests.kubernetes_double.refusals import Json, bad_request

_FACTORS = {
    "": 1.0,
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)([A-Za-z]*)$")


def quantity(text: object) -> float:
    """The number that it stands for.

    Raises:
        Refused: 400, it is no quantity.
    """
    match = _QUANTITY.match(str(text))
    if match is None or match[2] not in _FACTORS:
        raise bad_request(f"quantities must match the regular expression {_QUANTITY.pattern!r}: {text}")
    return float(match[1]) * _FACTORS[match[2]]


def limit(pod: Json, resource: str) -> float | None:
    """The sum of its containers' limits; None where one of them has none."""
    found = [
        (container.get("resources") or {}).get("limits", {}).get(resource)
        for container in pod["spec"]["containers"]
    ]
    return None if None in found else sum(quantity(value) for value in found)


def asked(pod: Json) -> Counter[str]:
    """What it counts for in a ResourceQuota, by the quota's names."""
    counts: Counter[str] = Counter({"pods": 1, "count/pods": 1})
    for container in pod["spec"]["containers"]:
        resources = container.get("resources") or {}
        for side in ("requests", "limits"):
            for resource, value in (resources.get(side) or {}).items():
                counts[f"{side}.{resource}"] += quantity(value)  # type: ignore[assignment]
                if side == "requests":
                    counts[resource] += quantity(value)  # type: ignore[assignment]
    return counts
