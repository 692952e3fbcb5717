#!/bin/sh
# Fine-tunes a model on a task of CLUE and evaluates it. The order of arguments is PP-MiniLM's.
#
#   sh finetuning/run_clue.sh TASK LR BATCH_SIZE EPOCHS MAX_SEQ_LENGTH DEVICE MODEL_DIR [options]
# DEVICE is cpu, gpu, xpu, auto or the number of a GPU. The result is in output/finetuning/MODEL/TASK/LR-BATCH_SIZE-BACKEND
# where you are, unless --output_dir says otherwise.
#   BACKEND=paddle sh finetuning/run_clue.sh ...        on PaddlePaddle (BACKEND=torch: on PyTorch, the default)
#
# Options are those of python -m finetuning --help; among them --data_dir, --output_dir.
set -eu
BACKEND=${BACKEND:-torch}
EXTRAS=$BACKEND
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
case ${1-} in
-h | --help | --version) . "$root/setup.sh" ;;
esac
if [ $# -lt 7 ]; then
    echo "error: run_clue.sh TASK LR BATCH_SIZE EPOCHS MAX_SEQ_LENGTH DEVICE MODEL_DIR: 7 arguments, $# given" >&2
    exit 2
fi
task=$1 rate=$2 batch_size=$3 epochs=$4 length=$5 device=$6 model=$7
shift 7
name=$(basename -- "$model")
case $name in . | .. | /) name=$(basename -- "$(CDPATH='' cd -- "$model" && pwd)") ;; esac
case $device in [0-9]*) # PP-MiniLM's number of a GPU
    export CUDA_VISIBLE_DEVICES="$device"
    device=gpu ;;
esac
. "$root/setup.sh"
exec "$VENV/bin/python" "$root/minilm_duet.py" finetuning --backend "$BACKEND" --task_name "$task" --learning_rate "$rate" \
    --batch_size "$batch_size" --num_train_epochs "$epochs" --max_seq_length "$length" --device "$device" \
    --model_name_or_path "$model" --model_type ppminilm --do_train true --do_eval true \
    --output_dir "output/finetuning/$name/$task/$rate-$batch_size-$BACKEND" "$@"
