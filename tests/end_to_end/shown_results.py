"""What `eval` prints of a result, for golden texts."""

from __future__ import annotations

import re
from io import StringIO

from orchestrator.domain.messages import EvalResultMessage
from orchestrator.evaluation import exit_code
from orchestrator.presentation import make_console, results_table


def shown(result: EvalResultMessage) -> str:
    """The table of `eval` and its exit code, without what varies: the number of the job, ports."""
    text = StringIO()
    make_console(text, columns=110).print(results_table([result]))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    table = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", "\n".join(lines))
    return f"{re.sub(r'^job [0-9]+', 'job 1', table)}\nexit code {exit_code([result])}\n"
