# Two commands: `make train METHOD=lcm` and `make test`. Each builds .venv from requirements.lock first.
SHELL  := /bin/bash
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
METHOD ?= lcm
STUDY  ?= loec
ARGS   ?=
DATA   ?=
BACKBONES ?= miniature

# the system's certificates, so that set-up works behind a company's proxy (both names: uv renamed it)
export UV_SYSTEM_CERTS := 1
export UV_NATIVE_TLS   := 1
# waiting threads that spin slow each other down many times over when other work shares the cores
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup train test browser study figures real-study real-figures own-images export clean-notebooks lock wheel campaign fuzz fuzz-deep check-setup
setup: $(VENV)/.ready
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (about a minute the first time)"
	@$(BIN)/python -m pip install -q uv
	@$(BIN)/uv pip install -q --python $(BIN)/python -r requirements.lock || $(BIN)/python -m pip install -q -r requirements.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

train: setup
	@mkdir -p runs
	PATH="$(CURDIR)/$(BIN):$$PATH" papermill nbs/train.ipynb "runs/train-$(METHOD).ipynb" -p method "$(METHOD)" $(ARGS) --log-output --no-progress-bar

# the explorer is tested in a real browser, Debian's; without it that one test is skipped
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing chromium for the browser test" \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || echo "no chromium here, and no way to install it"

test: setup browser
	source $(BIN)/activate && nbdev_export && git diff --exit-code -- cdfss && lint-imports && OMP_NUM_THREADS=1 nbdev_test --n_workers 2 && OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile

export: setup
	$(BIN)/nbdev_export

clean-notebooks: setup
	$(BIN)/nbdev_clean

lock:
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 -o requirements.lock --no-header --no-annotate -q

wheel: setup
	$(BIN)/python -m build --wheel

# the grid of runs on the miniature behind the figures, and the diagnostics of each: STUDY=loec, variants, lfm, hsl or ifa; resumable
study: setup
	@mkdir -p runs
	PATH="$(CURDIR)/$(BIN):$$PATH" papermill nbs/study.ipynb "runs/study-$(STUDY).ipynb" -p study "$(STUDY)" $(ARGS) --log-output --no-progress-bar

# figures/ and the verdicts on the papers' claims, from the study's records alone
figures: setup
	@mkdir -p runs
	PATH="$(CURDIR)/$(BIN):$$PATH" papermill nbs/figures.ipynb runs/figures.ipynb $(ARGS) --log-output --no-progress-bar

# the papers' claims on the real images below DATA, resumable: ARGS="-p setting full -p minutes 9" (smoke, reduced, full); REAL is the folder of its runs
REAL ?= runs/real
real-study: setup
	@mkdir -p "$(REAL)"
	PATH="$(CURDIR)/$(BIN):$$PATH" papermill nbs/real.ipynb "$(REAL)/real.ipynb" -p data "$(DATA)" -p runs "$(REAL)" $(ARGS) --log-output --no-progress-bar

# figures/real/ with its reading page (from README.md.in) and the table of verdicts, from the records of what is finished
real-figures: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" papermill nbs/claims.ipynb "$(REAL)/claims.ipynb" -p runs "$(REAL)" $(ARGS) --log-output --no-progress-bar

# how well one's own images are segmented, on the data sets below DATA: figures/own_images.csv; BACKBONES="miniature; resnet18 weights=FILE size=320"
own-images: setup
	$(BIN)/python -c "import sys; from cdfss.use.trial import TrialOptions, try_out; try_out(TrialOptions(data_root=sys.argv[1] or None, backbones=sys.argv[2]))" "$(DATA)" "$(BACKBONES)"

# tiny runs killed, starved of disk, damaged and doubled at random moments; each has to end as the undisturbed one did: ARGS="--trials 300 --seed 0"
campaign: setup
	PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(BIN)/python tests/campaign.py $(ARGS)

# the readers, the guard of parameters and the loaders on random and damaged input: ARGS is the number of examples a test
fuzz: setup
	CDFSS_FUZZ=$(or $(ARGS),500) OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_fuzz.py

# the readers of bytes, coverage-guided; needs atheris (pip install atheris), which is no part of the set-up: ARGS="--seconds 300 torch mask"
fuzz-deep: setup
	PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_atheris.py $(ARGS)

# README's two commands in a fresh clone and an empty environment, and what they print; ARGS="--only train" for the first
check-setup:
	$(PYTHON) tests/setup_check.py $(ARGS)
