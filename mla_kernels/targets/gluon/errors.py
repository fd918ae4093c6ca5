"""What the Gluon emulator raises, beside NotImplementedError for an operation that it does not know."""


class EmulationError(RuntimeError):
    """A kernel did what a device would not do, or what has no defined result there."""


class DeadlockError(EmulationError):
    """Every partition waits and nothing is in flight; the message says who waits for what."""


class RaceError(EmulationError):
    """Two accesses to shared memory that no barrier, wait or fence orders."""


class OutOfBoundsError(EmulationError):
    """An access outside an argument's storage or a view of shared memory."""
