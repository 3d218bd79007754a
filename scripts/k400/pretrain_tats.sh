#!/usr/bin/env bash
# TATS on Kinetics-400: DATA_PATH=/data/train.csv bash scripts/k400/pretrain_tats.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain k400_tats "${TATS_FLAGS[@]}" --sampling_rate 4 "$@"
