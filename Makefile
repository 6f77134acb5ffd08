# make demo: set up and run the main job. make test: set up and run the tests. The rest is for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := build/demo

.PHONY: demo test all-tests peers lint wheel clean

demo: $(VENV)/.core
	rm -rf $(DEMO)
	$(BIN)/advkit train --model mnist-cnn --data mnist-5k --out $(DEMO)/digits.safetensors
	$(BIN)/advkit attack --model $(DEMO)/digits.safetensors --data mnist-5k --threat "linf(0.1)" --attack fgsm --attack pgd \
		--alone --out $(DEMO)/fixed
	$(BIN)/advkit attack --model $(DEMO)/digits.safetensors --data mnist-5k --threat linf --attack fmn --limit 500 \
		--out $(DEMO)/closest
	@echo "pictures: $(DEMO)/fixed/pictures; the curve: $(DEMO)/closest/curve.png"

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
