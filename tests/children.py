"""Processes that tests start, and what of this one's surroundings changes what they print."""

import os

SETTINGS = ("PYTEST_", "COV_", "TRITON_INTERPRET")  # of this process's own run
# Whole messages in pytest's summary, colours, the width of a line.
PRINTING = ("CI", "BUILD_NUMBER", "GITHUB_ACTIONS", "PY_COLORS", "FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TERM")
PRINTING += ("TTY_COMPATIBLE", "TTY_INTERACTIVE")


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for one whose output or behaviour a test checks, and ``more``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return {name: value for name, value in kept.items() if name not in PRINTING} | more
