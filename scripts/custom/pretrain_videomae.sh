#!/usr/bin/env bash
# VideoMAE (tube masks) on your own videos: DATA_PATH=train.csv bash scripts/custom/pretrain_videomae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain custom_videomae --mask_type tube --sampling_rate "${SAMPLING_RATE:-4}" "$@"
