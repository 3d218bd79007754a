#!/usr/bin/env bash
# VideoMAE (tube masks) on Kinetics-400: DATA_PATH=/data/train.csv bash scripts/k400/pretrain_videomae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain k400_videomae --mask_type tube --sampling_rate 4 "$@"
