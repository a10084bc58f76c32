# `make demo` and `make test` need nothing but python3 (3.11 or newer); everything lands in .venv.
# Other targets: `make test-tl4` (TransformerLens 4), `make check` (linters only), `make clean`.

PYTHON ?= python3
VENV   := .venv
TL4    := .venv-tl4
BIN    := $(VENV)/bin
PIP     = $(@D)/bin/python -m pip install -qq --disable-pip-version-check

# torch goes in on its own first: asked for together with the rest, pip may take a build with gigabytes of CUDA.
TORCH  := torch==2.13.0

NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.PHONY: demo test check test-tl4 clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/circuitkit find stories260k gender-pronoun --method eap-ig --edges 100 --out runs/pronoun

test: $(VENV)/.ready-test check
	$(BIN)/python -m pytest -n 2
	$(if $(NOTEBOOKS),$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 $(NOTEBOOKS))

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy circuitkit

# TransformerLens 4 has no HookedTransformer, and sae-lens cannot be installed beside it.
test-tl4: $(TL4)/.ready
	$(TL4)/bin/python -m pytest -n 2 tests/test_transformers.py tests/test_zoo.py

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(@D): a few minutes, once"
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(PIP) -c constraints.txt $(TORCH)
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) -c constraints.txt -e ".[test,sae]"
	touch $@

$(TL4)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(@D): a few minutes, once"
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(PIP) $(TORCH)
	grep -v '^transformer-lens==' constraints.txt > $(@D)/constraints.txt
	$(PIP) -c $(@D)/constraints.txt "transformer-lens>=4.3,<5" -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(TL4) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
