# Sourced by the scripts beside it, which differ from the other data sets in two things: the data are written, to output/shapes
# where DATA_PATH is not set, with SHAPES_FLAGS="--shape_size 0.1 0.16" (flags of datasets/moving_shapes.py); and scale and
# frame size are small.
SCALE=${SCALE:-tiny} INPUT_SIZE=${INPUT_SIZE:-32} SHAPES_FLAGS=${SHAPES_FLAGS:-}
if [ "$SCALE" = tiny ]; then
    MASK_RATIO=${MASK_RATIO:-0.85} # at 0.95 the loss stays on its plateau (docs/RESULTS.md)
    EPOCHS=${EPOCHS:-4} TATS_START_EPOCH=${TATS_START_EPOCH:-1} TATS_LR=${TATS_LR:-5e-4} ENTROPY_COEF=${ENTROPY_COEF:-1e-6}
fi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# write_shapes FOLDER: in one move, lest another run of a sweep sees half of it. A folder of another version, size or
# SHAPES_FLAGS is refused, by the writer.
write_shapes() {
    local writer=$REPOSITORY/datasets/moving_shapes.py settings=$1/settings.json new version
    version=$(sed -n 's/^VERSION = \([0-9]*\).*/\1/p' "$writer")
    if [ -d "$1" ]; then
        [ -f "$settings" ] || return 0 # lists of a user
        if [ -n "${SHAPES_FLAGS// /}" ] || ! [ -d "$1/translations" ] || ! grep -q "\"version\": $version," "$settings" ||
            ! grep -q "\"size\": $INPUT_SIZE," "$settings"; then
            # shellcheck disable=SC2046,SC2086  # the flags are several words
            "$PYTHON" "$writer" --output "$1" --size "$INPUT_SIZE" \
                $(sed -nE 's/^ "(train|val|frames|seed)": ([0-9]+),$/--\1 \2/p' "$settings") $SHAPES_FLAGS >&2 || return
        fi
        return 0
    fi
    { mkdir -p "$(dirname "$1")" && new=$(mktemp -d "$1.XXXXXX"); } || return 2
    # shellcheck disable=SC2086  # the flags are several words
    "$PYTHON" "$writer" --output "$new" --train 3000 --val 1000 --size "$INPUT_SIZE" $SHAPES_FLAGS >&2 || {
        rm -rf "$new"
        return 2
    }
    mv -T "$new" "$1" 2>/dev/null || rm -rf "$new" # another was first
}

if [ -z "${DATA_PATH:-}" ]; then
    shapes=$REPOSITORY/output/shapes
    [ -n "${DRY_RUN:-}" ] || write_shapes "$shapes"
    case $0 in */finetune.sh) DATA_PATH=$shapes ;; *) DATA_PATH=$shapes/train.csv ;; esac
fi
