"""A control plane that may fetch from the archive server of these tests, which the product never would."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.adapters.artifacts.fetch import FetchLimits
from orchestrator.app import ControlPlaneRecipe
from orchestrator.ports import Claim


@dataclass(frozen=True)
class LoopbackRecipe(ControlPlaneRecipe):
    """`ca_file`: the authority that is trusted instead of the public ones."""

    ca_file: str = ""

    def _fetch_limits(self, claim: Claim) -> FetchLimits:
        return replace(super()._fetch_limits(claim), allow_private_addresses=True, ca_file=self.ca_file)
