"""`python -m orchestrator.diagnosis.ray_probe [ADDRESS]`: Ray in a process that may hang or crash by itself.

Prints one JSON object: Ray's version and, with an address, what the cluster has.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(addresses: list[str]) -> None:
    import ray

    found: dict[str, Any] = {"version": ray.__version__}
    for address in addresses:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        total = ray.cluster_resources()
        found["cpus"] = total.get("CPU", 0.0)
        found["gpus"] = total.get("GPU", 0.0)
        found["nodes"] = sum(1 for node in ray.nodes() if node["Alive"])
        ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
