#!/bin/sh
# LA, short: SDCL, BCP and supervised, 8 labelled cases, 2 seeds, crops of 64x64x48 in bf16, 300 + 300 iterations, the
# last checkpoint, scored on the test cases at a coarse stride. One thread a run, so that each ends with the same bits
# wherever the processor has the same kernels.
#   sh runs/la.sh run --slots 2            what is missing; list, table or slurm instead of run
#   sh runs/la.sh run --root_path <data>   flags behind the first word go on to code/experiments.py
cd "$(dirname "$0")/.." || exit
action=${1:-list}
[ $# -gt 0 ] && shift
export OMP_NUM_THREADS=1
exec .venv/bin/python code/experiments.py "$action" --name short --data_set la \
  --methods supervised bcp sdcl --labelnums 8 --seeds 1337 1 \
  --flags="--patch_size 64 64 48 --precision bf16 --pre_iterations 300 --self_iterations 300 --select last" \
  --test_flags="--stride 32 32 16" "$@"
