#!/usr/bin/env bash
# AdaMAE on the embedded data set: bash scripts/shapes/pretrain_adamae.sh [flags]
# Settings by environment and flags: scripts/common.sh; next to them, data and scale are set by scripts/shapes/data.sh.
source "$(dirname "${BASH_SOURCE[0]}")/data.sh"
pretrain shapes_adamae --mask_type adamae --sampling_rate 2 "$@"
