"""Tests that break a worker's device, or hang in it; for tests/device/test_parity.py."""

import signal
import time

import pytest

from mla_kernels.device import parity_log

BROKEN = []


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    parity_log.broken = lambda: bool(BROKEN)
    assert not BROKEN


def test_breaks():
    BROKEN.append(True)
    raise RuntimeError("an illegal memory access was encountered")


def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as inside a driver
    time.sleep(60)


@pytest.mark.parametrize("number", range(6))
def test_passes(number):
    time.sleep(0.05)
