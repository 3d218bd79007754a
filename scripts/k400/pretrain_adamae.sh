#!/usr/bin/env bash
# AdaMAE on Kinetics-400: DATA_PATH=/data/train.csv bash scripts/k400/pretrain_adamae.sh [flags]
# Settings by environment and flags: scripts/common.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain k400_adamae --mask_type adamae --sampling_rate 4 "$@"
