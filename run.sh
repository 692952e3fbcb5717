#!/bin/sh
# Sets up .venv for one backend and runs general distillation.
#
#   sh run.sh                                  the embedded default
#   sh run.sh --config RECIPE.yaml [options]   any run; options as in python -m general_distill --help
#   BACKEND=paddle sh run.sh ...               the same on PaddlePaddle (BACKEND=torch: on PyTorch, the default)
#   PYTHON=python3.12 sh run.sh ...            another interpreter (3.10 to 3.12)
set -eu
cd "$(dirname "$0")"
BACKEND=${BACKEND:-torch}
EXTRAS=$BACKEND
. ./setup.sh
if [ $# -eq 0 ]; then
    set -- --config general_distill/recipes/demo.yaml --output_dir "output/demo-$BACKEND" --resume
fi
exec "$VENV/bin/python" -m general_distill --backend "$BACKEND" "$@"
