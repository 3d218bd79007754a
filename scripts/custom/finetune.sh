#!/usr/bin/env bash
# Fine-tune on your own lists and test: NB_CLASSES=3 MODEL_PATH=checkpoint.pth DATA_PATH=lists bash scripts/custom/finetune.sh
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune custom_finetune 2 3 --data_set custom --nb_classes "${NB_CLASSES:?set NB_CLASSES to the number of classes in the lists}" \
    --sampling_rate "${SAMPLING_RATE:-4}" "$@"
