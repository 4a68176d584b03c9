"""Orchestrator: a Ray-native control plane that turns queued evaluation jobs into running rollouts."""

__version__ = "0.1.0"
