#!/usr/bin/env bash
# Random space-time masks (ST-MAE) on UCF101: DATA_PATH=/data/train.csv bash scripts/ucf101/pretrain_random.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ucf101_random --mask_type random --sampling_rate 2 "$@"
