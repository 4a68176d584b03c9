"""A first submission: it can be played at once, and says what it sees and does."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from orchestrator.adapters.benchmarks.spaces import from_wire
from orchestrator.authoring.scaffold import _random_action, first_submission, write_submission
from orchestrator.domain.errors import UsageError
from tests.golden_texts import check_golden


@pytest.mark.parametrize(
    ("case", "benchmark"),
    [
        ("init_cartpole", "gymnasium/CartPole-v1"),
        ("init_mt10", "metaworld/MT10"),
        ("init_blackjack", "gymnasium/Blackjack-v1"),
    ],
)
def test_the_author_gets_a_file_that_explains_itself(case: str, benchmark: str) -> None:
    submission = first_submission(benchmark)

    check_golden("check", case, submission.source)
    ast.parse(submission.source)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.Box(-2.0, 2.0, (3,), np.float32),
        spaces.Box(np.float32([-1, 0]), np.float32([0, 5])),
        spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
        spaces.Box(5.0, np.inf, (2,), np.float64),
        spaces.Box(0, 255, (4, 4), np.uint8),
        spaces.Box(np.zeros(20, np.float32), np.arange(1, 21, dtype=np.float32)),
        spaces.MultiDiscrete([2, 3], start=[1, -1]),
        spaces.MultiBinary(4),
        spaces.Text(min_length=2, max_length=5),
        spaces.Dict({"arm": spaces.Box(-1, 1, (7,)), "grip": spaces.Discrete(2)}),
        spaces.Tuple([spaces.Discrete(2), spaces.Box(0, 1, ())]),
    ],
    ids=str,
)
def test_what_it_draws_is_an_action_of_the_space(space: spaces.Space[Any]) -> None:
    class Self:
        random = np.random.default_rng(1)

    reply = eval(_random_action(space), {"np": np, "self": Self})

    checked = from_wire(space, reply)
    assert checked.clipped == 0
    assert space.contains(checked.action)


def test_a_benchmark_without_a_rule_of_success_is_given_the_config_that_it_needs() -> None:
    assert first_submission("gymnasium/Pendulum-v1").config == "score=avg_reward"
    assert first_submission("gymnasium/CartPole-v1").config == ""


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    submission = first_submission("gymnasium/CartPole-v1")
    write_submission(tmp_path / "new" / "one", submission)

    with pytest.raises(UsageError, match=r"is not empty, it holds agent.py: name a new directory"):
        write_submission(tmp_path / "new" / "one", submission)
    with pytest.raises(UsageError, match="is a file: name a new directory"):
        write_submission(tmp_path / "new" / "one" / "agent.py", submission)
