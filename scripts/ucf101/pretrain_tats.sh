#!/usr/bin/env bash
# TATS on UCF101: DATA_PATH=/data/train.csv bash scripts/ucf101/pretrain_tats.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ucf101_tats "${TATS_FLAGS[@]}" --sampling_rate 2 "$@"
