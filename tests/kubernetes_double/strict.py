"""A strict check against the published schemas of Kubernetes 1.36: unknown fields and wrong types."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from tests.kubernetes_double.objects import Kind
from tests.kubernetes_double.refusals import Json

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
_PREFIX = "#/components/schemas/"


@functools.cache
def _schemas(group: str, version: str) -> Json:
    found: Json = json.loads((SCHEMAS / f"{group or 'core'}_{version}.json").read_text())["schemas"]
    return found


def unknown_fields(kind: Kind, given: Json) -> list[str]:
    """What is wrong with the object, in the server's words; nothing where it is valid."""
    schemas = _schemas(kind.group, kind.version)
    wanted = {"group": kind.group, "version": kind.version, "kind": kind.kind}
    [schema] = [
        schema for schema in schemas.values() if wanted in schema.get("x-kubernetes-group-version-kind", [])
    ]
    return list(_faults(schemas, schema, given, ""))


def _faults(schemas: Json, schema: Json, value: object, path: str) -> Iterator[str]:
    schema = _resolved(schemas, schema)
    if value is None:  # as good as not said
        return
    if "oneOf" in schema:
        kinds = tuple(kind for option in schema["oneOf"] for kind in _TYPES[option["type"]])
        if not isinstance(value, kinds) or isinstance(value, bool):
            yield f'invalid value in "{path}"'
        return
    kind = schema.get("type")
    if kind is not None and (
        not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
    ):
        yield f'"{path}" is no {kind}'
        return
    if isinstance(value, dict):
        yield from _faults_of_fields(schemas, schema, value, path)
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _faults(schemas, schema.get("items", {}), item, f"{path}[{number}]")


def _faults_of_fields(schemas: Json, schema: Json, value: Json, path: str) -> Iterator[str]:
    properties, others = schema.get("properties"), schema.get("additionalProperties")
    for name in schema.get("required", []):
        if name not in value:
            yield f'missing field "{path}.{name}"'.replace('".', '"')
    for name, item in value.items():
        where = f"{path}.{name}".lstrip(".")
        if properties is not None and name in properties:
            yield from _faults(schemas, properties[name], item, where)
        elif others is not None:
            yield from _faults(schemas, others if isinstance(others, dict) else {}, item, where)
        elif properties is not None:
            yield f'unknown field "{where}"'


def _resolved(schemas: Json, schema: Json) -> Json:
    while True:
        if "$ref" in schema:
            schema = schemas[schema["$ref"].removeprefix(_PREFIX)]
        elif len(schema.get("allOf", [])) == 1:
            schema = schema["allOf"][0]
        else:
            return schema
