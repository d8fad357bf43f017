#!/bin/sh
# ACDC, short: six methods and SDCL's four ablations, 7 labelled patients, 3 seeds, 128x128 in bf16, 300 + 400
# iterations, the last checkpoint, scored on the 20 validation volumes (10 patients). One thread a run, so that each ends
# with the same bits wherever the processor has the same kernels.
#   sh runs/acdc.sh run --slots 2            what is missing; list, table or slurm instead of run
#   sh runs/acdc.sh run --root_path <data>   flags behind the first word go on to code/experiments.py
cd "$(dirname "$0")/.." || exit
action=${1:-list}
[ $# -gt 0 ] && shift
export OMP_NUM_THREADS=1
exec .venv/bin/python code/experiments.py "$action" --name short --data_set acdc \
  --methods supervised mean_teacher ua_mt cps bcp sdcl \
    sdcl:mse_weight=0 sdcl:kl_weight=0 sdcl:mse_weight=0,kl_weight=0 sdcl:correct=everywhere \
  --labelnums 7 --seeds 1337 1 2 \
  --flags="--patch_size 128 128 --batch_size 6 --precision bf16 --pre_iterations 300 --self_iterations 400 \
    --pre_val_from 100 --pre_val_every 100 --self_val_every 100 --select last" \
  --test_flags="--split val" "$@"
