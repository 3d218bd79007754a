#!/usr/bin/env bash
# Fine-tune on Something-Something v2 and test: MODEL_PATH=checkpoint.pth DATA_PATH=/data/ssv2 bash scripts/ssv2/finetune.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune ssv2_finetune 2 3 --data_set SSV2 --sampling_rate 2 "$@"
