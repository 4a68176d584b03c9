"""Put ray_app.yaml, word for word, into the RayService of kuberay/base as its serveConfigV2."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
APPLICATION = ROOT / "ray_app.yaml"
SERVICE = ROOT / "kuberay" / "base" / "ray_service.yaml"
# The field, and the lines of its block, which are indented further than the field is.
_FIELD = re.compile(r"^  serveConfigV2:.*\n(?:    .*\n|\n(?=    ))*", re.MULTILINE)


def with_serve_config(service: str, application: str) -> str:
    """The manifest with this application in it.

    Raises:
        ValueError: the manifest has no serveConfigV2, or several.
    """
    block = "  serveConfigV2: |\n" + textwrap.indent(application.strip() + "\n", "    ")
    written, count = _FIELD.subn(lambda _: block, service)
    if count != 1:
        raise ValueError(f"{count} fields serveConfigV2 in the RayService, instead of one")
    return written


def main() -> int:
    """Write the manifest anew; with --check only say whether that would change it."""
    current = SERVICE.read_text()
    wanted = with_serve_config(current, APPLICATION.read_text())
    if "--check" not in sys.argv[1:]:
        SERVICE.write_text(wanted)
        return 0
    if wanted != current:
        print("kuberay/base/ray_service.yaml is not what `make manifests` writes", file=sys.stderr)
    return int(wanted != current)


if __name__ == "__main__":
    sys.exit(main())
