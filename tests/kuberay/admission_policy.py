"""The ValidatingAdmissionPolicy of built manifests, evaluated as an API server does it, in CEL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cel

from tests.kuberay.kustomize import Json


def refusals(objects: list[Json], pod: Json, operation: str = "CREATE") -> list[str]:
    """The messages with which a pod is refused. An expression that cannot be evaluated refuses, too."""
    [policy] = [each["spec"] for each in objects if each["kind"] == "ValidatingAdmissionPolicy"]
    variables: dict[str, Any] = {}
    context = {"object": pod, "request": {"operation": operation}, "variables": variables}
    for variable in policy["variables"]:
        variables[variable["name"]] = cel.evaluate(variable["expression"], context)
    return list(_refusals(policy["validations"], context))


def _refusals(validations: list[Json], context: dict[str, Any]) -> Iterator[str]:
    for rule in validations:
        try:
            admitted = cel.evaluate(rule["expression"], context)
        except Exception as error:  # of whatever class the library finds fitting
            yield f"cannot be evaluated: {rule['expression']}: {error}"
            continue
        if admitted is not True:
            yield rule["message"]
