"""Targets that a release is sent to, a file each."""
