# Works with make 3.81 and /bin/sh (stock macOS). `make run` and `make test` need nothing but Python >= 3.10.
#   make run PROMPT="..."     continue a prompt            make serve            HTTP server and web page
#   make test                 the tests                    make check            tests, linters, types
#   make test-fast            those without torch, servers and the real model, in a minute
#   make test-clients         other people's clients against the server (they are installed for it, 700 MB)
#   make test-gpu-policy      all that computes with a model, as a GPU would be told to
#   make bench                speed measurements           make acceptance       the full counts, with a report
#   make docs                 the pages that are generated        make site            all pages as a site
#   make mutants              faults planted one by one, and which of them no test notices

SHELL = /bin/sh
VENV = .venv
BIN = $(VENV)/bin
WEB = tempo_mlx/server/web
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS =
PROMPT = Deep in the forest, a mysterious creature
# Taken as it stands, so that quotes, apostrophes and dollar signs arrive: the shell reads it from the environment.
RUN_PROMPT := $(value PROMPT)
export RUN_PROMPT
# Idle OpenMP threads sleep instead of spinning on the cores that others need.
OMP_WAIT_POLICY = PASSIVE
export OMP_WAIT_POLICY

.PHONY: run test test-fast test-gpu-policy test-clients test-web check acceptance mutants bench serve web web-dev screenshots recording lint types format docs site clean

run: $(VENV)/.run
	@$(BIN)/tempo-mlx generate $(ARGS) -- "$$RUN_PROMPT"

# Two processes, each with whole files, since the tests of one share models and servers; then, alone, what is timed
# (5: ARGS chose none of it).
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)
	$(BIN)/python -m pytest -m alone $(ARGS) || [ $$? -eq 5 ]

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest --fast -n 2 --dist loadfile -rfE $(ARGS)

check: lint types test

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.run
	$(BIN)/python scripts/write_settings_docs.py
	$(BIN)/python scripts/write_keywords.py
	$(BIN)/python scripts/write_models_docs.py
	$(BIN)/python scripts/write_run_docs.py
	$(BIN)/python scripts/write_cli_docs.py
	$(BIN)/python scripts/write_api_docs.py

site: $(VENV)/.site
	$(BIN)/python scripts/site.py

acceptance: $(VENV)/.dev
	$(BIN)/python -m benchmarks.acceptance $(ARGS)

mutants: $(VENV)/.dev
	$(BIN)/python scripts/mutants.py $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/tempo-mlx bench $(ARGS)

serve: $(VENV)/.server
	$(BIN)/tempo-mlx serve $(ARGS)

web: $(WEB)/node_modules/.installed
	cd $(WEB) && npm run build

web-dev: $(WEB)/node_modules/.installed
	cd $(WEB) && npm run dev

# With the dtypes, packed weights and operations of a GPU, computed on the CPU. What is left out: tests/gpu_policy.py.
test-gpu-policy: $(VENV)/.dev
	$(BIN)/python -m pytest --gpu-policy -n 2 --dist loadfile -rfE $(ARGS)

# Clients that do not go into one environment, or are too large for everyone.
test-clients: $(VENV)/.dev $(VENV)/clients/openai-2/.installed $(VENV)/clients/openai-3/.installed
	$(BIN)/python -m pytest -rfEs tests/test_other_clients.py $(ARGS)

$(VENV)/clients/%/.installed: tests/clients/%.txt
	@echo "Installing clients of $< into $(@D) ..." >&2
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r $<
	@touch $@

test-web: $(WEB)/node_modules/.installed $(VENV)/.server
	scripts/test-web.sh

screenshots: $(WEB)/node_modules/.installed $(VENV)/.server
	node scripts/screenshots.mjs

recording: $(WEB)/node_modules/.installed $(VENV)/.dev
	node scripts/recording.mjs

clean:
	rm -rf $(VENV) $(WEB)/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@python=`scripts/find-python.sh` && "$$python" -m venv $(VENV)

$(VENV)/.run: pyproject.toml $(BIN)/python
	@echo "Installing tempo-mlx into $(VENV) (the first time takes a minute or two) ..." >&2
	@$(PIP) -e .
	@touch $@

$(VENV)/.server: pyproject.toml $(BIN)/python
	@echo "Installing tempo-mlx and its server into $(VENV) ..." >&2
	@$(PIP) -e '.[server]'
	@touch $@ $(VENV)/.run

$(VENV)/.site: pyproject.toml $(BIN)/python
	@echo "Installing tempo-mlx and what builds its site into $(VENV) ..." >&2
	@$(PIP) -e '.[site]'
	@touch $@ $(VENV)/.run

$(VENV)/.dev: pyproject.toml $(BIN)/python
	@echo "Installing tempo-mlx and what its tests need into $(VENV) (the first time takes some minutes) ..." >&2
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.server $(VENV)/.site $(VENV)/.run

$(WEB)/node_modules/.installed: $(WEB)/package-lock.json
	@command -v npm >/dev/null || { echo "npm was not found; install Node.js 20 or newer and try again." >&2; exit 1; }
	cd $(WEB) && npm ci --no-audit --no-fund
	@touch $@
