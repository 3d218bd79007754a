#!/usr/bin/env bash
# Fine-tune on UCF101 and test: MODEL_PATH=checkpoint.pth DATA_PATH=/data/ucf101 bash scripts/ucf101/finetune.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune ucf101_finetune 2 3 --data_set UCF101 --sampling_rate 2 "$@"
