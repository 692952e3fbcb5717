#!/bin/sh
# Sets up .venv for one backend and runs general distillation.
#
#   sh run.sh                                  the embedded default; the student is in output/demo-torch where you are
#   sh run.sh --nproc 2                        the same in two processes; without, one for each GPU
#   sh run.sh --config RECIPE.yaml [options]   any run; options as in python -m general_distill --help
#   BACKEND=paddle sh run.sh ...               the same on PaddlePaddle (BACKEND=torch: on PyTorch, the default)
#   PYTHON=python3.12 sh run.sh ...            another interpreter (3.10 to 3.14; Paddle to 3.13)
#   VENV=FOLDER sh run.sh ...                  another place than .venv beside this file
#
# Paths are relative to where you are. sh run.sh --help lists all options.
set -eu
BACKEND=${BACKEND:-torch}
EXTRAS=$BACKEND
HELP_FOLLOWS=:
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$root/setup.sh"
case " $* " in
*" --config"[\ =]* | *" --recipe"[\ =]* | *" --input_dir"[\ =]* | *" --help "* | *" -h "*) ;;
*)
    case " $* " in
    *" --overwrite"[\ =]* | *" --resume"[\ =]*) ;;
    *) set -- --resume "$@" ;;
    esac
    set -- --config demo --output_dir "output/demo-$BACKEND" "$@"
    ;;
esac
exec "$VENV/bin/python" "$root/minilm_duet.py" general_distill --backend "$BACKEND" "$@"
