"""What `kubectl kustomize` makes of a directory, for the features that kuberay/ uses and no others."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "resources", "components", "configMapGenerator"}
_KNOWN |= {"configurations", "patches", "images"}
# Where kustomize itself knows that a ConfigMap is named.
_BUILT_IN = {"Job": ["spec/template/spec/containers/envFrom/configMapRef/name"]}
_HASH_LETTERS = str.maketrans("013ae", "ghkmt")


def build(directory: Path) -> list[Json]:
    """All objects, with the names that generated ConfigMaps get at the end.

    Raises:
        ValueError: it uses what is not known here.
    """
    objects, references = _layer(directory, [])
    return _with_hashed_names(objects, references)


def _layer(directory: Path, given: list[Json]) -> tuple[list[Json], list[Json]]:
    """The objects of a kustomization on top of those given, and where ConfigMaps are named in them."""
    plan = yaml.safe_load((directory / "kustomization.yaml").read_text())
    if unknown := set(plan) - _KNOWN:
        raise ValueError(f"{directory}: {unknown}")
    objects, references = list(given), []
    for path in plan.get("resources", []):
        if (directory / path).is_dir():
            below, named = _layer(directory / path, [])
            objects, references = objects + below, references + named
        else:
            objects += documents(directory / path)
    for generator in plan.get("configMapGenerator", []):
        _generate(directory, generator, objects)
    # kustomize lets components work on what the layer's resources are, before its own patches.
    for path in plan.get("components", []):
        objects, named = _layer(directory / path, objects)
        references += named
    for path in plan.get("configurations", []):
        [reference] = yaml.safe_load((directory / path).read_text())["nameReference"]
        references += reference["fieldSpecs"]
    for patch in plan.get("patches", []):
        _patch(directory, patch, objects)
    for image in plan.get("images", []):
        for each in objects:
            _name_image(each, image)
    return objects, references


def documents(path: Path) -> list[Json]:
    """The objects of one file."""
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def _generate(directory: Path, generator: Json, objects: list[Json]) -> None:
    lines = list(generator.get("literals", []))
    for path in generator.get("envs", []):
        read = (directory / path).read_text().splitlines()
        lines += [line for line in read if line.strip() and not line.startswith("#")]
    data = dict(line.split("=", 1) for line in lines)
    if generator.get("behavior") == "merge":
        [merged] = [each for each in objects if _is(each, "ConfigMap", generator)]
        merged["data"] |= data
        return
    metadata = {"name": generator["name"], "namespace": generator["namespace"]}
    objects.append(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data, "generated": True}
    )


def _is(each: Json, kind: str, named: Json) -> bool:
    metadata = each["metadata"]
    return (
        each["kind"] == kind
        and metadata["name"] == named["name"]
        and ("namespace" not in named or metadata.get("namespace") == named["namespace"])
    )


def _patch(directory: Path, patch: Json, objects: list[Json]) -> None:
    content = documents(directory / patch["path"])
    if "target" in patch:
        [target] = [each for each in objects if _is(each, patch["target"]["kind"], patch["target"])]
        [steps] = content
        for step in steps:
            _apply(step, target)
        return
    for change in content:
        [target] = [each for each in objects if _is(each, change["kind"], change["metadata"])]
        _merge(target, change)


def _apply(step: Json, target: Json) -> None:
    *parents, last = step["path"].strip("/").split("/")
    place: Any = target
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if isinstance(place, list):
        if step["op"] == "add":
            place.insert(len(place) if last == "-" else int(last), step["value"])
        else:
            place[int(last)] = step["value"]
    elif step["op"] == "add" or (step["op"] == "replace" and last in place):
        place[last] = step["value"]
    else:
        raise ValueError(f"{step['op']} {step['path']}")


def _merge(target: Json, change: Json) -> None:
    """Strategic merge of objects whose lists have no merge key, such as those of a NetworkPolicy."""
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        else:
            target[name] = value


def _name_image(part: Any, image: Json) -> None:
    if isinstance(part, list):
        for each in part:
            _name_image(each, image)
    if not isinstance(part, dict):
        return
    for container in [*(part.get("containers") or []), *(part.get("initContainers") or [])]:
        if isinstance(container, dict) and container.get("image") == image["name"]:
            version = f"@{image['digest']}" if "digest" in image else f":{image['newTag']}"
            container["image"] = image["newName"] + version
    for each in part.values():
        _name_image(each, image)


def _with_hashed_names(objects: list[Json], references: list[Json]) -> list[Json]:
    built = copy.deepcopy(objects)
    for config in [each for each in built if each.pop("generated", False)]:
        name = config["metadata"]["name"]
        config["metadata"]["name"] = f"{name}-{_hash(config)}"
        for each in built:
            paths = [one["path"] for one in references if one["kind"] == each["kind"]]
            for path in paths + _BUILT_IN.get(each["kind"], []):
                for place, last in _places(each, path.split("/")):
                    if place[last] == name:
                        place[last] = config["metadata"]["name"]
    return built


def _hash(config: Json) -> str:
    """Of the content alone, as Go writes JSON: the name stays out of it."""
    described = {"data": config["data"], "kind": "ConfigMap", "name": ""}
    text = json.dumps(described, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10].translate(_HASH_LETTERS)


def _places(part: Any, path: list[str]) -> Iterator[tuple[Json, str]]:
    if isinstance(part, list):
        for each in part:
            yield from _places(each, path)
    elif isinstance(part, dict) and path[0] in part:
        if len(path) == 1:
            yield part, path[0]
        else:
            yield from _places(part[path[0]], path[1:])
