"""Orchestration: Prefect runs what DVC's graph says. No stage's logic, and no second list of stages, lives here."""

import os

# Prefect reads it when it is imported. The other switches: prefect.toml, .dvc/config, koala/tracking.py.
os.environ.setdefault("DO_NOT_TRACK", "true")
