"""A strict check of objects against what a Kubernetes 1.36 server with KubeRay 1.7's CRDs has published."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from jsonschema import Draft202012Validator

from tests.kuberay.kustomize import Json
from tests.kubernetes_double.objects import Kind
from tests.kubernetes_double.strict import unknown_fields

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"


def schema_faults(given: Json) -> list[str]:
    """All that the API server would refuse the object for before it looks at what it means."""
    group, version, kind = kind_of(given)
    unknown = unknown_fields(Kind(group, version, "", kind), given)
    return [*unknown, *_wrong_values(given)]


def kind_of(given: Json) -> tuple[str, str, str]:
    """Group ("" for the core), version and kind."""
    group, _, version = given["apiVersion"].rpartition("/")
    return group, version, given["kind"]


def _wrong_values(given: Json) -> Iterator[str]:
    """Values out of an enumeration, a pattern or a range, which is what `unknown_fields` does not look at."""
    for error in _validator(*kind_of(given)).iter_errors(given):
        yield f"{error.json_path}: {error.message[:200]}"


@functools.cache
def _validator(group: str, version: str, kind: str) -> Draft202012Validator:
    document = json.loads((SCHEMAS / f"{group or 'core'}_{version}.json").read_text())
    wanted = {"group": group, "version": version, "kind": kind}
    [name] = [
        name
        for name, schema in document["schemas"].items()
        if wanted in schema.get("x-kubernetes-group-version-kind", [])
    ]
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document})
