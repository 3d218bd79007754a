#!/usr/bin/env bash
# TATS on Something-Something v2: DATA_PATH=/data/train.csv bash scripts/ssv2/pretrain_tats.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ssv2_tats "${TATS_FLAGS[@]}" --sampling_rate 2 "$@"
