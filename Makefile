# Every target that needs packages makes its own .venv; `make gpu` alone uses the Python it finds.
# With the root on sys.path our folders would be importable as `eval`, `video` and `triton_kernels`: keep it off.
export PYTHONSAFEPATH := 1

PYTHON ?= python3
BIN    := .venv/bin
CORE   := .venv/.core-installed
DEV    := .venv/.dev-installed
FLOOR  := .floor/.installed
LMMS   := .lmms/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

# Two workers of one thread each; a bigger machine may say `make test WORKERS=8`.
WORKERS ?= 2
OUT     ?= benchmarks/results
export OUT

# The oldest supported transformers with what it needs and the newest transformers lacks.
FLOOR_PINS := transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0 \
              requests charset_normalizer urllib3 idna certifi
FLOOR_TESTS ?= tests/contracts tests/core tests/pruners

# lmms-eval with the packages that its import needs and .[dev] lacks.
LMMS_PINS := tests/eval/adapters/lmms_eval_requirements.txt

.PHONY: help setup lint type test test-floor test-harness kernels-compile test-gpu gpu bench docs demo clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(DEV)  ## make .venv with everything that linting and testing need

$(CORE): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(DEV): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(CORE) $@

$(FLOOR): Makefile $(DEV)
	rm -rf .floor
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .floor $(FLOOR_PINS)
	@touch $@

$(LMMS): $(LMMS_PINS) $(DEV)
	rm -rf .lmms
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target .lmms -r $(LMMS_PINS)
	@touch $@

lint: $(DEV)  ## ruff, format, spelling, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(MAKE) type

# mypy cannot follow an editable install's finder, so it reads the wheel a user would get.
type: $(DEV)  ## mypy on the installed wheel, from outside the root
	rm -rf build/lib build/bdist.* build/wheel build/typed
	$(BIN)/python -m build --quiet --wheel --no-isolation --outdir build/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typed build/wheel/*.whl
	cd build/typed && MYPYPATH=. $(abspath $(BIN))/mypy --config-file ../../pyproject.toml \
	    --cache-dir ../mypy-cache --package vlm_budget

test: $(DEV)  ## all tests on the newest transformers, the engine tests on the oldest, other harnesses, kernels compiled
	$(PYTEST) -n $(WORKERS)
	$(MAKE) kernels-compile
	$(MAKE) test-floor
	$(MAKE) test-harness

test-floor: $(FLOOR)  ## the engine tests on the oldest supported transformers
	PYTHONPATH=.floor $(BIN)/python -c 'import transformers as t; assert t.__version__ == "4.57.1", t.__version__'
	PYTHONPATH=$(CURDIR)/.floor $(PYTEST) -n $(WORKERS) $(FLOOR_TESTS)

test-harness: $(LMMS)  ## the adapters under an installed lmms-eval
	PYTHONPATH=.lmms $(BIN)/python -c 'import lmms_eval'
	PYTHONPATH=$(CURDIR)/.lmms $(PYTEST) tests/eval/adapters

# Warnings are Triton's, about its own coming defaults.
kernels-compile: $(DEV)  ## compile every kernel for sm_80 and sm_90 without a GPU; fails where registers spill
	TRITON_INTERPRET=0 $(BIN)/python -W ignore -m vlm_budget.triton_kernels.compile --jobs $(WORKERS)

test-gpu: $(DEV)  ## the tests that need a CUDA device, in .venv
	$(BIN)/pytest -m gpu

# One command for a bare machine with a GPU and no network: it needs torch, triton, transformers and pytest. A tree of
# links stands for the installed package. An editable install would need the setuptools that pyproject.toml asks for, and
# would write into an environment that is not ours. Tests and benchmarks together stay under ten minutes; they go on
# after a failure, and the exit code tells. GPU_OPTIONS=--resume measures what time did not allow. SUITE=video tests and
# measures sparse video attention, into gpu_video.json; for whole transformers it needs diffusers, too.
SUITE ?= tokens
gpu:  ## GPU tests and benchmarks with $(PYTHON) as it is (SUITE=tokens or video); one JSON into $OUT
	rm -rf build/linked && mkdir -p build/linked/vlm_budget "$$OUT"
	ln -s $(CURDIR)/vlm_budget/* build/linked/vlm_budget/
	ln -s $(addprefix $(CURDIR)/,triton_kernels pruners video eval demos) build/linked/vlm_budget/
	PYTHONPATH=$(CURDIR)/build/linked $(PYTHON) benchmarks/gpu.py --suite $(SUITE) --test-minutes 3 --minutes 6 \
	    --out "$$OUT" $(GPU_OPTIONS)

bench: $(DEV)  ## the CPU benchmarks, an hour of a quiet machine; JSON into $OUT
	mkdir -p "$$OUT"
	$(BIN)/python benchmarks/prefill.py --device cpu --out "$$OUT"
	$(BIN)/python benchmarks/greedy.py --out "$$OUT"
	$(BIN)/python benchmarks/vit.py --out "$$OUT"
	$(BIN)/python benchmarks/evaluation.py --out "$$OUT"
	$(BIN)/python benchmarks/budgets.py --device cpu --out "$$OUT"
	$(BIN)/python benchmarks/tstar.py --out "$$OUT"
	$(BIN)/python benchmarks/video_reading.py --out "$$OUT"

docs: $(CORE)  ## write the generated tables anew from recorded results
	$(BIN)/python -m vlm_budget.eval.nano.report
	$(BIN)/python -m vlm_budget.eval.nano.defaults
	$(BIN)/python -m vlm_budget.eval.views.report
	$(BIN)/python -m vlm_budget.eval.video_gen.report
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/video_tables.py
	$(BIN)/python benchmarks/methods.py

demo: $(CORE)  ## install the small core and show what a budget does
	$(BIN)/vlm-budget demo

clean:  ## remove everything that a target made
	rm -rf .venv .floor .lmms build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
