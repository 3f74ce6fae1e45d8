# `make test` and `make demo` are the whole set-up on a fresh machine: Python >= 3.11 and make, nothing else.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint gpu-check clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Trains from scratch on generated images, prints COCO's AP, and draws detections into images of the validation set.
demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python -m models.train demo --output runs/demo
	$(BIN)/python -m models.predict --checkpoint runs/demo/model.pth --output runs/demo/images --score-threshold 0.7 \
		runs/shapes/val2017/00000000000[1-9].jpg

test: .venv/installed
	$(BIN)/pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Uses PYTHON and not .venv, since a machine with a GPU has its own torch. Leaves out tests/models, which has no GPU tests
# and needs more packages. ONLY="nms model" runs these sections of the benchmarks and no tests, for example after an
# interrupted run.
gpu-check:
	$(if $(ONLY),,PYTHONPATH=. $(PYTHON) -m pytest tests --ignore tests/models -k "cuda or gpu" -rs)
	export PYTHONPATH=.; $(PYTHON) -m benchmarks run --device cuda $(ONLY:%=--only %); failed=$$?; \
		$(PYTHON) -m benchmarks report --no-compile && exit $$failed

clean:
	rm -rf .venv dist
