#!/bin/sh
# Fine-tunes a model on every task over a grid of batch sizes and learning rates, and tabulates the best.
#
#   sh finetuning/run_all_search.sh MODEL_DIR [options]
#   BACKEND=paddle sh finetuning/run_all_search.sh ...  on PaddlePaddle (BACKEND=torch: on PyTorch, the default)
#
# Options are those of python -m finetuning.search --help; stopped, the same command goes on.
set -eu
BACKEND=${BACKEND:-torch}
EXTRAS=$BACKEND
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
case ${1-} in
-h | --help | --version) . "$root/setup.sh" ;;
"" | -*)
    echo "error: run_all_search.sh MODEL_DIR [options]: the model's folder is missing" >&2
    exit 2
    ;;
esac
model=$1
shift
. "$root/setup.sh"
exec "$VENV/bin/python" "$root/minilm_duet.py" finetuning.search --backend "$BACKEND" --model_name_or_path "$model" "$@"
