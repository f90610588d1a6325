# make demo     everything set up in .venv, then the main job on handwritten digits
# make photos   the same on photographs; downloads ImageNet's weights
# make test     the quick tests; they need neither root nor Chromium nor PostgreSQL
# make check    lint and all tests but the long ones, as CI runs them
# make oldest   the quick tests with the oldest packages that requirements.txt allows
# make long     the long tests: the soak, hundreds of kills, the full demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
export OMP_WAIT_POLICY ?= passive

.PHONY: demo photos test check oldest long lint bench bench-quick clean

$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || { \
	  echo "This Python has no ensurepip, so it can't make a virtual environment."; \
	  echo "Use the pip lines of README.md instead, or install your system's python3-venv."; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m finetune demo

photos: $(VENV)/.installed
	$(BIN)/python -m finetune demo --photos

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and not long"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -n 4 --dist worksteal --durations=20 --reruns 1

oldest: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(OLDEST)
	sed 's/>=/==/' requirements.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install -q -r requirements-dev.txt -c $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pytest -n 3 --dist worksteal -m "not slow and not long"

long: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.installed
	$(BIN)/python -m benchmarks --quick

clean:
	rm -rf $(VENV) .cache demo
