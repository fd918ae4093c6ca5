"""On a device, tests of the variants run them: whether they are the default there yet or not."""

import pytest

from mla_kernels import hopper


@pytest.fixture
def backend(backend):
    with hopper.variants("force"):
        yield backend
