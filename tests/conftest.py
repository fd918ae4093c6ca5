"""Backends and switches of the suite.

``--backend cpu,interpret,npu-emulated,hopper-emulated`` (default: all four) chooses what the parity tests run on;
``hopper-emulated`` executes the source of Gluon kernels in place of the portable ones, for tests marked ``hopper``.
``cuda`` and ``npu`` run them on a device, and leave out every test that takes no backend, since the default run has it.
The interpreter must be switched on before Triton is imported, hence the first lines. Where there is no device, CPU
memory can pose as one: ``TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -m pytest -p tests.npu.posing --backend npu``.

A test that takes ``device`` (or ``backend``) is one of parity: it makes its tensors there, and it fails unless a kernel
was launched there (on ``hopper-emulated`` a Gluon kernel). Marks say what differs, ``when`` a condition on the test's
parameters holds, or always: ``no_launch(reason)`` where no kernel may be launched, ``slow`` what runs only with
``--slow``, ``leave_out(reason)`` combinations that do not exist, ``hopper`` what runs on ``hopper-emulated``, too.
Nothing skips itself: a skipped test fails.

The cases of a test take turns: one runs in the interpreter, one in the emulator. From the third on, where the CPU code
runs them all, every third runs in the interpreter and every sixth in the emulator. With ``--no-turns`` each runs
everywhere.

``--quick`` (``make quick``) runs the tests marked ``quick`` and no others: all cases of one marked ``quick()``, and of
one marked ``quick("an_op", when=...)`` the first on each backend, on ``cpu`` and ``interpret`` if nothing else is
chosen. Such a case must call the op that its mark names, and every registered op must be named by one.
"""

import argparse
import gc
import inspect
import os
import sys
from collections import Counter

VARIANTS = "hopper-emulated"
BACKENDS = ("cpu", "interpret", "npu-emulated", VARIANTS, "cuda", "npu")
DEVICES = ("cuda", "npu")
EXECUTORS = ("interpret", "npu-emulated")
TURNS = (0, 1, 2, 0, 2, 2)  # of EXECUTORS; 2 is none. The emulator compiles each case anew and has half as many turns
QUICK_BACKENDS = ("cpu", "interpret")


def _backends(arguments: list[str]) -> tuple[str, ...]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--backend="):
            return tuple(argument.removeprefix("--backend=").split(","))
        if argument == "--backend":
            return tuple(arguments[index + 1].split(","))
    if "PYTEST_BACKENDS" not in os.environ and "--quick" in arguments:
        return QUICK_BACKENDS
    return tuple(os.environ.get("PYTEST_BACKENDS", f"cpu,interpret,npu-emulated,{VARIANTS}").split(","))


collect_ignore = ["engines", "engines_sglang"]  # in environments of their own: make test-engines
CHOSEN = _backends(sys.argv)
ON_DEVICE = bool(set(DEVICES) & set(CHOSEN))
os.environ["PYTEST_BACKENDS"] = ",".join(CHOSEN)  # xdist workers see no command line
if not ON_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from mla_kernels import hopper, launch, tile_files  # noqa: E402
from mla_kernels.targets import emulator  # noqa: E402
from mla_kernels.targets.service import ToolchainMissing  # noqa: E402
from tests.children import PRINTING  # noqa: E402

WITHOUT_ASCEND = "The parity tests run without it: --backend cpu,interpret"
MODES = {"cpu": "torch", "interpret": "interpret", "npu-emulated": "npu-emulated", VARIANTS: VARIANTS}


def pytest_addoption(parser):
    parser.addoption("--backend", default=",".join(CHOSEN), help=f"comma-separated, of {', '.join(BACKENDS)}")
    parser.addoption("--slow", action="store_true", help="run the sweeps that take minutes, too")
    parser.addoption(
        "--turns", action=argparse.BooleanOptionalAction, default=True,
        help=f"cases share {' and '.join(EXECUTORS)} between them",
    )  # fmt: skip
    parser.addoption("--quick", action="store_true", help="one parity case an op, and what else is marked quick")


