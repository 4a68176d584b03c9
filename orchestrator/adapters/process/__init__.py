"""Submissions as processes of this machine: for development and trusted code, not for strangers'."""
