# SomaStack's commands. `make help` lists them; every one sets up what it needs first.
# Needs Python 3.11 or newer and make; with Go, a further test runs (make tools). Another interpreter: make setup PYTHON=/path/to/python3

SHELL := /bin/sh
.DEFAULT_GOAL := help
.SUFFIXES:

HOME_DIR ?= .somastack
ARGS ?=
RUN := .venv/bin/python
GATES := $(RUN) -m tools.gates
SHELL_PATH := $(PATH)
# buf finds its plugins, and bin/protoc its Python, on the path.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

##@ Run

# With the path of the shell that called make: the commands that `up` prints are to be pasted there.
up down: export PATH := $(SHELL_PATH)

.PHONY: up
up: setup ## Start the whole stack, play a demo conversation, keep serving (HOME_DIR=.somastack)
	.venv/bin/somastack up --home $(HOME_DIR) --demo $(ARGS)

.PHONY: down
down: setup ## Stop the stack that `make up` started
	.venv/bin/somastack down --home $(HOME_DIR) $(ARGS)

##@ Check

.PHONY: test
test: setup tools-if-possible ## Every gate, then every test level; one summary at the end (FAIL_FAST=1 stops at the first failure)
	$(GATES) all

.PHONY: lint
lint: setup ## ruff, import contracts, buf lint, format and breaking
	$(GATES) lint

.PHONY: types
types: setup ## mypy --strict
	$(GATES) types

.PHONY: proto-check
proto-check: setup ## Fail when gen/ is not what proto/ generates
	$(GATES) proto-check

.PHONY: model
model: setup ## Check the turn protocol's model over its interleavings (quick bounds)
	$(GATES) model

LEVELS := unit contract integration e2e chaos upgrade
.PHONY: $(LEVELS)
unit: ## One level of tests; also contract, integration, e2e, chaos, upgrade (ARGS="-k name" goes to pytest)
integration: tools-if-possible
$(LEVELS): setup
	$(GATES) $@ -- $(ARGS)

.PHONY: bench
bench: setup ## Measure: throughput, latency, CPU, memory, recovery, beside the machine's limits (ARGS=--quick: two minutes)
	GRPC_ENABLE_FORK_SUPPORT=0 $(RUN) -m tests.bench $(ARGS)

.PHONY: bench-peers
bench-peers: setup ## The same turn on Restate, DBOS and two FastAPI apps beside ours (.peers holds them; ARGS=--quick)
	GRPC_ENABLE_FORK_SUPPORT=0 $(RUN) -m tests.peers $(ARGS)

.PHONY: soak
soak: setup ## The longer chaos tests, then hours of seeded random faults under load, invariants checked (ARGS="--minutes 60 --replay SEED")
	$(RUN) -m pytest tests/chaos -m soak
	$(RUN) -m tests.chaos.soak $(ARGS)

.PHONY: soak-guards
soak-guards: setup ## Take each guard of the turn protocol away: the soak must notice (long; ARGS="--only tombstone")
	$(RUN) -m tests.chaos.soak_guards $(ARGS)

##@ Change

.PHONY: proto
proto: setup ## Format proto/, generate gen/ and the API reference from it
	buf format -w proto
	buf generate
	$(RUN) -m tools.api_reference

.PHONY: settings-page
settings-page: setup ## Write docs/reference/settings.md from the services' settings classes
	$(RUN) -m tools.settings_reference

.PHONY: fmt
fmt: setup ## Format Python and proto files
	ruff check --fix-only --quiet .
	ruff format .
	buf format -w proto

.PHONY: lock
lock: ## Renew requirements/*.lock from pyproject.toml (ARGS=--upgrade takes the newest versions)
	@test -x .venv/bin/uv || bin/setup # not always: the old lock may lack what pyproject.toml names now
	$(RUN) -m tools.lock $(ARGS)
	@bin/setup

##@ Environment

.PHONY: setup
setup: ## Make or renew .venv from the hash-pinned lock; nothing when it is up to date
	@bin/setup

.PHONY: tools
tools: ## Install into .tools what only some tests need: h2spec, built from pinned sources (needs Go 1.18 or newer)
	@bin/tools

.PHONY: tools-if-possible
tools-if-possible:
	@bin/tools --if-possible

.PHONY: clean
clean: ## Remove caches and reports
	rm -rf .reports .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* dist
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: clean-venv
clean-venv: ## Remove .venv (the next command makes it again)
	rm -rf .venv

.PHONY: help
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z][a-z0-9 -]*:.*## / { printf "  %-18s %s\n", "make " $$1, $$2 }' $(MAKEFILE_LIST)
