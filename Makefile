# make demo: set up and run the main job. make test: set up and run the tests. The rest is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := build/demo

MODELS := build/models
# Where the digits of `make models` come from: the hub, or a folder of its files.
DATA ?= hf:ylecun/mnist

.PHONY: demo models test all-tests peers lint wheel clean

demo: $(VENV)/.core
	rm -rf $(DEMO)
	$(BIN)/advkit train --model mnist-cnn --data mnist-5k --out $(DEMO)/plain.safetensors
	$(BIN)/advkit train --model mnist-cnn --data mnist-5k --defense "pgd(steps=3, step=0.08)" --threat "linf(0.15)" --epochs 6 \
		--out $(DEMO)/robust.safetensors
	$(BIN)/advkit benchmark demo --model $(DEMO)/plain.safetensors --model $(DEMO)/robust.safetensors --data mnist-5k \
		--out $(DEMO)/run

# The networks of docs/measurements.md, from scratch, with seed 0: half an hour on one core.
models: $(VENV)/.core
	$(PIP) -e ".[hf]"
	$(BIN)/advkit train --model mnist-cnn --data $(DATA) --out $(MODELS)/plain.safetensors
	$(BIN)/advkit train --model mnist-small --data $(DATA) --defense fast --threat "linf(0.3)" --out $(MODELS)/fast.safetensors
	$(BIN)/advkit train --model mnist-small --data $(DATA) --defense "pgd(steps=7, ramp=0.4)" --threat "linf(0.3)" --epochs 6 \
		--out $(MODELS)/pgd.safetensors
	$(BIN)/advkit train --model mnist-small --data $(DATA) --defense "trades(beta=6, steps=5, ramp=0.4)" --threat "linf(0.3)" \
		--epochs 6 --out $(MODELS)/trades.safetensors
	$(BIN)/advkit train --model mnist-small --data $(DATA) --defense "ibp(ramp=0.5)" --threat "linf(0.31)" --epochs 30 \
		--batch-size 128 --lr 0.007 --clip 8 --out $(MODELS)/certified.safetensors
	$(BIN)/advkit train --model "mnist-cnn(width=8)" --data $(DATA) --defense "gaussian(sigma=0.5)" --epochs 5 --batch-size 128 \
		--shift 0 --weight-decay 0.0001 --out $(MODELS)/smoothed.safetensors

test: $(VENV)/.dev
	$(BIN)/python -m pytest

all-tests: $(VENV)/.dev peers
	$(BIN)/python -m pytest -m "slow or peer or gpu"

# Without their dependencies: torchvision and visdom are not needed for what is compared, and do not always install.
peers: $(VENV)/.dev
	$(PIP) --no-deps foolbox==3.3.4 eagerpy==0.30.0 torchattacks==3.5.1 adv-lib==0.2.8

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core pyproject.toml constraints.txt
	$(PIP) -e ".[dev]"
	touch $@
