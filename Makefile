# `make demo` and `make test` do all of the set-up; on Windows run the commands of README.md by hand.
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test faults bench lint clean
demo: .venv/.installed
	$(RUN) code/demo.py

test: .venv/.installed
	$(RUN) -m ruff check .
	$(RUN) -m pytest

faults: .venv/.installed
	$(RUN) tests/faults/faults.py

bench: .venv/.installed
	$(RUN) benchmarks/bench.py $(BENCH)

lint: .venv/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format code dataloaders tests docs benchmarks

clean:
	rm -rf .venv demo_output .pytest_cache .ruff_cache .hypothesis

# The stamp is newer than the requirements only when the last installation finished.
.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