def pytest_configure(config):
    unknown = set(CHOSEN) - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(f"--backend: unknown {', '.join(unknown)}; accepted: {', '.join(BACKENDS)}")
    if ON_DEVICE and "interpret" in CHOSEN:
        raise pytest.UsageError("--backend: the interpreter and a device need processes of their own")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    emulator.OPTIMISE = config.getoption("--slow")  # by default a test's tiles are small and few
    config.addinivalue_line("markers", "leave_out(reason, when=None): combinations of parameters that do not exist")
    config.addinivalue_line("markers", "quick(*ops, when=None): runs with --quick; with ops: its first case")
    config.addinivalue_line("markers", "device_process: takes no backend, but runs where a device's tests do")
    config.addinivalue_line("markers", f"hopper(when=None): runs on {VARIANTS}, too")
    config.addinivalue_line("markers", "no_launch(reason, when=None): no kernel may be launched, on any backend")


# ---------------------------------------------------------------------------------------------------------------------
# What runs


def pytest_collection_modifyitems(config, items):
    chosen = {True: [], False: []}
    for item in items:
        chosen[_runs(item, config.getoption("--slow"))].append(item)
    if config.getoption("--quick"):
        quick = _quick(chosen[True])
        chosen[False] += [item for item in chosen[True] if item not in quick]
        chosen[True] = [item for item in chosen[True] if item in quick]
        called = {(op, _parameters(item).get("backend")) for item in quick for op in quick[item]}
        everywhere = [backend for backend in CHOSEN if backend != VARIANTS]
        left_out = sorted(op for op in _ops() if any((op, backend) not in called for backend in everywhere))
        if left_out and _everything_was_collected(config):
            raise pytest.UsageError(f"--quick: no parity test is marked quick for {', '.join(left_out)}")
    elif config.getoption("--turns"):
        out_of_turn = _out_of_turn(chosen[True])
        chosen[False] += [item for item in chosen[True] if item in out_of_turn]
        chosen[True] = [item for item in chosen[True] if item not in out_of_turn]
    items[:] = chosen[True]
    config.hook.pytest_deselected(items=chosen[False])


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Modules and tests live to the end: the garbage collector need not look through them, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_ignore_collect(collection_path, config):
    """``--quick`` reads only files that have a mark for it."""
    if config.getoption("--quick") and collection_path.name.startswith("test_"):
        return True if "mark.quick" not in collection_path.read_text() else None
    return None


def _quick(items) -> dict:
    """What ``--quick`` runs: item -> the ops that it must call."""
    found: dict = {}
    seen = set()
    for item in items:
        for mark in item.iter_markers("quick"):
            case = (item.path, item.cls, item.originalname, mark.args, _parameters(item).get("backend"))
            if _holds(mark, item) and not (mark.args and case in seen):
                seen.add(case)
                found.setdefault(item, set()).update(mark.args)
    return found


def _ops() -> set[str]:
    """Names of all ops that the library registers."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for space, name in names if space == "mla_kernels"}


def _everything_was_collected(config) -> bool:
    return config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword


def _out_of_turn(items) -> set:
    """Of the cases that both executors can run: on the executors whose turn it is not."""
    tests: dict = {}
    for item in items:
        backend = _parameters(item).get("backend")
        if backend is not None:
            cases = tests.setdefault((item.path, item.cls, item.originalname), {})
            cases.setdefault(item.callspec.id.replace(backend, "", 1), {})[backend] = item
    left_out = set()
    for number, cases in enumerate(tests.values()):
        both = [runs for runs in cases.values() if runs.keys() >= set(EXECUTORS)]
        for place, runs in enumerate(both):
            turn = TURNS[place % len(TURNS)] if place > 1 and "cpu" in runs else (number + place) % 2
            left_out |= {runs[executor] for executor in EXECUTORS if EXECUTORS[turn : turn + 1] != (executor,)}
    return left_out


def _runs(item, slow: bool) -> bool:
    if ON_DEVICE and "backend" not in _parameters(item) and _mark(item, "device_process") is None:
        return False
    if _parameters(item).get("backend") == VARIANTS and _mark(item, "hopper") is None:
        return False
    return _mark(item, "leave_out") is None and (slow or _mark(item, "slow") is None)


def _parameters(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _mark(item, name: str):
    """The mark of this name whose condition holds for the item's parameters; None if there is none."""
    return next((mark for mark in item.iter_markers(name) if _holds(mark, item)), None)


