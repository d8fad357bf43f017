# `make demo` and `make test` do all of the set-up; on Windows run the commands of README.md by hand.
PYTHON ?= python3
RUN := .venv/bin/python

# What depends on the processor's kernels most, which `make test` runs under AVX2 too.
ARITHMETIC := $(addprefix tests/test_,networks.py losses.py steps.py arithmetic.py inference.py teacher.py mixing.py \
	pseudo_labels.py metrics.py evaluation.py $(addprefix training.py::test_,three_golden_steps_of_self_training \
	steps_serve_two_and_three_dimensions a_run_that_was_stopped_ends_with_the_same_bits))
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
SSE41 := ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default

.PHONY: demo test slow kernels pythons mutants slurm faults bench lint clean
demo: .venv/.installed
	$(RUN) code/demo.py

# In two processes, of one thread each; what depends on the kernels once more, in one of all threads.
test: .venv/.installed
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile
	$(AVX2) $(RUN) -m pytest $(ARITHMETIC)

# What `make test` leaves out, since it takes minutes.
slow: .venv/.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

# The whole suite with the kernels of lesser processors, and with all threads.
kernels: .venv/.installed
	OMP_NUM_THREADS=1 $(AVX2) $(RUN) -m pytest -n 2 --dist loadfile
	OMP_NUM_THREADS=1 $(SSE41) $(RUN) -m pytest -n 2 --dist loadfile
	$(RUN) -m pytest

# Both commands of README.md in a clean clone, for each promised Python that is there.
pythons:
	$(PYTHON) tests/pythons.py

# Undo each implementation detail, then mutate the method's core; docs/reliability.md has the count.
mutants: .venv/.installed
	$(if $(MODULES),,$(RUN) tests/details.py)
	OMP_NUM_THREADS=1 $(RUN) tests/mutants.py $(MODULES)

# An experiment on a real SLURM that the test starts (slurmctld, slurmd, slurm-client, munge; root).
slurm: .venv/.installed
	$(RUN) -m pytest tests/slurm

faults: .venv/.installed
	$(RUN) tests/faults/faults.py

bench: .venv/.installed
	$(RUN) benchmarks/bench.py $(BENCH)

lint: .venv/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format code dataloaders tests docs benchmarks

clean:
	rm -rf .venv demo_output mutants .pytest_cache .ruff_cache .hypothesis

# The stamp is newer than the requirements only when the last installation finished.
.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
