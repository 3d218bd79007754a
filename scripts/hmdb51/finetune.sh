#!/usr/bin/env bash
# Fine-tune on HMDB51 and test: MODEL_PATH=checkpoint.pth DATA_PATH=/data/hmdb51 bash scripts/hmdb51/finetune.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune hmdb51_finetune 2 3 --data_set HMDB51 --sampling_rate 2 "$@"
