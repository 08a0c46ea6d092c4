# Two commands on a fresh machine, each doing all its own set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.venv/ready: requirements.txt requirements-conversion.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-conversion.txt
	touch $@

.venv/ready-real: .venv/ready tests/real/install.sh
	sh tests/real/install.sh $(BIN)/pip
	touch $@

.PHONY: demo test test-real lint clean
demo: .venv/ready
	$(BIN)/python -m demo.untrained_checkpoint build/untrained
	$(BIN)/python infer.py --model build/untrained --video demo/space.mp4 --question "What is in the video?" \
	  --max-new-tokens 16 --dtype float32

test: .venv/ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not real"

test-real: .venv/ready-real
	$(BIN)/python -m pytest tests/real

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build
