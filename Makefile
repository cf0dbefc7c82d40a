# make quickstart   an environment, then an adapter trained offline on the built-in corpus
# make test         an environment, then the tests
# make test-oldest  unit and invariant tests with everything that the package needs at its floor in pyproject.toml
# make test-newest  the same tests with the newest releases; in both, torch is that of constraints.txt
# make lint         style, format and types
# make bench        the benchmarks that a CPU can run, twenty minutes, into benchmarks/results and docs/speed.md
#                   (TOKMASK_DATA for real texts)
# make gpu-pack     .gpu/, what a GPU machine without a network needs to run `bash .gpu/measure.sh` (TOKMASK_TOKENIZERS)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_NAME ?= $(if $(wildcard runs/quickstart),quickstart-$(shell date +%Y%m%d-%H%M%S),quickstart)

.PHONY: quickstart test test-oldest test-newest lint format bench gpu-pack clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quickstart]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.quickstart

quickstart: $(VENV)/.quickstart
	$(BIN)/tokmask train recipes/quickstart.yaml name=$(RUN_NAME)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Both build on the environment of the tests: what they install comes before what is there.
FOLDER = "import sysconfig; print(sysconfig.get_path('purelib'))"
OTHER_PACKAGES ?= $$($(PYTHON) .ci/floors.py | sed 's/==.*//')
OTHER_TESTS ?= tests/unit tests/invariant
test-oldest: PINS = $(PYTHON) .ci/floors.py
test-newest: PINS = grep ^torch== constraints.txt
test-oldest test-newest: $(VENV)/.dev
	$(PYTHON) -m venv $(VENV)/$@
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(FOLDER))')" \
		> $$($(VENV)/$@/bin/python -c $(FOLDER))/tests.pth
	$(PINS) > $(VENV)/$@/pins.txt
	$(VENV)/$@/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-c $(VENV)/$@/pins.txt $(OTHER_PACKAGES)
	OMP_NUM_THREADS=1 $(VENV)/$@/bin/python -m pytest -n 2 --dist worksteal $(OTHER_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	for name in default_run padding_free masking qlora predict; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/studies/page.py

gpu-pack: $(VENV)/.dev
	PYTHON=$(BIN)/python bash benchmarks/gpu/pack.sh

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
