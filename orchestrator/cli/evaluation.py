"""`eval` and `demo`: evaluate submissions with one command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Session, key_and_value, with_session

commands = typer.Typer()


@commands.command(name="eval")
@with_session
def evaluate(
    submission: Annotated[
        str, typer.Argument(help="Directory with agent.py or main.py, a .tar.gz, or HOST:PORT.")
    ],
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
    *,
    session: Session,
) -> None:
    """Evaluate a submission.

    Example: orchestrator eval examples/cartpole --benchmark gymnasium/CartPole-v1 --episodes 100 --seed 7
    """
    from orchestrator.commands.evaluate import evaluate_command
    from orchestrator.evaluation import EvalRequest

    pairs = tuple(key_and_value(text) for text in config or [])
    requests = [EvalRequest(submission, name, episodes, workers, seed, pairs, timeout) for name in benchmark]
    session.run(evaluate_command(session.settings, requests, output=output, as_json=as_json))


@commands.command()
@with_session
def demo(
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of each task.")] = 10,
    output: Annotated[Path, typer.Option(help="Directory for a bundle of the results.")] = Path(
        "results/demo"
    ),
    *,
    session: Session,
) -> None:
    """Evaluate the example submissions: Meta-World's scripted experts on MT10, and a CartPole controller.

    Example: orchestrator demo
    """
    from orchestrator.commands.evaluate import evaluate_command
    from orchestrator.evaluation import EvalRequest

    examples = Path("examples")
    requests = [
        EvalRequest(str(examples / "cartpole"), "gymnasium/CartPole-v1", episodes * 2, 1, 7),
        EvalRequest(str(examples / "metaworld_experts"), "metaworld/MT10", episodes, os.cpu_count() or 1, 7),
    ]
    session.run(evaluate_command(session.settings, requests, output=output, as_json=False))
