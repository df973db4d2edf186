# Two commands on a fresh machine: `make demo` and `make test`. Everything runs in .venv, installed with constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUTPUT ?= demo
SEED ?= 0

.PHONY: demo deepspeed test quality style docs clean

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")' && \
		$(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# What the demo does not need and would import, such as torchao
$(VENV)/developer: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,quality]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/vidtrl demo --output $(OUTPUT) --seed $(SEED)

# Beside the environment, not in it: accelerate and transformers import DeepSpeed wherever they find it, which takes seconds.
$(VENV)/deepspeed/installed: $(VENV)/developer
	rm -rf $(VENV)/deepspeed
	$(BIN)/python -m pip install --quiet 'setuptools>=77'
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --no-build-isolation \
		--target $(VENV)/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

deepspeed: $(VENV)/deepspeed/installed

test: $(VENV)/developer
	@$(MAKE) --no-print-directory deepspeed || { rm -rf $(VENV)/deepspeed; \
		echo "*** DeepSpeed could not be installed, for the reason above: its tests (tests/test_zero*.py) are skipped ***"; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadfile

quality: $(VENV)/developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/developer
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/developer
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site
