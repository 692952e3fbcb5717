#!/bin/sh
# Sets up .venv for one backend and runs general distillation.
#
#   sh run.sh                                  the embedded default
#   sh run.sh --nproc 2                        the same in two processes; without, one for each GPU
#   sh run.sh --config RECIPE.yaml [options]   any run; options as in python -m general_distill --help
#   BACKEND=paddle sh run.sh ...               the same on PaddlePaddle (BACKEND=torch: on PyTorch, the default)
#   PYTHON=python3.12 sh run.sh ...            another interpreter (3.10 to 3.14; Paddle to 3.13)
set -eu
cd "$(dirname "$0")"
BACKEND=${BACKEND:-torch}
EXTRAS=$BACKEND
. ./setup.sh
case " $* " in
*" --config"[\ =]* | *" --recipe"[\ =]* | *" --input_dir"[\ =]* | *" --help "*) ;;
*) set -- --config general_distill/recipes/demo.yaml --output_dir "output/demo-$BACKEND" --resume "$@" ;;
esac
exec "$VENV/bin/python" -m general_distill --backend "$BACKEND" "$@"
