# Everything from a clean clone, with only Python (3.10 or newer) and make:
#   make compare   compare the optimizers on real data and write the report
#   make test      run the tests
#   make gate      lint, format and types
#   make bench     time the optimizers and whole training loops (docs/performance.md)
#   make table1    the MNIST table of the L-algorithms' paper (DATA=folder; half an hour on 2 cores)
#   make insensitivity   LOSSGRAD from initial rates 1e-8 to 10 (DATA=folder; 25 minutes on 2 cores; its plots need Chromium)
#   make lossgrad-defaults   LOSSGRAD with momentum and Adam (DATA=folder; 25 minutes on 2 cores)
#   make lossgrad-threshold  its settings along the plain gradient (DATA=folder; 10 minutes on 2 cores)
#   make hyperreg        hyper-regularization from 1e-4 to 1e4 (DATA=folder; 20 minutes on 2 cores; its plot needs Chromium)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= surefoot-out

.PHONY: compare test gate bench table1 insensitivity hyperreg clean lossgrad-defaults lossgrad-threshold

compare: $(INSTALLED)
	$(BIN)/surefoot compare digits --out $(OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

gate: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/rule_cost.py
	$(BIN)/python benchmarks/throughput.py

table1: $(INSTALLED)
	$(BIN)/python benchmarks/table1.py --out $(OUT)/table1 $(if $(DATA),--data $(DATA))

insensitivity: $(INSTALLED)
	$(BIN)/python benchmarks/insensitivity.py --out $(OUT)/insensitivity $(if $(DATA),--data $(DATA))

lossgrad-defaults: $(INSTALLED)
	$(BIN)/python benchmarks/lossgrad_defaults.py --out $(OUT)/lossgrad_defaults $(if $(DATA),--data $(DATA))

lossgrad-threshold: $(INSTALLED)
	$(BIN)/python benchmarks/lossgrad_threshold.py --out $(OUT)/lossgrad_threshold $(if $(DATA),--data $(DATA))

hyperreg: $(INSTALLED)
	$(BIN)/python benchmarks/hyperreg_rates.py --out $(OUT)/hyperreg $(if $(DATA),--data $(DATA))

# The environment: made again when what it is made from changes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,rivals,ray,postgresql,tensorboard,wandb]' --group dev
	touch $@

clean:
	rm -rf $(VENV) $(OUT)
