# Two commands on a fresh machine, each doing all its own set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.venv/ready: requirements.txt requirements-conversion.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-conversion.txt
	touch $@

# The TPU compiler that the installed JAX names (213 MB), for tests that look for it there.
.venv/ready-libtpu: .venv/ready
	$(BIN)/pip install --quiet --no-deps --target .venv/libtpu \
	  "$$($(BIN)/python -c 'from importlib.metadata import requires; print(*(x.split(";")[0] for x in requires("jax") if x.startswith("libtpu")))')"
	touch $@

.venv/ready-real: .venv/ready tests/real/install.sh
	sh tests/real/install.sh $(BIN)/pip
	touch $@

.PHONY: demo demo-model test test-real lint clean
demo: .venv/ready
	$(BIN)/python -m demo.show build/demo.png

# Draws the data and trains the shipped model anew: about 100 minutes on two cores.
demo-model: .venv/ready
	$(BIN)/python -m demo.make_data build/demo_data
	$(BIN)/python train.py --config configs/demo/stage0_pretrain.yaml
	$(BIN)/python -m demo.fresh_qformer runs/demo/stage0/model runs/demo/stage0_fresh
	for stage in stage0_refer stage1_align stage2_instruct stage3_long_video; do \
	  $(BIN)/python train.py --config configs/demo/$$stage.yaml || exit 1; done

test: .venv/ready .venv/ready-libtpu lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not real"

test-real: .venv/ready-real
	$(BIN)/python -m pytest tests/real

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build
