"""Containers as hardened pods of a Kubernetes cluster, and what is looked at before they run there."""
