# Everything a user or a developer types. `make` lists it.
#
# A fresh machine needs Python 3.11 to 3.13, git and make; the rest is fetched into .venv and the user's cache.
# Stamps in .venv remember what is installed; they grow old when pyproject.toml changes.

VENV = .venv
BIN = $(VENV)/bin
# Empty: the first suitable python3 on the PATH. Give one with `make setup PYTHON=/path/to/python3.12`.
PYTHON =

MODEL = seed-story-135m
RECIPE = int8
# Those that quality-peers compares.
RECIPES = $(RECIPE)
# Those of our bundles that bench-peers needs, and the peers to measure (by default all).
BASES = float32 int8 int4
PEERS =
OUT = build/story
# The float32 bundle that others are measured beside, and the bundles to measure (by default OUT).
FLOAT = build/float32
BUNDLES =

DATA = build/storybook
TRAINING = build/training
MINUTES = 60

IMAGE = demo_app/pictures/bear.jpg
PROMPT = Once upon a time,
SEED = 1
MAX_TOKENS = 200
PAGES = 100
TESTS = tests

# What a user types may hold spaces, quotes and dollars. So it isn't pasted into a shell line but handed over in
# the environment, unexpanded, and quoted there.
override IMAGE := $(value IMAGE)
override PROMPT := $(value PROMPT)
override OUT := $(value OUT)
override FLOAT := $(value FLOAT)
override BUNDLES := $(value BUNDLES)
override DATA := $(value DATA)
override TRAINING := $(value TRAINING)
export IMAGE PROMPT OUT FLOAT BUNDLES DATA TRAINING

PIP = $(BIN)/python -m pip --disable-pip-version-check
WORKSTATION = $(VENV)/.workstation-ready
TRAINTOOLS = $(VENV)/.train-ready
TESTTOOLS = $(VENV)/.test-ready
# The runtime's dependencies as files: a test installs the device wheel from them, without network.
WHEELS = $(VENV)/wheels
EXPORT = $(BIN)/python -m export --model $(MODEL) --recipe $(RECIPE) --out "$$OUT"

.PHONY: help setup export story storybook train rotation scales evaluate quality certify test test-slow check format wheel bench bench-peers quality-peers clean
.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.SUFFIXES:

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo 'Variables: MODEL=$(MODEL) RECIPE=$(RECIPE) OUT=build/story IMAGE=... PROMPT="..."'
	@echo '           SEED=$(SEED) MAX_TOKENS=$(MAX_TOKENS) PAGES=$(PAGES) TESTS=$(TESTS) PYTHON=python3.12'

setup: $(TESTTOOLS) ## Make .venv and fetch all that export, story and test need, weights included
	@echo "Weights of $(MODEL):"
	@$(BIN)/python -c 'import sys; from model.presets import get_preset as get; p = get(sys.argv[1]); p.fetch(); [print(" ", f.path) for f in p.files]' $(MODEL)

export: $(WORKSTATION) ## Export MODEL by RECIPE into the bundle OUT
	$(EXPORT)

story: $(WORKSTATION) ## Tell a story about IMAGE that begins with PROMPT (exports first if there is no bundle)
	@if [ ! -f "$$OUT/manifest.json" ]; then echo "No bundle at $$OUT yet: exporting $(MODEL), $(RECIPE)."; $(EXPORT); fi
	@printf 'Bundle:  %s\nPicture: %s\n\n' "$$OUT" "$$IMAGE"
	@$(BIN)/seed-story tell --bundle "$$OUT" --image "$$IMAGE" --prompt "$$PROMPT" --seed $(SEED) --max-tokens $(MAX_TOKENS)

storybook: $(TRAINTOOLS) ## Draw and tell the storybook data set into DATA (needs npm and apt-get)
	@if [ ! -d "$$DATA" ]; then $(BIN)/python -m training.storybook build --out "$$DATA"; fi

train: storybook ## Train MODEL on DATA for MINUTES into TRAINING; run it again after Ctrl-C and it goes on
	$(BIN)/python -m training.train --model $(MODEL) --data "$$DATA" --out "$$TRAINING" --minutes $(MINUTES)

rotation: storybook ## Learn what MODEL's rotated exports are turned by on DATA into build/rotation
	$(BIN)/python -m export.learn_rotation --model $(MODEL) --calibration "$$DATA"

scales: storybook ## Learn int4's scales on DATA into build/scales; run it again after Ctrl-C and it goes on
	$(BIN)/python -m export.learn_scales --model $(MODEL) --data "$$DATA"

evaluate: $(WORKSTATION) ## Does the bundle OUT tell about what is in the held-out pictures of DATA?
	$(BIN)/python -m training.evaluate grounding --bundle "$$OUT" --data "$$DATA"

