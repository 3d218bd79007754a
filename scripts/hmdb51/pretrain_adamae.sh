#!/usr/bin/env bash
# AdaMAE on HMDB51: DATA_PATH=/data/train.csv bash scripts/hmdb51/pretrain_adamae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain hmdb51_adamae --mask_type adamae --sampling_rate 2 "$@"
