#!/usr/bin/env bash
# VideoMAE (tube masks) on Something-Something v2: DATA_PATH=/data/train.csv bash scripts/ssv2/pretrain_videomae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ssv2_videomae --mask_type tube --sampling_rate 2 "$@"
