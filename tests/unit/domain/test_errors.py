import importlib
import inspect
import pickle
import pkgutil
from enum import Enum
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

import orchestrator
from orchestrator.authoring.findings import Finding, Mark
from orchestrator.domain import errors
from orchestrator.domain.errors import InvalidJob, SubmissionError

VALUES: dict[Any, object] = {
    int: 3,
    str: "why",
    float: 1.5,
    bytes: b"b",
    bool: True,
    object: "thing",
    dict[str, str]: {"name": "value"},
    Finding: Finding(Mark.WRONG, "loads", "it does not"),
}


def errors_of(module: ModuleType) -> list[type[Exception]]:
    """The exception classes that `module` defines itself; private ones never leave it."""
    return [
        item
        for name, item in vars(module).items()
        if inspect.isclass(item) and issubclass(item, Exception) and item.__module__ == module.__name__
        if not name.startswith("_")
    ]


def all_errors() -> list[type[Exception]]:
    modules = pkgutil.walk_packages(orchestrator.__path__, "orchestrator.")
    names = [module.name for module in modules if not module.name.endswith("__main__")]
    return [error for name in names for error in errors_of(importlib.import_module(name))]


def example(kind: type[Exception]) -> Exception:
    """One error of the class, every argument given by position."""
    owner = next(base for base in kind.__mro__ if "__init__" in vars(base))
    if not owner.__module__.startswith("orchestrator."):
        return kind("something happened")
    parameters = list(inspect.signature(kind).parameters.values())
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters), kind
    hints = get_type_hints(owner.__init__)
    return kind(*(argument(hints[parameter.name]) for parameter in parameters))


def argument(hint: Any) -> object:
    kinds = get_args(hint) or (hint,)
    if inspect.isclass(kinds[0]) and issubclass(kinds[0], Enum):
        return next(iter(kinds[0]))
    return VALUES[kinds[0]]  # a KeyError here: a new kind of argument, give it a value above


def assert_it_pickles(kind: type[Exception]) -> None:
    error = example(kind)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))
    assert str(error)


@pytest.mark.parametrize("kind", errors_of(errors), ids=lambda kind: kind.__name__)
def test_an_error_survives_the_way_across_ray(kind: type[Exception]) -> None:
    assert_it_pickles(kind)


def test_so_does_every_error_that_another_module_defines() -> None:
    kinds = all_errors()

    assert set(errors_of(errors)) <= set(kinds)
    for kind in kinds:
        assert_it_pickles(kind)


def test_an_invalid_job_names_its_id_where_it_has_one() -> None:
    assert str(InvalidJob(4, "no benchmark")) == "job 4: no benchmark"
    assert str(InvalidJob(None, "not JSON")) == "not JSON"


def test_the_log_tail_of_a_submission_error_stays_out_of_its_text() -> None:
    error = SubmissionError("it crashed", "a secret that it printed")

    assert str(error) == "it crashed"
    assert pickle.loads(pickle.dumps(error)).log_tail == "a secret that it printed"


@pytest.mark.parametrize(("found", "advice"), [(9, "newer orchestrator"), (1, "orchestrator db migrate")])
def test_a_wrong_schema_says_what_to_do(found: int, advice: str) -> None:
    assert advice in str(errors.SchemaMismatch(found, 3))
