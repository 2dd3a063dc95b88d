# make quickstart   set everything up, then run the whole path on the built-in task
# make test         set everything up, then run the tests
# make lint         ruff and pyright
# make lock         solve the dependencies again (needs uv)
# make clean        remove the environments and caches (runs stay)

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: quickstart test lint lock install clean

quickstart: install
	$(BIN)/python -m rlhf_jax run experiments/quickstart.py $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright

install: $(STAMP)

# Done once, and again when the lock changes. A machine without ensurepip (Debian) lends its own pip.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "rlhf_jax needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	@if command -v uv >/dev/null; then set -ex; \
		$(BIN)/python -c '' 2>/dev/null || uv venv --quiet --clear --python "$(PYTHON)" $(VENV); \
		uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
		uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else set -ex; \
		$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear --without-pip $(VENV); \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-deps --require-hashes -r requirements.lock; \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

lock:
	uv pip compile --quiet --universal --python-version 3.11 --fork-strategy requires-python --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links --upgrade --extra dev pyproject.toml -o requirements.lock
	@! grep -n '://' requirements.lock

clean:
	rm -rf .venv .venv-newest build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
