#!/usr/bin/env bash
# AdaMAE on your own videos: DATA_PATH=train.csv bash scripts/custom/pretrain_adamae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain custom_adamae --mask_type adamae --sampling_rate "${SAMPLING_RATE:-4}" "$@"
