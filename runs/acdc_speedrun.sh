#!/bin/sh
# ACDC's speedrun (docs/speedrun.md): seconds to mean Dice 0.70 of the mean of both students, 128x128, 7 labelled patients.
#   sh runs/acdc_speedrun.sh fast                  in what is faster here, fp32 or bf16; other rows: published, bf16
#   sh runs/acdc_speedrun.sh fast --seeds 6 7 8    flags behind the row go on to benchmarks/speedrun.py
cd "$(dirname "$0")/.." || exit
row=${1:-fast}
[ $# -gt 0 ] && shift
case $row in
  published) precision=fp32 flags="--pre_iterations 500 --self_iterations 700" ;;
  bf16) precision=bf16 flags="--pre_iterations 500 --self_iterations 700" ;;
  fast) precision=fastest flags="--recipe fast" ;;
  *) echo "error: no row $row: choose published, bf16 or fast." >&2; exit 1 ;;
esac
exec .venv/bin/python benchmarks/speedrun.py --name "$row" --data_set acdc --target 0.7 --precision $precision \
  --flags="--patch_size 128 128 --pre_val_from 50 --pre_val_every 50 --self_val_every 50 --select last $flags" "$@"
