PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLING := $(VENV)/.installing

.PHONY: demo test quality format

demo: $(INSTALLED)
	$(BIN)/python examples/tofu.py --output_dir outputs/demo --overwrite_output_dir

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# An installation that was cut short leaves its mark behind, and the next one starts from nothing.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed; $(PYTHON) is not. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if [ -e $(INSTALLING) ] || ! $(BIN)/python -c '' 2>/dev/null; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(INSTALLING) && rm -f $@
	@[ -e $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,quality,plot]'
	@mv $(INSTALLING) $@ && touch $@
