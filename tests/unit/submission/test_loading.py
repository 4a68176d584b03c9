"""What an author is shown when the agent does not load or raises."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.submission.loading import (
    MAX_TRACEBACK_BYTES,
    MODULE_NAME,
    NotAnAgent,
    describe_exception,
    describe_frame,
    load_agent_class,
)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A submission's directory; the changes that loading makes to this process are undone."""
    before = os.getcwd(), sys.path[:], set(sys.modules)
    yield tmp_path.resolve()
    os.chdir(before[0])
    sys.path[:] = before[1]
    for name in set(sys.modules) - before[2]:
        if name == MODULE_NAME or name.startswith("helper_of_"):
            del sys.modules[name]


def described(directory: Path, source: str) -> str:
    (directory / "agent.py").write_text(source)
    with pytest.raises(BaseException) as caught:
        load_agent_class(directory)().act(None)
    return describe_exception(caught.value, directory)


def test_the_agent_finds_its_neighbours(directory: Path) -> None:
    (directory / "helper_of_agent.py").write_text(
        "from pathlib import Path\nVALUE = Path('w.txt').read_text()"
    )
    (directory / "w.txt").write_text("weights")
    (directory / "agent.py").write_text(
        "import helper_of_agent\nclass Agent:\n    def act(self, o):\n        return helper_of_agent.VALUE"
    )

    assert load_agent_class(directory)().act(None) == "weights"


def test_spaces_are_given_only_to_constructors_that_take_them(directory: Path) -> None:
    (directory / "agent.py").write_text(
        "class Agent:\n"
        "    def __init__(self, action_space, observation_space=1):\n"
        "        self.spaces = action_space, observation_space\n"
        "    def act(self, o):\n        return self.spaces"
    )

    assert load_agent_class(directory)().act(None) == (None, None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", "agent.py has no class Agent"),
        ("Agent = 5", "agent.py has no class Agent"),
        ("class Agent: pass", "class Agent has no method act(self, observation)"),
    ],
)
def test_a_module_without_an_agent_says_what_is_missing(directory: Path, source: str, reason: str) -> None:
    assert described(directory, source) == reason


def test_a_directory_without_agent_py_says_so(directory: Path) -> None:
    with pytest.raises(NotAnAgent, match=r"no file agent\.py"):
        load_agent_class(directory)


def test_a_traceback_shows_the_authors_line_and_none_of_ours(directory: Path) -> None:
    text = described(
        directory,
        "class Agent:\n    def act(self, o):\n        try:\n            return [][o or 1]\n"
        "        except IndexError:\n            raise RuntimeError('no action') from None",
    )

    assert 'File "agent.py", line 6, in act' in text
    assert "raise RuntimeError('no action')" in text
    assert text.rstrip().endswith("RuntimeError: no action")
    assert "loading.py" not in text
    assert "test_loading" not in text


def test_the_cause_of_an_exception_is_shown(directory: Path) -> None:
    text = described(
        directory, "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError from e"
    )

    assert "ZeroDivisionError" in text
    assert 'agent.py", line 2' in text
    assert "importlib" not in text


def test_a_syntax_error_shows_its_line(directory: Path) -> None:
    text = described(directory, "class Agent:\n    def act(self, o)\n        return 1")

    assert 'File "agent.py", line 2' in text
    assert "def act(self, o)" in text
    assert "SyntaxError" in text


def test_a_submission_that_exits_while_it_is_imported_says_so(directory: Path) -> None:
    assert "SystemExit: 3" in described(directory, "import sys\nsys.exit(3)")


def test_a_long_traceback_keeps_its_beginning_and_its_end(directory: Path) -> None:
    text = described(directory, "raise ValueError('begin' + 'ü' * 50_000 + 'end')")

    assert len(text.encode()) <= MAX_TRACEBACK_BYTES
    assert "agent.py" in text
    assert text.rstrip().endswith("end")


def test_an_endless_recursion_is_described(directory: Path) -> None:
    text = described(directory, "class Agent:\n    def act(self, o):\n        return self.act(o)")

    assert "RecursionError" in text
    assert len(text.encode()) <= MAX_TRACEBACK_BYTES


def test_an_exception_whose_text_raises_is_described(directory: Path) -> None:
    text = described(
        directory, "class Odd(Exception):\n    def __str__(self):\n        raise ValueError\nraise Odd"
    )

    assert "Odd" in text


def test_a_frame_outside_the_submission_is_not_described(directory: Path) -> None:
    assert describe_frame(sys._getframe(), directory) == ""
