"""Fetching submission archives from where their URLs point."""
