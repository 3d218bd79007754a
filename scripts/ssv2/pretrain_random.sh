#!/usr/bin/env bash
# Random space-time masks (ST-MAE) on Something-Something v2: DATA_PATH=/data/train.csv bash scripts/ssv2/pretrain_random.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ssv2_random --mask_type random --sampling_rate 2 "$@"
