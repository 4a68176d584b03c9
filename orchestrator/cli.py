"""The command line: what each command takes, says and exits with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.domain.errors import OrchestratorError, SubmissionError, UsageError
from orchestrator.logging import configure_logging
from orchestrator.ray_environment import prepare_ray_environment

app = typer.Typer(
    name="orchestrator",
    help="Evaluates policies that nobody has to trust: queue in, isolated rollouts, one result out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
db_app = typer.Typer(help="The database's schema.", no_args_is_help=True)
app.add_typer(db_app, name="db")

COMPLETED, SUBMISSION_FAILED, WRONG_USAGE, INFRASTRUCTURE_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database-url", help="PostgreSQL to use, postgresql://...; default: an embedded one."),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the embedded PostgreSQL keeps its data.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show logs, and tracebacks of errors.")]


def main() -> None:
    """The console script."""
    prepare_ray_environment()
    app()


def run_command(work: Coroutine[Any, Any, int], *, debug: bool) -> None:
    """Run to the end and exit: errors become one line on stderr and an exit code, Ctrl-C cleans up first."""
    configure_logging("console" if debug else "auto", "DEBUG" if debug else "ERROR")
    try:
        code = _run(work)
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BaseExceptionGroup as group:
        code = _report(_leaf(group), debug)
    except Exception as error:  # noqa: BLE001
        # Whatever it is, a person gets one line and an exit code that means what it says.
        code = _report(error, debug)
    sys.stdout.flush()
    raise typer.Exit(code)


def _run(work: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        # SIGTERM and SIGHUP end a command as Ctrl-C does: everything that it started is taken down.
        task = loop.create_task(work)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, _interrupt, task)
        return runner.run(_result_of(task))


def _interrupt(task: asyncio.Task[int]) -> None:
    """Cancel once: a second signal would cancel the clean-up, and leave things behind."""
    if task.cancelling():
        print("cleaning up already", file=sys.stderr)
    else:
        task.cancel()


async def _result_of(task: asyncio.Task[int]) -> int:
    return await task


def _report(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    known = isinstance(error, OrchestratorError)
    text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
    print(f"error: {text}", file=sys.stderr)
    if isinstance(error, UsageError):
        return WRONG_USAGE
    if isinstance(error, SubmissionError):
        return SUBMISSION_FAILED
    return INFRASTRUCTURE_FAILED


def _leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@app.command(name="eval", help="Evaluate a submission.")
def evaluate(
    submission: Annotated[str, typer.Argument(help="Directory with agent.py, a .tar.gz, or HOST:PORT.")],
    benchmark: Annotated[
        list[str], typer.Option("--benchmark", "-b", help="PROVIDER/NAME; may be given several times.")
    ],
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes of each task.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Rollout workers of each job.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes the run repeatable by anyone.")] = None,
    config: Annotated[
        list[str] | None, typer.Option("--config", "-c", help="KEY=VALUE (JSON) for the benchmark's config.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds until a job is ended.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for a bundle of the results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")] = False,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    debug: Debug = False,
) -> None:
    """Evaluate a submission.

    Example: orchestrator eval examples/cartpole --benchmark gymnasium/CartPole-v1 --episodes 100 --seed 7
    """
    from orchestrator.commands import evaluate_command
    from orchestrator.evaluation import EvalRequest

    pairs = tuple(_pair(text) for text in config or [])
    requests = [EvalRequest(submission, name, episodes, workers, seed, pairs, timeout) for name in benchmark]
    run_command(
        evaluate_command(
            lambda: _settings(database_url, data_dir, debug), requests, output=output, as_json=as_json
        ),
        debug=debug,
    )


@app.command()
def demo(
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of each task.")] = 10,
    output: Annotated[Path, typer.Option(help="Directory for a bundle of the results.")] = Path(
        "results/demo"
    ),
    data_dir: DataDir = None,
    debug: Debug = False,
) -> None:
    """Evaluate the example submissions: Meta-World's scripted experts on MT10, and a CartPole controller.

    Example: orchestrator demo
    """
    from orchestrator.commands import evaluate_command
    from orchestrator.evaluation import EvalRequest

    examples = Path("examples")
    requests = [
        EvalRequest(str(examples / "cartpole"), "gymnasium/CartPole-v1", episodes * 2, 1, 7),
        EvalRequest(str(examples / "metaworld_experts"), "metaworld/MT10", episodes, os.cpu_count() or 1, 7),
    ]
    run_command(
        evaluate_command(lambda: _settings(None, data_dir, debug), requests, output=output, as_json=False),
        debug=debug,
    )


@app.command()
def up(database_url: DatabaseUrl = None, data_dir: DataDir = None, debug: Debug = False) -> None:
    """Run the control plane until Ctrl-C.

    Example: orchestrator up
    """
    from orchestrator.commands import up_command

    run_command(up_command(lambda: _settings(database_url, data_dir, debug)), debug=debug)


@app.command()
def submit(
    job: Annotated[Path, typer.Argument(help="A job message as JSON; - reads standard input.")],
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    debug: Debug = False,
) -> None:
    """Enqueue `add_job`.

    Example: orchestrator submit job.json
    """
    from orchestrator.commands import submit_command

    run_command(submit_command(lambda: _settings(database_url, data_dir, debug), job), debug=debug)


@app.command()
def consume(
    queue: Annotated[str, typer.Argument(help="eval_result, job_status_update, episode_data, ...")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until Ctrl-C.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many messages.")] = None,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    debug: Debug = False,
) -> None:
    """Print what a validator would receive, a JSON line each, and acknowledge it.

    Example: orchestrator consume eval_result
    """
    from orchestrator.commands import consume_command

    run_command(
        consume_command(lambda: _settings(database_url, data_dir, debug), queue, follow=follow, limit=limit),
        debug=debug,
    )


@db_app.command()
def migrate(database_url: DatabaseUrl = None, data_dir: DataDir = None, debug: Debug = False) -> None:
    """Bring the database to this version's schema; does nothing where it is.

    Example: orchestrator db migrate --database-url postgresql://user:password@host/name
    """
    from orchestrator.commands import migrate_command

    run_command(migrate_command(lambda: _settings(database_url, data_dir, debug)), debug=debug)


def _settings(database_url: str | None, data_dir: Path | None, debug: bool) -> Any:
    from orchestrator.settings import load_settings

    overrides: dict[str, Any] = {"database_url": database_url, "data_dir": data_dir}
    if debug:
        overrides["log_level"] = "DEBUG"
    return load_settings(**overrides)


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


if __name__ == "__main__":
    main()
