#!/usr/bin/env bash
# VideoMAE (tube masks) on HMDB51: DATA_PATH=/data/train.csv bash scripts/hmdb51/pretrain_videomae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain hmdb51_videomae --mask_type tube --sampling_rate 2 "$@"
