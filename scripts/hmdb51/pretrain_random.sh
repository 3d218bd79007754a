#!/usr/bin/env bash
# Random space-time masks (ST-MAE) on HMDB51: DATA_PATH=/data/train.csv bash scripts/hmdb51/pretrain_random.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain hmdb51_random --mask_type random --sampling_rate 2 "$@"
