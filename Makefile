# make demo: install and run the main job.  make test: install the test tools and both toolchains, run the suite.
# make quick: lint, imports and one parity case an op, without the Ascend toolchain.
# make test-versions: what depends on the versions of torch, Triton and transformers, on older ones (tests/versions).
# make test-engines: the plugins inside vLLM's and SGLang's own packages, without a GPU (tests/engines, engines_sglang;
#   10 GB each, by hand); test-engines-vllm and test-engines-sglang one of them.
# make tables: choose the tiles that ship.  make docs: the pages of docs/ as a site in site/.
PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST_WORKERS ?= 2
VERSIONS = torch-2.11 torch-2.13
PYTHONS_torch-2.11 = 3.12
PYTHONS_torch-2.13 = 3.11 3.10 3.12 3.13
.PHONY: demo quick test test-slow test-engines test-engines-vllm test-engines-sglang test-versions $(VERSIONS:%=test-%) bench lint docs tables wheel clean

demo: .venv/.demo
	.venv/bin/python -m mla_kernels demo

quick: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --quick

test: .venv/.dev .venv-ascend/.ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n $(PYTEST_WORKERS) --dist worksteal

test-slow: .venv/.dev .venv-ascend/.ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n $(PYTEST_WORKERS) --dist worksteal --no-turns --slow --timeout 3600

# The NPU emulator and the tuner do not depend on these versions.
test-versions: $(VERSIONS:%=test-%)

$(VERSIONS:%=test-%): test-%: .venv-%/.ready .venv-ascend/.ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest tests -n $(PYTEST_WORKERS) --dist worksteal --backend cpu,interpret \
	    --ignore tests/npu --ignore tests/autotune

test-engines: test-engines-vllm test-engines-sglang

test-engines-vllm: .venv-vllm/.ready
	OMP_NUM_THREADS=2 .venv-vllm/bin/python -m pytest tests/engines --confcutdir tests/engines --override-ini addopts=--import-mode=importlib

test-engines-sglang: .venv-sglang/.ready
	OMP_NUM_THREADS=2 .venv-sglang/bin/python -m pytest tests/engines_sglang --confcutdir tests/engines_sglang --override-ini addopts=--import-mode=importlib

bench: .venv/.dev
	OMP_NUM_THREADS=2 .venv/bin/python -m pytest bench --benchmark-enable --benchmark-only -s

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/.docs
	.venv/bin/python docs/draw.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

tables: .venv/.dev .venv-ascend/.ready
	.venv/bin/python -m mla_kernels.autotune tables

wheel: .venv/.dev
	.venv/bin/python -m pip wheel --no-deps --wheel-dir dist .

.venv/.created:
	$(PYTHON) -m venv .venv
	touch $@

.venv/.demo: .venv/.created pyproject.toml constraints.txt
	.venv/bin/python $(PIP) --editable ".[transformers]"
	touch $@

.venv/.dev: .venv/.created pyproject.toml constraints.txt
	.venv/bin/python $(PIP) --editable ".[dev,transformers]"
	touch $@

.venv/.docs: .venv/.created pyproject.toml constraints.txt
	.venv/bin/python $(PIP) --editable ".[docs]"
	touch $@

# $(call environment,FOLDER,VERSIONS): a virtual environment of the first Python of these versions that is found; where none
# is, uv brings the first of them.
define environment
@python=$$(for p in $(PYTHON) $(foreach version,$(2),python$(version)); do \
    $$p -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(2)".split())' 2>/dev/null && echo $$p && break; \
    done); \
if [ -n "$$python" ]; then $$python -m venv $(1); \
else .venv/bin/python $(PIP) uv && .venv/bin/uv venv --seed --python $(firstword $(2)) $(1); fi
endef

# triton-ascend's package is called triton, too: hence an environment of its own. Its wheels are for these Pythons.
.venv-ascend/.ready: constraints.txt .venv/.created
	$(call environment,.venv-ascend,3.11 3.10 3.9)
	.venv-ascend/bin/python $(PIP) triton-ascend ascendnpu-ir numpy pybind11
	touch $@

.venv-vllm/.ready: pyproject.toml .venv/.created
	$(call environment,.venv-vllm,3.11 3.12 3.10)
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check pytest pytest-timeout --editable ".[vllm]"
	touch $@

.venv-sglang/.ready: pyproject.toml .venv/.created
	$(call environment,.venv-sglang,3.11 3.12 3.10)
	.venv-sglang/bin/python -m pip install --quiet --disable-pip-version-check pytest pytest-timeout --editable ".[sglang]"
	touch $@

$(VERSIONS:%=.venv-%/.ready): .venv-%/.ready: tests/versions/%.txt pyproject.toml .venv/.created
	$(call environment,.venv-$*,$(PYTHONS_$*))
	.venv-$*/bin/python $(PIP:constraints.txt=$<) --editable ".[dev,transformers]"
	touch $@

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .ruff_cache .benchmarks
