# Sourced by the scripts beside it, which differ from the other data sets in three things: the data are written where there
# are none (DATA_PATH, default output/shapes), scale and frame size are small, and the clips to fine-tune on are those that
# move right or left, in DATA_PATH/right_left.
SCALE=${SCALE:-tiny} INPUT_SIZE=${INPUT_SIZE:-32}
if [ "$SCALE" = tiny ]; then EPOCHS=${EPOCHS:-7} TATS_START_EPOCH=${TATS_START_EPOCH:-3} TATS_LR=${TATS_LR:-5e-4} ENTROPY_COEF=${ENTROPY_COEF:-1e-6}; fi
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# write_shapes FOLDER: in one move, lest another run of a sweep sees half of it.
write_shapes() {
    [ ! -d "$1" ] || return 0
    local new split
    mkdir -p "$(dirname "$1")"
    new=$(mktemp -d "$1.XXXXXX")
    "$PYTHON" "$REPOSITORY/datasets/moving_shapes.py" --output "$new" --train 1000 --val 1000 --size "$INPUT_SIZE" >&2
    mkdir "$new/right_left"
    head -n 2 "$new/classes.txt" > "$new/right_left/classes.txt"
    for split in train val; do
        sed -n 's,^\(.* [01]\)$,../\1,p' "$new/$split.csv" > "$new/right_left/$split.csv"
    done
    mv -T "$new" "$1" 2>/dev/null || rm -rf "$new" # another was first
}

if [ -z "${DATA_PATH:-}" ]; then
    shapes=$REPOSITORY/output/shapes
    [ -n "${DRY_RUN:-}" ] || write_shapes "$shapes"
    case $0 in */finetune.sh) DATA_PATH=$shapes/right_left ;; *) DATA_PATH=$shapes/train.csv ;; esac
fi
