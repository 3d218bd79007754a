# Sourced by common.sh and compare/sweep.sh: one clear error before anything starts.
refuse() {
    echo "error: $*" >&2
    exit 2
}

# need_whole NAME LEAST: the variable, where it is set, is a whole number.
need_whole() {
    local value=${!1:-$2}
    [[ $value =~ ^(0|[1-9][0-9]{0,8})$ && $value -ge $2 ]] || refuse "$1=$value: must be a whole number of at least $2"
}

# need_words NAME CHOICES: the variable, a list, has words, and none but these.
need_words() {
    local word
    [ -n "${!1// /}" ] || refuse "$1 is empty: choose of $2"
    for word in ${!1}; do
        [[ " $2 " == *" $word "* ]] || refuse "$1=$word: choose of $2"
    done
}

# make_absolute NAME...: paths, seen from where the command was given; a sweep goes to the repository.
make_absolute() {
    local name
    for name in "$@"; do
        if [ -n "${!name:-}" ]; then printf -v "$name" %s "$(realpath -ms -- "${!name}")"; fi
    done
}

# run_sweep COMMAND...: one of several sweeps, which is told to stop when this shell is.
run_sweep() {
    local status=0 inner
    set -m
    "$@" < /dev/null &
    inner=$!
    set +m
    trap 'kill -TERM "$inner" 2> /dev/null; wait "$inner"; exit 143' TERM INT HUP
    wait "$inner" || status=$?
    trap - TERM INT HUP
    [ "$status" -ne 143 ] || exit 143
    return "$status"
}

# visible_gpus: those that processes of this shell may use, with commas between them. Slices (MIG) only by CUDA_VISIBLE_DEVICES.
visible_gpus() {
    local devices
    devices=${CUDA_VISIBLE_DEVICES-$(nvidia-smi -L 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p' | paste -sd ,)} || true
    devices=,${devices/NoDevFiles/}, # Slurm's word for none
    devices=${devices%%,-1,*} # CUDA looks no further
    devices=${devices#,}
    echo "${devices%,}"
}

count_gpus() {
    local devices
    IFS=, read -ra devices <<< "$(visible_gpus)"
    echo "${#devices[@]}"
}

# 0 is off, as an empty value is; a value that is not set may have a default.
for name in DRY_RUN LIST MEASURE; do
    if [ "${!name:-}" = 0 ]; then printf -v "$name" ''; fi
done
