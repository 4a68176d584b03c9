"""docs/validator.md says what the code does: types, keys and examples are compared with it.

UPDATE_GOLDEN=1 writes what the code decides (columns of types, examples of the last end-to-end run) into the
page; what a field means is written there by people, and a new field without it fails here.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.domain.episodes import FaultClass
from orchestrator.domain.lifecycle import TRANSITIONS, JobStatus
from orchestrator.domain.messages import (
    OUTGOING_QUEUES,
    EpisodeDataMessage,
    EpisodeStepDataMessage,
    EvalJobMessage,
    EvalResultMessage,
    JobConfig,
    JobStatusUpdateMessage,
    Resources,
)
from orchestrator.domain.results import build_result
from orchestrator.settings import ENV_PREFIX, Settings
from tests.episode_outcomes import outcome
from tests.golden_texts import GOLDEN, check_golden
from tests.job_fixtures import a_job

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "validator.md"
CONSUMER = ROOT / "examples" / "validator" / "consumer.py"
UPDATES = os.environ.get("UPDATE_GOLDEN") == "1"

INCOMING: dict[str, type[BaseModel]] = {
    "add_job": EvalJobMessage,
    "config": JobConfig,
    "resources": Resources,
}
OUTGOING: dict[str, type[BaseModel]] = {
    "eval_result": EvalResultMessage,
    "job_status_update": JobStatusUpdateMessage,
    "episode_data": EpisodeDataMessage,
    "episode_step_data": EpisodeStepDataMessage,
}
EXAMPLES = (
    "add_job",
    "job_status_update",
    "eval_result",
    "eval_result_failed",
    "episode_data",
    "episode_step_data",
)
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}
POWERS = {2**63 - 1: "2^63 - 1", 2**31 - 1: "2^31 - 1", -(2**31): "-2^31", 2**50: "2^50", 16 * 2**20: "2^24"}


# ---------------------------------------------------------------------------------------- the page


def marked(name: str) -> tuple[str, str, str]:
    """The page before, in and after the block that follows `<!-- name -->`, up to an empty line."""
    before, marker, rest = PAGE.read_text().partition(f"<!-- {name} -->\n")
    assert marker, f"docs/validator.md has no block <!-- {name} -->"
    block, gap, after = rest.partition("\n\n")
    return before + marker, block, gap + after


def table(name: str) -> list[list[str]]:
    """The cells of the rows of a marked table, without its head."""
    _, block, _ = marked(name)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()[2:]]


def check_block(name: str, expected: str) -> None:
    before, block, after = marked(name)
    if UPDATES:
        PAGE.write_text(before + expected + after)
        return
    assert block == expected, "UPDATE_GOLDEN=1 writes it"


# ------------------------------------------------------------------------------------------ fields


def described_fields(model: type[BaseModel], *, incoming: bool) -> list[tuple[str, str, str]]:
    """Name, type and presence of each field, in words."""
    schema = model.model_json_schema(mode="validation")
    definitions = schema.get("$defs", {})
    return [
        (name, type_in_words(field, definitions), presence(model, name, schema, incoming=incoming))
        for name, field in schema["properties"].items()
    ]


def type_in_words(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return {"JobStatus": "a [status](#statuses)", "Resources": "[object](#resources)"}[name]
    options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    # pydantic leaves the names of its own arguments where a validator of ours comes before the bounds.
    (option,) = [{BOUNDS.get(key, key): value for key, value in option.items()} for option in options]
    if "$ref" in option:
        return type_in_words(option, definitions)
    if "const" in option:
        return f"`{option['const']}`"
    if "enum" in option:
        return " or ".join(f"`{value}`" for value in option["enum"])
    kind: str = option["type"]
    if kind == "string":
        return text_in_words(option)
    if kind in ("integer", "number"):
        return kind + range_in_words(option)
    if kind == "array":
        return "array of objects"
    values = option.get("additionalProperties")
    return f"object of {values['type']}s" if isinstance(values, dict) and "type" in values else kind


def text_in_words(option: dict[str, Any]) -> str:
    if option.get("format") == "date-time":
        return "time"
    if "pattern" in option:
        return f"string like `{option['pattern']}`"
    most = f", {option['maxLength']} characters at most" if "maxLength" in option else ""
    return f"string{', not empty' if option.get('minLength') else ''}{most}"


def range_in_words(option: dict[str, Any]) -> str:
    def shown(value: float) -> str:
        return POWERS.get(int(value), f"{value:,.10g}") if value == int(value) else f"{value:g}"

    low = f"above {shown(option['exclusiveMinimum'])}" if "exclusiveMinimum" in option else ""
    low = f"{shown(option['minimum'])} or more" if "minimum" in option else low
    if "maximum" not in option:
        return f", {low}" if low else ""
    if "minimum" in option:
        return f", {shown(option['minimum'])} to {shown(option['maximum'])}"
    return f", {low + ', ' if low else ''}{shown(option['maximum'])} at most"


def presence(model: type[BaseModel], name: str, schema: dict[str, Any], *, incoming: bool) -> str:
    field = model.model_fields[name]
    nullable = any(option.get("type") == "null" for option in schema["properties"][name].get("anyOf", []))
    if not incoming:
        if not nullable:
            return "always"
        return "always, may be null" if model is EvalResultMessage else "may be missing"
    if field.is_required():
        return "required"
    if field.default is None or field.default_factory is not None:
        return "optional"
    return f"optional: `{json.dumps(field.default)}`"


@pytest.mark.parametrize("name", [*INCOMING, *OUTGOING])
def test_every_field_is_on_the_page_with_its_type_and_presence(name: str) -> None:
    incoming = name in INCOMING
    model = INCOMING[name] if incoming else OUTGOING[name]
    meanings = {row[0]: row[3] for row in table(f"fields of {name}")}
    lines = [f"| field | type | {'given' if incoming else 'there'} | meaning |", "|---|---|---|---|"]

    for field, kind, there in described_fields(model, incoming=incoming):
        meaning = meanings.get(f"`{field}`", "?")
        lines.append(f"| `{field}` | {kind} | {there} | {meaning} |")

    check_block(f"fields of {name}", "\n".join(lines))
    assert [line for line in lines if line.endswith("| ? |")] == [], "write there what these fields mean"


def every_extra() -> dict[str, Any]:
    """`extra_data` with all that it can hold."""
    faulty = [outcome(fault=fault, episode_id=number) for number, fault in enumerate(FaultClass)]
    result = build_result(
        a_job(seed_group="spring", tags={"team": "blue"}, of_theirs=1),
        JobStatus.FAILED,
        [outcome(episode_id=99), *faulty],
        20,
        validator_hotkey="local",
        versions={"python": "1.2.3"},
        success_rule="as the environment says",
        extra={"epochs": 1, "failure": "submission"},
    )
    assert result.extra_data is not None
    return result.extra_data


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("keys of extra_data", lambda: every_extra()),
        ("keys of a task", lambda: every_extra()["tasks"][0]),
        ("keys of extra_metrics", lambda: example("episode_data")["extra_metrics"] | {"fault": "crash"}),
    ],
)
def test_every_key_of_a_nested_object_is_on_the_page(name: str, keys: Any) -> None:
    documented = [row[0].strip("`") for row in table(name)]

    assert set(documented) == set(keys())
    assert len(set(documented)) == len(documented)


def test_the_keys_that_the_specs_of_every_benchmark_have_are_on_the_page() -> None:
    benchmarks = [
        load_benchmark(*name, {}, None)
        for name in (("gymnasium", "CartPole-v1"), ("metaworld", "MT1/reach-v3"))
    ]

    common = set.intersection(*(set(benchmark.env_specs()[0]) for benchmark in benchmarks))

    assert {row[0].strip("`") for row in table("keys of env_specs")} == common


def test_the_page_lists_every_fault() -> None:
    assert [row[0] for row in table("faults")] == [f"`{fault.value}`" for fault in FaultClass]


def test_the_page_has_the_table_of_transitions() -> None:
    lines = ["| from | to | when |", "|---|---|---|"]
    lines += [f"| {current} | {after} | {why} |" for (current, after), why in TRANSITIONS.items()]

    check_block("transitions", "\n".join(lines))


def test_every_setting_that_is_named_exists() -> None:
    named = set(re.findall(rf"{ENV_PREFIX}([A-Z_]+)", PAGE.read_text()))

    assert named <= {name.upper() for name in Settings.model_fields}
    assert named


# ---------------------------------------------------------------------------------------- examples


def example(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / "validator" / f"{name}.txt").read_text())
    return content


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_on_the_page_is_from_the_end_to_end_run(name: str) -> None:
    text = (GOLDEN / "validator" / f"{name}.txt").read_text().rstrip("\n")

    check_block(f"example of {name}", f"```json\n{text}\n```")


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_a_message_of_its_model(name: str) -> None:
    content = example(name)
    if name == "add_job":
        EvalJobMessage.parse(json.dumps(content | {"artifact_sha256": "0" * 64}))
        return
    model = OUTGOING[name.removesuffix("_failed")]
    model.model_validate(content)
    always = {
        row[0].strip("`") for row in table(f"fields of {content['message_type']}") if "always" in row[2]
    }

    assert always <= content.keys() <= set(model.model_fields)


# --------------------------------------------------------------------------------- the example program


def test_the_keys_of_the_example_are_those_of_the_page() -> None:
    spec = importlib.util.spec_from_file_location("example_consumer", CONSUMER)
    assert spec is not None
    assert spec.loader is not None
    consumer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(consumer)

    keys = {row[0].strip("`"): tuple(re.findall(r"`(\w+)`", row[2])) for row in table("queues")}

    assert tuple(keys) == OUTGOING_QUEUES
    assert keys == consumer.KEYS


def test_the_example_needs_nothing_but_pgqueuer_and_asyncpg() -> None:
    imported = set()
    for node in ast.walk(ast.parse(CONSUMER.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])

    assert imported - set(sys.stdlib_module_names) == {"asyncpg", "pgqueuer"}


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("job 1")
    (tmp_path / "job.json").write_text('{"job_id": 1}')
    said = []
    for name in ("missing.json", "list.json", "text.json", "job.json"):
        command = [
            sys.executable,
            str(CONSUMER),
            "--database-url",
            "postgresql://u:secret@127.0.0.1:1/x",
            name,
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        said.append(done.stderr)

    assert "secret" not in "".join(said)
    check_golden("validator", "consumer_mistakes", "".join(said))
