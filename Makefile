# Commands for a fresh machine, each doing all its own set-up: `make demo`, `make serve` and `make test`.
# The versions are those of requirements.lock; `LOCK=` takes the newest in the ranges of requirements.txt and pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
LOCK ?= requirements.lock
INSTALL := $(BIN)/pip install --quiet --no-compile $(LOCK:%=--constraint %)
export PYTHONDONTWRITEBYTECODE :=  # modules are compiled once, as they are imported, and not all at the installation

.venv/ready: requirements.txt $(LOCK)
	$(PYTHON) -m venv .venv
	$(INSTALL) --requirement requirements.txt
	touch $@

.venv/ready-test: .venv/ready pyproject.toml
	$(INSTALL) --editable ".[train,gcs,wandb,mlflow,serve,convert,demo,eval,test]" --editable tests/golden_option
	touch $@

.venv/ready-serve: .venv/ready pyproject.toml
	$(INSTALL) --editable ".[serve]"
	touch $@

# The TPU compiler that the installed JAX names (213 MB), for tests that look for it there.
.venv/ready-libtpu: .venv/ready
	$(INSTALL) --no-deps --target .venv/libtpu \
	  "$$($(BIN)/python -c 'from importlib.metadata import requires; print(*(x.split(";")[0] for x in requires("jax") if x.startswith("libtpu")))')"
	touch $@

.venv/ready-real: .venv/ready-test tests/real/install.sh
	$(INSTALL) --editable ".[speech]"
	sh tests/real/install.sh $(BIN)/pip
	touch $@

# Apache Beam, in an environment of its own: it takes older versions of five packages than requirements.lock has.
.venv-beam/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-beam
	.venv-beam/bin/pip install --quiet --no-compile --editable ".[train,gcs,test]" "apache-beam>=2.77,<3"
	touch $@

.PHONY: demo serve demo-model test test-real test-pods test-beam lint lock clean
demo: .venv/ready
	$(BIN)/python -m demo.show build/demo.png

# The small model behind OpenAI's protocol, and a page on it, whose address is printed.
serve: .venv/ready-serve
	$(BIN)/llamavid-serve --model demo/model --name demo

# Draws the data and trains the shipped model anew: about 100 minutes on two cores.
demo-model: .venv/ready-test
	$(BIN)/python -m demo.make_data build/demo_data
	$(BIN)/python train.py --config configs/demo/stage0_pretrain.yaml
	$(BIN)/python -m demo.fresh_qformer runs/demo/stage0/model runs/demo/stage0_fresh
	for stage in stage0_refer stage1_align stage2_instruct stage3_long_video; do \
	  $(BIN)/python train.py --config configs/demo/$$stage.yaml || exit 1; done

# The page is tried in a Chromium: `apt-get install chromium` or `.venv/bin/playwright install chromium`.  Without one
# its tests are skipped, but where CI is set they fail.
test: .venv/ready-test .venv/ready-libtpu lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not real and not pods"

test-real: .venv/ready-real
	$(BIN)/python -m pytest tests/real

test-pods: .venv/ready-test
	$(BIN)/python -m pytest -s tests/cli/test_pods.py

test-beam: .venv-beam/ready
	.venv-beam/bin/python -m pytest -k beam tests/data tests/commands

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One version of each package for every Python, from the ranges; torch, whose CPU and CUDA builds differ, stays free.
lock:
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest --no-annotate \
	  --extra tpu --extra cuda --extra train --extra gcs --extra wandb --extra mlflow --extra serve --extra demo --extra eval \
	  --extra speech --extra test \
	  --custom-compile-command "make lock" \
	  pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv .venv-beam build
