#!/usr/bin/env bash
# Random space-time masks (ST-MAE) on your own videos: DATA_PATH=train.csv bash scripts/custom/pretrain_random.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain custom_random --mask_type random --sampling_rate "${SAMPLING_RATE:-4}" "$@"
