#!/usr/bin/env bash
# TATS on your own videos: DATA_PATH=train.csv bash scripts/custom/pretrain_tats.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain custom_tats "${TATS_FLAGS[@]}" --sampling_rate "${SAMPLING_RATE:-4}" "$@"
