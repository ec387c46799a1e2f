# make quickstart: train a small model and reconstruct two images, on a fresh machine.
# make test: what to run before a commit, in under six minutes on two cores.
# make docs: the documentation site, in site/.
# make lint, make docs, make test-all: as CI runs them; test-all adds the tests marked slow.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart

.PHONY: quickstart test test-all lint docs format clean

# one stamp for each set of extras, so that a target installs what it needs and no more
$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

quickstart: $(VENV)/installed-demo
	@echo "Trains a small model; after ten steps the log says how long this takes here."
	$(BIN)/kl-vae train quickstart --run-dir $(RUN)
	$(BIN)/kl-vae reconstruct --checkpoint $(RUN) --out $(RUN)/reconstructions \
	    --images package:skimage/data --include chelsea.png coffee.png --resize 128
	@echo "Input, reconstruction and difference: $(RUN)/reconstructions/comparison.png"
	@echo "Gallery, in a browser: $(RUN)/reconstructions/index.html"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell -D- -D docs/development/words.txt README.md CONTRIBUTING.md docs scripts \
	    benchmarks kl_vae --skip '*.ipynb,*.js,*.css,*.html,docs/development/style.md,docs/development/words.txt'

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
