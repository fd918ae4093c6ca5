"""Processes that tests start."""

import os

SETTINGS = ("PYTEST_", "COV_", "TRITON_INTERPRET")  # of this process's own run
# What makes pytest and Python print otherwise: whole messages in a summary, colours, the width of a line.
PRINTING = ("CI", "BUILD_NUMBER", "GITHUB_ACTIONS", "PY_COLORS", "FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TERM")


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for one whose output or behaviour a test checks, and ``more``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return {name: value for name, value in kept.items() if name not in PRINTING} | more
