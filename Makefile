# One Python environment in .venv; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
export PYTHONDONTWRITEBYTECODE := 1
# The three parts of the tests run side by side, each on one thread: servers and killed clients are waited for a lot.
MARKS := -m "not slow and not chaos"
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: install demo test test-all chaos test-training test-export test-serving test-runtimes test-lowest wheels check docs format benchmarks clean

install: $(VENV)/.installed  ## everything the project needs, system packages included

$(VENV)/.installed: pyproject.toml constraints.txt deploy/system-packages.sh
	bash deploy/system-packages.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## the whole line on the built-in world: synthesize, train, pack, serve, classify
	$(BIN)/python examples/demo.py --out runs/demo

test: install check  ## everything that runs in a quarter of an hour on two cores
	$(MAKE) --jobs 3 --output-sync=target --no-print-directory test-training test-export test-serving

test-all: install check  ## with the tests that take minutes each
	$(MAKE) --jobs 3 --output-sync=target --no-print-directory test-training test-export test-serving MARKS='-m "not chaos"'

test-runtimes: install  ## every graph in the oldest and the newest ONNX Runtime and OpenVINO, in environments of their own
	$(BIN)/python -m benchmarks.runtimes --out runs/runtimes

chaos: install  ## clients and servers killed, hung and broken in mid-job, at random moments
	$(PYTEST) -m chaos tests/serving

test-training:
	$(PYTEST) $(MARKS) tests/training

test-export:
	$(PYTEST) $(MARKS) tests/export

test-serving:
	$(PYTEST) $(MARKS) --ignore tests/training --ignore tests/export tests

test-lowest:  ## the client's and export's tests with the lowest versions that pyproject.toml allows, whose warnings are no errors
	bash deploy/system-packages.sh $(PYTHON)
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python deploy/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/lowest.txt \
		--editable '.[export,vocab,openvino,telemetry,turbo]' hatchling opentelemetry-sdk pytest pytest-timeout
	CLIPSHIP_CACHE=$(CURDIR)/$(LOWEST)/cache OMP_NUM_THREADS=1 \
		$(LOWEST)/bin/python -m pytest $(MARKS) -W default --ignore tests/training --ignore tests/test_readme.py tests

wheels: install  ## clipship and its built-in models, into dist
	$(BIN)/python -m hatchling build --target wheel --directory $(CURDIR)/dist
	cd deploy/models && $(CURDIR)/$(BIN)/python -m hatchling build --target wheel --directory $(CURDIR)/dist

check: install  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install  ## the documentation site in build/site; warnings are errors, the network is not used
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "read it: $(BIN)/python -m http.server --directory build/site 8080"

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmarks: install  ## the figures of the docs
	$(BIN)/python benchmarks/accuracy.py --out runs/accuracy --jobs 2
	$(BIN)/python -m benchmarks.synthetic --out runs/synthetic --jobs 2
	$(BIN)/python benchmarks/generation.py --out runs/generation
	$(BIN)/python benchmarks/memory.py --out runs/memory
	$(BIN)/python benchmarks/feature_cache.py --out runs/feature-cache
	$(BIN)/python benchmarks/encoder.py --out runs/encoder
	$(BIN)/python benchmarks/precision.py clipship-tiny
	$(BIN)/python benchmarks/vocabulary.py --out runs/vocabulary
	$(BIN)/python benchmarks/engines.py --out runs/engines
	$(BIN)/python benchmarks/decoding.py --out runs/decoding
	$(BIN)/python -m benchmarks.serving --out runs/serving
	$(BIN)/python -m benchmarks.storm --out runs/storm

clean:
	rm -rf $(VENV) $(LOWEST) runs dist build .mypy_cache .ruff_cache .pytest_cache
