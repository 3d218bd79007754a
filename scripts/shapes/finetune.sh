#!/usr/bin/env bash
# Fine-tune on the embedded data set and test, which of ten kinds of motion is it? No single frame tells, and nothing is
# mirrored: MODEL_PATH=checkpoint.pth bash scripts/shapes/finetune.sh [flags]
# Settings by environment and flags: scripts/common.sh; next to them, data and scale are set by scripts/shapes/data.sh.
# 32 different clips per step: with 8 clips four times each, fine-tuning leaves chance four times later (docs/LOG.md).
EPOCHS=${EPOCHS:-8} BATCH_SIZE=${BATCH_SIZE:-32} NUM_SAMPLE=${NUM_SAMPLE:-1} LR=${LR:-8e-3}
source "$(dirname "${BASH_SOURCE[0]}")/data.sh"
finetune shapes_finetune 2 1 --data_set custom --nb_classes 10 --no-flip --sampling_rate 2 --crop_scale 0.8 1 \
    --layer_decay 1 "$@"
