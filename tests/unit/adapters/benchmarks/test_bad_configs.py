"""What a person reads of a job's `config` that its benchmark cannot use."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.adapters.benchmarks.registry import load_benchmark
from orchestrator.domain.errors import UsageError
from orchestrator.domain.messages import JobConfig
from tests.golden_texts import check_golden

GYMNASIUM: dict[str, dict[str, Any]] = {
    "misspelt_key": {"max_epsiode_steps": 100},
    "key_of_another_benchmark": {"task_seed": 3},
    "long_key": {"k" * 10_000: 1},
    "number_as_text": {"max_episode_steps": "a hundred"},
    "number_out_of_range": {"max_episode_steps": 0, "success_threshold": [1]},
    "no_number": {"success_threshold": float("nan")},
    "kwargs_no_object": {"make_kwargs": "map_name=8x8"},
    "kwargs_unknown": {"make_kwargs": {"gravity": 3}},
    "kwargs_reserved": {"make_kwargs": {"max_episode_steps": 3}},
}
METAWORLD: dict[str, dict[str, Any]] = {
    "misspelt_key": {"taskseed": 3},
    "no_task": {},
    "unknown_task": {"task": "reach-v33"},
    "task_no_text": {"task": 3},
    "task_seed_no_integer": {"task": "reach-v3", "task_seed": "x" * 10_000},
    "task_seed_out_of_range": {"task": "reach-v3", "task_seed": -1},
    "terminate_no_bool": {"task": "reach-v3", "terminate_on_success": "yes"},
}
CASES = [
    *(("gymnasium", "CartPole-v1", case, config) for case, config in GYMNASIUM.items()),
    *(("metaworld", "MT1", case, config) for case, config in METAWORLD.items()),
]


@pytest.mark.parametrize(
    ("provider", "benchmark", "case", "config"), CASES, ids=[f"{case[0]}_{case[2]}" for case in CASES]
)
def test_a_config_that_cannot_be_used_is_answered_in_words(
    provider: str, benchmark: str, case: str, config: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as refused:
        load_benchmark(provider, benchmark, config, None)

    check_golden("bad_jobs", f"config_{provider}_{case}", str(refused.value))


def test_every_key_that_all_benchmarks_share_is_taken() -> None:
    config = {name: field.default for name, field in JobConfig.model_fields.items()}

    assert load_benchmark("gymnasium", "CartPole-v1", config, None).task_ids == ("CartPole-v1",)
    assert load_benchmark("metaworld", "reach-v3", config, None).task_ids == ("reach-v3",)
