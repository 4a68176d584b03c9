"""The first program in a submission's container: takes the archive, then becomes its policy server.

`python -m orchestrator.submission.host --directory WORKDIR ...`. This module does what has to come before
anything large is imported, and before there is a thread; the rest is in `hosting`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from orchestrator.submission.first_process import leave_first_process
from orchestrator.submission.threads import limit_threads


def main(arguments: Sequence[str] | None = None) -> int:
    """As `hosting.main`, fit to be the first process of a container."""
    leave_first_process()
    limit_threads(os.environ)
    from orchestrator.submission import hosting  # imports NumPy, which starts its threads

    return hosting.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
