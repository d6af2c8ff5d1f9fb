# Each target does everything that it needs from a clean clone with python3 and make; the second run is quick.
PYTHON ?= python3
.PHONY: demo test lint

demo: .venv/core.installed
	.venv/bin/minmo talk minmo/assets/question.wav -o reply.wav

# One thread a process and a process a core: the tensors are small, so threads would only wait for each other.
test: .venv/dev.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: .venv/dev.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/core.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/dev.installed: .venv/core.installed
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	.venv/bin/python -m pip install --quiet -c constraints.txt --no-deps s3tokenizer # why: pyproject.toml, dev
	touch $@
