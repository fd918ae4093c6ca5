# make demo: install and run the main job.  make test: install the test tools and both toolchains, run the suite.
# make tables: choose the tiles that ship.
PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST_WORKERS ?= 2
.PHONY: demo test test-slow bench lint tables wheel clean

demo: .venv/.demo
	.venv/bin/python -m mla_kernels demo

test: .venv/.dev .venv-ascend/.ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n $(PYTEST_WORKERS) --dist worksteal

test-slow: .venv/.dev .venv-ascend/.ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests -n $(PYTEST_WORKERS) --dist worksteal --slow --timeout 3600

bench: .venv/.dev
	OMP_NUM_THREADS=2 .venv/bin/python -m pytest bench --benchmark-enable --benchmark-only -s

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

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

# triton-ascend's package is called triton, too: hence an environment of its own. Its wheels are for Python 3.9 to 3.11;
# where only a newer Python is found, uv brings one.
.venv-ascend/.ready: constraints.txt .venv/.created
	@python=$$(for p in $(PYTHON) python3.11 python3.10 python3.9; do \
	    $$p -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done); \
	if [ -n "$$python" ]; then $$python -m venv .venv-ascend; \
	else .venv/bin/python $(PIP) uv && .venv/bin/uv venv --seed --python 3.11 .venv-ascend; fi
	.venv-ascend/bin/python $(PIP) triton-ascend ascendnpu-ir numpy pybind11
	touch $@

clean:
	rm -rf .venv .venv-ascend build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
