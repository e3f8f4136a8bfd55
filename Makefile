# raydr: `make demo` runs the main job, `make test` the tests; each first makes .venv where it is missing.
# Presumes Python 3.11 or newer, make and a C++ compiler; .ci/setup names whatever else is missing.

PYTHON ?=
STACK ?= cpu
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.raydr-$(STACK)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-images test lint types contracts docs wheel audit clean

help:  ## this list
	@echo "raydr: dense retrieval on Ray. Targets (ARGS='...' is handed on, STACK=gpu installs the CUDA stack):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

setup: $(STAMP)  ## make .venv with everything installed (done by the other targets when needed)

# The stamp is written last, so an interrupted set-up is taken up again.
$(STAMP): pyproject.toml .ci/setup
	@sh .ci/setup $(STACK) $(PYTHON)
	@touch $@

demo: setup  ## embed, index, evaluate and serve the documentation of your Python packages (size=all: all of it)
	@$(BIN)/raydr demo $(if $(size),size=$(size)) $(ARGS)

demo-images: setup  ## draw pictures, train MM-Embed on them, evaluate and serve: search by words, by picture, by both
	@$(BIN)/raydr demo-images $(ARGS)

test: setup  ## run the tests, in two processes; ARGS="tests/index -k topk" selects, ARGS="-n 0 ..." runs in one
	@$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

lint: setup  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup  ## pyrefly
	@$(BIN)/pyrefly check

contracts: setup  ## import-linter: the layers of docs/architecture.md
	@$(BIN)/lint-imports

docs: $(STAMP)-docs  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs/mkdocs.yml

$(STAMP)-docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

wheel: setup  ## build the wheel into dist/
	@$(BIN)/python -m build --wheel

audit: $(STAMP)-docs  ## known vulnerabilities of the packages installed, where pypi.org or osv.dev can be asked
	@sh .ci/audit $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf .venv build dist site raydr.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
