#!/usr/bin/env bash
# The table of `make bench` on a GPU, after the tests that need one: `bash benchmarks/gpu.sh [bench.py's flags]`.
set -euo pipefail
cd "$(dirname "$0")/.."
make .venv/.installed
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
.venv/bin/python -m pytest tests/test_cuda.py
.venv/bin/python benchmarks/bench.py --device cuda --output benchmarks/results_gpu.json "$@"
