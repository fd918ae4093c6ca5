"""A file that cannot be collected, for tests/device/test_parity.py."""

import no_such_package  # noqa: F401