quality: $(WORKSTATION) ## What do the bundles BUNDLES keep of the float32 model, and what do they cost?
	@if [ ! -f "$$OUT/manifest.json" ]; then $(EXPORT); fi
	@if [ ! -f "$$FLOAT/manifest.json" ]; then $(BIN)/python -m export --model $(MODEL) --recipe float32 --out "$$FLOAT"; fi
	@$(BIN)/python -m quantization report $${BUNDLES:-"$$OUT"} --reference "$$FLOAT" --data "$$DATA" --plot "$$OUT-quality.png" --json

certify: $(WORKSTATION) ## Prove that page PAGES of a story costs what page 5 does (exports first if there is no bundle)
	@if [ ! -f "$$OUT/manifest.json" ]; then echo "No bundle at $$OUT yet: exporting $(MODEL), $(RECIPE)."; $(EXPORT); fi
	@$(BIN)/seed-story certify "$$OUT" --pages $(PAGES) --plot "$$OUT-certificate.png"

test: setup ## Run the tests, but the slow ones and those that need a network (TESTS=path for some)
	$(BIN)/python -m pytest -m "not slow and not network" $(TESTS)

test-slow: setup ## Run the slow tests and those that need a network
	$(BIN)/python -m pytest -m "slow or network" $(TESTS)

check: $(TESTTOOLS) ## Lint, format check, types
	@failed=0; \
	for command in "ruff check ." "ruff format --check ." mypy; do \
	  echo "$$command"; $(BIN)/$$command || failed=1; \
	done; exit $$failed

format: $(TESTTOOLS) ## Format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(TESTTOOLS) ## Build the device wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

bench: $(WORKSTATION) ## This project's own speed and memory, part by part (exports first if there is no bundle)
	@if [ ! -f "$$OUT/manifest.json" ]; then $(EXPORT); fi
	@$(BIN)/python -m benchmarks.bench --bundle "$$OUT"

# Peers get the files as they are downloaded, so ours are made of them without what training added. int4's scales were
# learned from stories: on the gate's text of another kind it misses its bound of perplexity, and is written marked.
build/base-%/manifest.json: | $(WORKSTATION)
	$(BIN)/python -m export --model $(MODEL) --checkpoint none --recipe $* --force --out build/base-$*

# Each peer is installed into a venv under build/peers; one that can't be is named in the table.
bench-peers: $(WORKSTATION) $(BASES:%=build/base-%/manifest.json) ## Speed beside other engines on the same weights, in one interleaved run (PEERS=... for some)
	$(BIN)/python -m benchmarks.peers $(if $(PEERS),--only $(PEERS))

quality-peers: $(WORKSTATION) $(RECIPES:%=build/base-%/manifest.json) build/base-float32/manifest.json ## What quantization costs beside llama.cpp's, on the same weights and text
	$(BIN)/python -m benchmarks.quality_peers $(RECIPES:%=build/base-%) --reference build/base-float32 --data "$$DATA"

clean: ## Remove the bundle OUT and what else was built; the data set, trainings, .venv and the weights stay
	rm -rf "$$OUT" dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# TensorFlow has no wheels for Python 3.14 yet; the device wheel itself doesn't mind.
FITS = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

$(WORKSTATION): pyproject.toml
	@set -e; found=; if ! $(PIP) --version >/dev/null 2>&1; then \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if "$$python" -c '$(FITS)' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "setup: no suitable Python; tried $(or $(PYTHON),python3 python3.13 python3.12 python3.11)." >&2; \
	    echo "Needed: Python 3.11 to 3.13 with venv (on Debian and Ubuntu: apt install python3-venv)." >&2; \
	    echo "Got: $$(python3 --version 2>&1). Give another one with: make setup PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$found ($$("$$found" --version))"; \
	  "$$found" -m venv $(VENV); \
	fi
	@echo "Installing the export tools (TensorFlow among them, about 700 MB) into $(VENV)"
	$(PIP) install --editable '.[export]'
	@touch $@

$(TRAINTOOLS): $(WORKSTATION)
	@echo "Installing the training tools into $(VENV)"
	$(PIP) install --editable '.[export,train]'
	@touch $@

$(TESTTOOLS): $(WORKSTATION)
	@echo "Installing the test tools (PyTorch and transformers among them) into $(VENV)"
	$(PIP) install --editable '.[export,test]'
	@mkdir -p $(WHEELS)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > $(WHEELS)/requirements.txt
	$(PIP) download --quiet --only-binary=:all: --dest $(WHEELS) --requirement $(WHEELS)/requirements.txt
	@touch $@
