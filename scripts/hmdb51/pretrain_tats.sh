#!/usr/bin/env bash
# TATS on HMDB51: DATA_PATH=/data/train.csv bash scripts/hmdb51/pretrain_tats.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain hmdb51_tats "${TATS_FLAGS[@]}" --sampling_rate 2 "$@"
