#!/bin/sh
# LA's speedrun (docs/speedrun.md): seconds to mean Dice 0.75 of the mean of both students on the cases of val.txt, 8
# labelled cases. The record's val.txt is a copy of test.txt: with --select last nothing is selected on it.
#   sh runs/la_speedrun.sh fast                  in what is faster here, fp32 or bf16; other rows: published, bf16
#   sh runs/la_speedrun.sh fast --seeds 6 7 8    flags behind the row go on to benchmarks/speedrun.py
cd "$(dirname "$0")/.." || exit
row=${1:-fast}
[ $# -gt 0 ] && shift
case $row in
  published) precision=fp32 flags="--pre_iterations 500 --self_iterations 500 --stride 112 112 80" ;;
  bf16) precision=bf16 flags="--pre_iterations 500 --self_iterations 500 --stride 112 112 80" ;;
  fast) precision=fastest flags="--recipe fast --stride 192 128 96" ;;
  *) echo "error: no row $row: choose published, bf16 or fast." >&2; exit 1 ;;
esac
exec .venv/bin/python benchmarks/speedrun.py --name "la_$row" --data_set la --target 0.75 --precision $precision \
  --flags="--pre_val_every 50 --self_val_every 50 --select last $flags" "$@"