def _holds(mark, item) -> bool:
    when = mark.kwargs.get("when")
    parameters = _parameters(item)
    return when is None or bool(when(**{name: parameters[name] for name in inspect.signature(when).parameters}))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A check that skips itself is no check: what it needs and lacks is a failure."""
    report = _without_skip((yield))
    if call.excinfo is not None and call.excinfo.errisinstance(ToolchainMissing):
        report.longrepr = f"{call.excinfo.value}\n{WITHOUT_ASCEND}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _without_skip((yield))


def _without_skip(report):
    if report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason}\nA test does not skip itself; see tests/conftest.py."
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs


@pytest.fixture(params=CHOSEN)
def backend(request):
    """Name of the backend; public ops called with CPU tensors run on it for the length of the test."""
    if request.param in MODES:
        variants = hopper.variants("force" if request.param == VARIANTS else "listed")
        with launch.on_cpu(MODES[request.param]), variants:
            yield request.param
    else:
        yield request.param


@pytest.fixture
def device(backend):
    """Device for the test's tensors."""
    return torch.device(backend, 0) if backend in DEVICES else torch.device("cpu")


@pytest.fixture
def cpu_code():
    """Public ops called with CPU tensors run the torch code, as for users; without it, or a backend, they run in the
    interpreter."""
    with launch.on_cpu("torch"):
        yield


_launched: Counter = Counter()
"""Kernels launched since the test began, by what ran them: "interpret", "npu-emulated", or the device's type."""


def _count_launches():
    run = launch.Kernel.launch

    def counted(kernel, chip, work, args, statics, tile):
        run(kernel, chip, work, args, statics, tile)
        place = args[0].device.type
        place = launch.cpu_mode() if place == "cpu" else place
        if work and (place != VARIANTS or kernel.language == "gluon"):
            _launched[place] += 1

    launch.Kernel.launch = counted


_count_launches()


class _Calls(TorchDispatchMode):
    """Names of the library's ops that were called in the block."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mla_kernels":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that takes a backend launches kernels there, and one that is marked ``no_launch`` does not."""
    backend = _parameters(pyfuncitem).get("backend")
    if backend in DEVICES and not (hasattr(torch, backend) and getattr(torch, backend).is_available()):
        pytest.fail(f"--backend {backend}: torch {torch.__version__} sees no such device here", pytrace=False)
    _launched.clear()
    ops = _quick([pyfuncitem]).get(pyfuncitem) if pyfuncitem.config.getoption("--quick") else None
    if ops:
        with _Calls() as calls:
            result = yield
        if ops - calls.names:
            pytest.fail(f"marked quick for {', '.join(sorted(ops - calls.names))}, called {calls.names}", pytrace=False)
    else:
        result = yield
    if backend not in (None, "cpu"):
        none_expected = _mark(pyfuncitem, "no_launch")
        if none_expected is None and not _launched[backend]:
            where = f"; kernels ran on {', '.join(_launched)}" if _launched else ""
            pytest.fail(f"no kernel was launched on {backend}{where}: are the tensors on `device`?", pytrace=False)
        if none_expected is not None and _launched[backend]:
            pytest.fail(f"{_launched[backend]} launches, marked no_launch: {none_expected.args[0]}", pytrace=False)
    return result


@pytest.fixture(autouse=True, scope="session")
def _plain_printing():
    """Neither a terminal's width and colours nor a CI's variables change what commands print."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PRINTING:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_store_of_the_user(tmp_path_factory):
    """Tiles that somebody tuned on this machine change no test."""
    folder = tmp_path_factory.mktemp("tiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_files, "store_path", lambda device: folder / f"{device}.jsonl")
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
