#!/usr/bin/env bash
# Fine-tune on Kinetics-400 and test: MODEL_PATH=checkpoint.pth DATA_PATH=/data/k400 bash scripts/k400/finetune.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune k400_finetune 5 3 --data_set Kinetics-400 --sampling_rate 4 "$@"
