# Two commands: `make demo` runs the main job end to end, `make test` lints, type-checks and tests. Both set up their own environment.
PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
RUN_DIR ?= demo_run
export MUJOCO_GL ?= egl
ifdef TORCH_INDEX
export TORCH_INDEX
endif

.PHONY: setup demo test lint types unit test-slow test-other docs mutants mutants-tool bench fuzz soak lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: $(PYTHON) not found; install Python 3.11 or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# First, so that the next line finds a torch that fits: a CPU build where there is no NVIDIA GPU. TORCH_INDEX=URL sets the index.
	$(BIN)/python tools/install_torch.py $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/localmotion demo --run $(RUN_DIR) $(if $(VIDEOS),--videos "$(VIDEOS)") $(if $(SEED),--seed $(SEED))

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

# What takes minutes, and the property tests on many new examples.
test-slow: setup
	$(BIN)/python -m pytest -n 2 -m "slow or hypothesis" --hypothesis-profile long

# What depends most on the versions of Python and of the packages, on another Python in an environment of its own:
# make test-other PYTHON=python3.12 VENV=.venv312
OTHER := $(addprefix tests/test_,video_*.py hostile_video.py extract_*.py files*.py config.py perception*.py envs_toy.py replay.py runs.py)
test-other: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(wildcard $(OTHER))

# Wrong edits that the tests must notice, within an hour on two cores: tests/README.md. MUTANTS="--only PATTERN -j 4" for some.
mutants: setup
	$(BIN)/python tools/mutants.py $(MUTANTS)

# Every small edit that mutmut can think of in models/, replay.py, statistics and probes: hours. TOOL="'*7'" tries every tenth of them,
# TOOL="'localmotion.replay*'" those of one module. An interrupted run goes on; what survived is listed at the end.
mutants-tool: setup
	$(BIN)/python -m pip install --quiet -e ".[mutation]"
	$(BIN)/mutmut run --max-children 2 $(TOOL)
	$(BIN)/mutmut results

# The documentation site, in an environment of its own that has neither torch nor the package: site/index.html.
DOCS_VENV ?= .venv-docs
docs: $(DOCS_VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/.ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: $(PYTHON) not found; install Python 3.11 or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS_VENV)/bin/python -m pip install --quiet --group docs
	touch $@

# R2DREAMER=PATH to a checkout of NM512/r2dreamer, DREAMERV3=PATH to one of danijar/dreamerv3, to be timed beside DreamerV3.
bench: setup
	$(BIN)/python -m benchmarks $(if $(R2DREAMER),--r2dreamer "$(R2DREAMER)") $(if $(DREAMERV3),--dreamerv3 "$(DREAMERV3)")

# 10,000 hostile videos through scan and extract. FUZZ="--files 500" for fewer; VIDEOS=FOLDER to make them of real clips.
FUZZ_DIR ?= runs/fuzz
fuzz: setup
	$(BIN)/python -m soak.fuzz_video --out $(FUZZ_DIR) $(if $(VIDEOS),--videos "$(VIDEOS)") $(FUZZ)

# Kills at random moments, a replay of a million records, two hours of flat memory. HOURS=0.2 for a shorter look.
SOAK_DIR ?= runs/soak
HOURS ?= 2
soak: setup
	$(BIN)/python -m soak.kills --out $(SOAK_DIR)
	$(BIN)/python -m soak.replay --out $(SOAK_DIR)
	$(BIN)/python -m soak.memory --hours $(HOURS) --out $(SOAK_DIR)

# One version of each package for development, as constraints: PIP_CONSTRAINT=requirements-dev.lock make setup
lock: setup
	$(BIN)/python -m pip install --quiet uv
	echo "torch==$(TORCH)" | $(BIN)/uv pip compile --quiet --no-config --no-annotate --no-header --upgrade --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --extra dev -c - -o requirements-dev.lock pyproject.toml

clean:
	rm -rf mutants site $(VENV) $(DOCS_VENV) .venv312 $(RUN_DIR) $(FUZZ_DIR) $(SOAK_DIR)
