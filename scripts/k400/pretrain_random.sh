#!/usr/bin/env bash
# Random space-time masks (ST-MAE) on Kinetics-400: DATA_PATH=/data/train.csv bash scripts/k400/pretrain_random.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain k400_random --mask_type random --sampling_rate 4 "$@"
