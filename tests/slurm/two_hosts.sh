#!/usr/bin/env bash
# Two network namespaces, joined by a cable only, stand for two hosts: torchrun's processes meet across it
# (RDZV_ENDPOINT) and train TATS to the losses of one process with the same global batch. Prints PASS, or SKIP where this
# user may not make network namespaces. Half a minute on 2 cores.
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/common.sh"

SPACES=("hosts_$$_0" "hosts_$$_1")
WORK=$(mktemp -d)

finish() {
    local status=$?
    trap - EXIT
    [ "$status" -eq 0 ] || tail -n 20 "$WORK"/*.out 2>/dev/null || true
    kill $(jobs -p) 2>/dev/null || true
    for space in "${SPACES[@]}"; do ip netns delete "$space" 2>/dev/null || true; done # and the cable with them
    rm -rf "$WORK"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

for space in "${SPACES[@]}"; do
    if ! ip netns add "$space" 2>"$WORK/reason" || ! ip -n "$space" link set lo up 2>"$WORK/reason"; then
        echo "SKIP: no network namespaces: $(head -n 1 "$WORK/reason")"
        exit 0
    fi
done
if ! ip link add cable netns "${SPACES[0]}" type veth peer name cable netns "${SPACES[1]}" 2>"$WORK/reason"; then
    echo "SKIP: no virtual cable: $(head -n 1 "$WORK/reason")"
    exit 0
fi
for host in 0 1; do
    ip -n "${SPACES[host]}" address add "10.0.0.$((host + 1))/24" dev cable
    ip -n "${SPACES[host]}" link set cable up
done

"$PYTHON" "$REPOSITORY/datasets/moving_shapes.py" --output "$WORK/data" --train 40 --val 10 --size 32 --frames 12
export OMP_NUM_THREADS=1 PYTHON GPUS=0 DATA_PATH=$WORK/data/train.csv
export EPOCHS=3 WARMUP_EPOCHS=1 NUM_WORKERS=1 MASK_RATIO=0.75
run=(bash "$REPOSITORY/scripts/ssv2/pretrain_tats.sh" --model pretrain_videomae_tiny_patch8_64 --input_size 32
    --num_frames 4 --tats_start_epoch 1)

BATCH_SIZE=4 OUTPUT_DIR=$WORK/one timeout 120 "${run[@]}" >"$WORK/one.out" 2>&1

# Both hosts have this machine's name, which leads to neither: addresses say where they are, and gloo which way to go.
export NODES=2 BATCH_SIZE=2 OUTPUT_DIR=$WORK/two RDZV_ENDPOINT=10.0.0.1:29400 GLOO_SOCKET_IFNAME=cable
hosts=()
for host in 0 1; do
    LOCAL_ADDR=10.0.0.$((host + 1)) timeout 180 \
        ip netns exec "${SPACES[host]}" "${run[@]}" >"$WORK/host_$host.out" 2>&1 &
    hosts+=($!)
done
for host in "${hosts[@]}"; do wait "$host"; done
grep -qh "^2 process(es) x 2 videos" "$WORK"/host_?.out

"$PYTHON" - "$WORK/one/log.txt" "$WORK/two/log.txt" <<'PY'
import json, math, sys

one, two = ([json.loads(line)["train_loss"] for line in open(path)] for path in sys.argv[1:])
print(f"losses of one process: {one}\nof two hosts:          {two}")
if not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, two, strict=True)):  # sums in another order
    sys.exit("error: they differ")
PY
echo "PASS: two hosts, the losses of one ($SECONDS s)"
