#!/usr/bin/env bash
# AdaMAE on UCF101: DATA_PATH=/data/train.csv bash scripts/ucf101/pretrain_adamae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ucf101_adamae --mask_type adamae --sampling_rate 2 "$@"
