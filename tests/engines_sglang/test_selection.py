"""SGLang's own plugin loader and argument handling, for capabilities that are pretended."""

import json
import subprocess
import sys

import pytest

from tests.engines_sglang.choose import ASKED, OTHERS

CAPABILITIES = ("8.0", "8.9", "9.0", "10.3", "12.0", "12.1")


@pytest.fixture(scope="session")
def answers():
    found = {}

    def of(capability, *flags):
        if (capability, flags) not in found:
            command = [sys.executable, "-m", "tests.engines_sglang.choose", capability, *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            found[capability, flags] = json.loads(done.stdout.splitlines()[-1]), done.stderr
        return found[capability, flags]

    return of


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_by_name_everywhere(answers, capability):
    chosen, log = answers(capability)
    native = chosen["nothing"][0]
    assert "Loaded plugin mla_kernels" in log and "mla_kernels" not in chosen["nothing"]
    assert chosen["attention by name"][:2] == chosen["deterministic"][:2] == ["mla_kernels"] * 2
    assert chosen["decoding by name"][:2] == ["triton", "mla_kernels"]
    assert chosen["prefill by name"][:2] == ["mla_kernels", "triton"]
    assert chosen["experts by name"][:3] == [native, native, "mla_kernels"]
    assert chosen["both, pages of 64"] == ["mla_kernels"] * 3 + [64]


@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.0"])
def test_nothing_changes_unless_it_is_asked_for(answers, capability):
    without, _ = answers(capability, "--without")
    assert answers(capability)[0]["nothing"] == without["nothing"]
    for name in ASKED:
        assert name == "nothing" or "invalid choice: 'mla_kernels'" in without[name]


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
@pytest.mark.parametrize("model", OTHERS)
def test_other_models_are_left_alone(answers, capability, model):
    chosen, without = answers(capability)[0][model], answers(capability, "--without")[0][model]
    assert chosen == without and len(chosen) > 500 and "mla_kernels" not in json.dumps(chosen)
