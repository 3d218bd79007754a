#!/usr/bin/env bash
# VideoMAE (tube masks) on UCF101: DATA_PATH=/data/train.csv bash scripts/ucf101/pretrain_videomae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ucf101_videomae --mask_type tube --sampling_rate 2 "$@"
