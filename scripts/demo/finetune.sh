#!/usr/bin/env bash
# Fine-tunes the demo's checkpoint on moving shapes: which way does the shape go, right, left, up or down? No single
# frame tells. About 2 minutes on 2 CPU cores; MODEL_PATH=none trains from scratch instead.
# OUTPUT_DIR (default output/demo), PYTHON and further flags as in the other scripts.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
output=${OUTPUT_DIR:-$REPOSITORY/output/demo}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as the tiny scale
model=${MODEL_PATH:-$output/tats/checkpoint-39.pth}
data=$output/finetune_data

if [ -z "${DRY_RUN:-}" ]; then # new clips
    "$PYTHON" "$REPOSITORY/datasets/moving_shapes.py" --output "$data" --train 2000 --val 400 --size 32
fi

name=finetune
initial=(--finetune "$model")
if [ "$model" = none ]; then name=scratch initial=(); fi
# Unlike table 7 (scripts/common.sh): no mixing and no colours, few epochs at a large rate.
GPUS=0 launch run_class_finetuning.py \
    --data_set custom --nb_classes 4 --no-flip \
    --data_path "$data/translations" \
    --output_dir "$output/$name" \
    "${initial[@]}" \
    --model vit_tiny_patch8_64 \
    --input_size 32 \
    --num_frames 8 \
    --sampling_rate 2 \
    --batch_size 32 \
    --num_sample 1 \
    --crop_scale 0.8 1 --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0 --smoothing 0 \
    --init_scale 1 \
    --layer_decay 1 \
    --lr 8e-3 \
    --warmup_epochs 1 \
    --clip_grad 1 \
    --epochs 15 \
    --save_ckpt_freq 5 \
    --print_freq 25 \
    --num_workers 1 \
    --test_num_segment 2 --test_num_crop 3 \
    "$@"
