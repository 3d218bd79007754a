#!/usr/bin/env bash
# AdaMAE on Something-Something v2: DATA_PATH=/data/train.csv bash scripts/ssv2/pretrain_adamae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain ssv2_adamae --mask_type adamae --sampling_rate 2 "$@"
