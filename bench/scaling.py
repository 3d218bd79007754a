"""Memory a process of pre-training under DDP and DeepSpeed's ZeRO, measured on CPU processes; what 8 and 64 would take.

    python bench/scaling.py [--sizes base large] [--rows ddp zero2 ...] [--processes 2] [flags of run_mae_pretraining]
    python bench/scaling.py --skip_measuring       # only the table computed for more processes
    python bench/scaling.py --cost                 # GPU hours computed from a step's operations; nothing is run

Every row starts its own processes (gloo) and takes two steps by the engines and backends that train, on clips of one
token frame of 2 x 2, which leave no activations to speak of. The second step is looked at: all live tensors, a storage
counted once. weights, copy (float32 partitions that DeepSpeed steps instead of the weights) and Adam are as they are
between steps, gradients as they are right after backward; other is every other tensor between steps (buckets of
communication; DDP's are where the gradients lie);
between and after are the sums of all at these two times, peak the largest sum during the step. All are of the process
that holds most; RSS is its resident memory over what it was before there was a model.

paper: after backward by the ZeRO paper's formulas (Rajbhandari 2020) for float32 weights and gradients and Adam, which
need 4 + 4 + 8 bytes a parameter: DDP and stage 0 all 16, stage 1 8 + 8 / N, stage 2 4 + 12 / N, stage 3 16 / N. ours:
the formula in predict(), from what DeepSpeed 0.19 was seen to keep.
"""

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from common import choose_rows, count_flop, header, print_table, status_bytes
from without_gpu import GPU, LiveBytes, fake_gpu, prepare

from run_mae_pretraining import build_mae, build_sampler, check_flags, get_parser
from runtime.backend import Backend
from runtime.flags import resolve_amp
from runtime.launch import run_script
from runtime.zero import TUNABLE, import_deepspeed
from utils import UsageError, available_memory, barrier, everyone, init_distributed, is_main_process, seed_everything

LEAN = Path(__file__).with_name("zero3_lean.json")
ZERO = "--enable_deepspeed --zero_stage"
ROWS = {  # name: its flags
    "ddp": "",
    "zero0": f"{ZERO} 0",
    "zero1": f"{ZERO} 1",
    "zero1-accum-2": f"{ZERO} 1 --accum_iter 2",
    "zero2": f"{ZERO} 2",
    "zero3": f"{ZERO} 3",
    "zero3-lean": f"{ZERO} 3 --deepspeed_config {LEAN}",
    "zero2-offload": f"{ZERO} 2 --offload cpu",
    "tats-ddp": "--mask_type tats",
    "tats-zero2": f"--mask_type tats {ZERO} 2",
}
MODELS = {"tiny": "tiny_patch8_64"} | {size: f"{size}_patch16_224" for size in ("small", "base", "large", "huge")}
CATEGORIES = ("weights", "copy", "adam", "gradients", "other")
IMPORTS = 900_000_000  # bytes of a process that has imported torch and deepspeed


def parse(size: str, row: str, rest: list[str], processes: int) -> argparse.Namespace:
    """Flags of run_mae_pretraining.py for clips of 4 tokens; the user's come last but for the row's."""
    side = 16 if size == "tiny" else 32
    defaults = f"--input_size {side} --num_frames 2 --batch_size 1 --print_freq {10**9}"
    model = f"--model pretrain_videomae_{MODELS[size]} --device cpu"
    args = get_parser().parse_args([*defaults.split(), *rest, *model.split(), *ROWS[row].split()])
    args.world_size = processes
    check_flags(args)
    return args


def parameter_sizes(args) -> list[int]:
    """Elements of every trained parameter; nothing is allocated."""
    with torch.device("meta"):
        mae = build_mae(args)
        sampler = build_sampler(args, mae)
    return [p.numel() for module in (mae, sampler) for p in module.parameters()]


# --- formulas ----------------------------------------------------------------------------------------------------


def zero_stage(args) -> int | None:
    return args.zero_stage if args.enable_deepspeed else None


def paper_bytes(args, parameters: int, processes: int) -> float:
    """After backward, by the ZeRO paper's formulas for 4 + 4 + 8 bytes a parameter."""
    whole, shared = {1: (8, 8), 2: (4, 12), 3: (0, 16)}.get(zero_stage(args), (16, 0))
    return (whole + shared / processes) * parameters


def predict(args, sizes: list[int], processes: int) -> dict[str, float]:
    """Bytes a process by category, and `passing`, what the peak has besides them; activations, padding and Adam's step
    counts are left out. With --offload cpu all but weights and passing lie in host memory."""
    stage, count = zero_stage(args), sum(sizes)
    share = count / processes
    found = dict.fromkeys([*CATEGORIES, "passing"], 0.0) | {
        "weights": 4 * count, "adam": 8 * count, "gradients": 4 * count
    }  # fmt: skip
    if stage is None:
        return found  # gradients lie in DDP's buckets
    if stage == 0:
        found["passing"] = 4 * min(count, 5e8)  # gradients in a row for the all-reduce
        return found
    settings = TUNABLE["zero_optimization"]
    if args.deepspeed_config:
        settings = settings | json.loads(Path(args.deepspeed_config).read_text()).get("zero_optimization", {})
    bucket = 4 * settings["reduce_bucket_size"]
    found |= {"copy": 4 * share, "adam": 8 * share, "gradients": 4 * share}
    if stage < 3:
        if stage == 1 and args.accum_iter > 1:
            found["gradients"] = 4 * count  # the sum so far is in whole gradients
        found["other"] = 4 * share if args.offload == "cpu" else 0  # a second copy, on its way back
        # two buckets and the gradients of a third; or gradients in a row for the step, which offloading has already
        found["passing"] = 3 * bucket if args.offload == "cpu" else max(4 * share, 3 * bucket)
    else:
        whole = sum(size for size in sizes if size <= settings["stage3_param_persistence_threshold"])
        found["weights"] = 4 * share + 4 * whole
        found["other"] = bucket
        live = settings.get("stage3_max_live_parameters", 1e9) + settings["stage3_prefetch_bucket_size"]
        # weights that were gathered and are kept, and gradients of a bucket; or gradients in a row for the step
        found["passing"] = max(4 * min(count, live) + bucket, 4 * share)
    return found


def after_backward(found: dict[str, float]) -> float:
    return sum(found[name] for name in CATEGORIES)


# --- measuring ---------------------------------------------------------------------------------------------------


def tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def owned(backend: Backend) -> Iterator[tuple[str, torch.Tensor]]:
    """(category, tensor) of what belongs to a backend; a storage belongs to the first category that names it."""
    parameters, zero = list(backend.raw.parameters()), getattr(backend, "zero", None)
    stepped = [p for group in backend.optimizer.param_groups for p in group["params"]]
    stepped += tensors_in(getattr(zero, "fp32_partitioned_groups_flat", []))  # stage 3 shows them to Adam one by one
    for category, values in (
        ("weights", [p.data for p in parameters] + [getattr(p, "ds_tensor", None) for p in parameters]),
        ("gradients", [p.grad for p in parameters + stepped]),
        ("gradients", [getattr(p, "grad_accum", None) for p in parameters]),
        *(("gradients", getattr(zero, name, None)) for name in
          ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")),
        ("adam", list(backend.optimizer.state.values())),
        ("copy", stepped),
    ):  # fmt: skip
        for tensor in tensors_in(values):
            yield category, tensor


def census(backends: list[Backend], live: LiveBytes) -> dict[str, int]:
    """Bytes by category, and resident ones."""
    found, seen = dict.fromkeys(CATEGORIES, 0), set()
    for backend in backends:
        for category, tensor in owned(backend):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found[category] += storage.nbytes()
    found["other"] = live.live - sum(found.values())
    return found | {"rss": status_bytes("VmRSS")}


def measure_step(args) -> dict[str, int]:
    """Bytes of this process in the second step."""
    if args.enable_deepspeed:
        import_deepspeed()  # not to be counted
    before = status_bytes("VmRSS")
    with LiveBytes() as live:
        run, _, step = prepare(args, torch.device("cpu"))
        backends = [backend for backend in (run.backend, run.tats_backend) if backend is not None]
        ends: list[dict[str, int]] = []  # of backward passes

        for backend in backends:

            def take_step(take_step=backend.step) -> bool:
                ends.append(census(backends, live))
                return take_step()

            backend.step = take_step

        step(0)
        ends.clear()
        live.peak = live.live
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        step(1)
        rss_peak = status_bytes("VmHWM")
        rest = census(backends, live)
    after = max(ends, key=lambda found: sum(found[name] for name in CATEGORIES))
    return {name: rest[name] for name in CATEGORIES} | {
        "gradients": after["gradients"],
        "between": sum(rest[name] for name in CATEGORIES),
        "after": sum(after[name] for name in CATEGORIES),
        "peak": live.peak,
        "rss_between": rest["rss"] - before,
        "rss_peak": rss_peak - before,
    }


def work(flags: argparse.Namespace) -> None:
    """One of a row's processes; the main one leaves the largest counts in the file --worker names."""
    args = parse(flags.sizes[0], flags.rows[0], flags.rest, flags.processes)
    init_distributed(args)
    resolve_amp(args)
    seed_everything(args.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        found = max(everyone(measure_step(args)), key=lambda found: found["after"])
    if is_main_process():
        Path(flags.worker).write_text(json.dumps(found))
    barrier()  # a process that ends may take the others with it


def measure(size: str, row: str, flags: argparse.Namespace, needed: float) -> dict[str, int]:
    """measure_step's numbers of the process that holds most, from processes of their own. Raises UsageError."""
    needed, free = flags.processes * (needed + IMPORTS), available_memory()
    if needed > free:
        raise UsageError(f"{row} of {size} takes about {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free: choose --rows "
                         "or smaller --sizes")  # fmt: skip
    # Large tensors go back to the system when they are freed, so that resident memory tells what is there.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "counts.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(flags.processes), __file__, *flags.rest]
        command += ["--worker", str(file), "--sizes", size, "--rows", row, "--processes", str(flags.processes)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not file.exists():  # whatever became of the processes after that: gloo's threads may abort an exit
            reasons = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
            sys.stderr.write("" if reasons else result.stderr)
            reason = reasons[0].removeprefix("error: ") if reasons else f"status {result.returncode}"
            raise UsageError(f"{row} of {size} failed: {reason}")
        return json.loads(file.read_text())


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


def measured_table(size: str, flags: argparse.Namespace) -> None:
    rows = choose_rows(flags, list(ROWS))
    print(header(torch.device("cpu"), "fp32"))
    args = parse(size, rows[0], flags.rest, flags.processes)
    clip = f"{args.num_frames} x {args.input_size} x {args.input_size}, batch {args.batch_size}"
    print(f"{args.model}, {clip}, {flags.processes} processes, seed {args.seed}; MB (10^6 bytes) a process")
    table = []
    try:
        table.extend(measured_row(size, row, flags) for row in rows)
    finally:  # what was measured before a row failed
        columns = ["backend", "M parameters", *CATEGORIES, "between", "after", "paper", "after / paper", "ours"]
        print_table([*columns, "after / ours", "peak", "peak / ours", "RSS", "RSS peak"], table)


def measured_row(size: str, row: str, flags: argparse.Namespace) -> list[str]:
    args = parse(size, row, flags.rest, flags.processes)
    sizes = parameter_sizes(args)
    predicted = predict(args, sizes, flags.processes)
    ours, paper = after_backward(predicted), paper_bytes(args, sum(sizes), flags.processes)
    found = measure(size, row, flags, ours + predicted["passing"])
    line = [row, f"{sum(sizes) / 1e6:.2f}"]
    line += [megabytes(found[name]) for name in (*CATEGORIES, "between", "after")]
    line += [megabytes(paper), f"{found['after'] / paper:.3f}", megabytes(ours), f"{found['after'] / ours:.3f}"]
    line += [megabytes(found["peak"]), f"{found['peak'] / (ours + predicted['passing']):.3f}"]
    return line + [megabytes(found[name]) for name in ("rss_between", "rss_peak")]


# --- computing ---------------------------------------------------------------------------------------------------


def predicted_tables(flags: argparse.Namespace) -> None:
    """The same for more processes: by the paper, and by predict() at the peak."""
    rows = [row for row in choose_rows(flags, list(ROWS)) if "accum" not in row]
    paper, on_gpu, on_host = [], [], []
    for size in flags.sizes or list(MODELS)[1:]:
        models = {row: (args := parse(size, row, flags.rest, 1), parameter_sizes(args)) for row in rows}
        for processes in (1, 2, 8, 64):
            for table in (paper, on_gpu, on_host):
                table.append([f"{size} x {processes}"])
            for args, sizes in models.values():
                found = predict(args, sizes, processes)
                everything = sum(found.values())
                gpu = found["weights"] + found["passing"] if args.offload == "cpu" else everything
                paper[-1].append(f"{paper_bytes(args, sum(sizes), processes) / 1e9:.2f}")
                on_gpu[-1].append(f"{gpu / 1e9:.2f}")
                on_host[-1].append(f"{(everything - gpu) / 1e9:.2f}")
    for title, table in {
        "after backward by the paper's formula": paper,
        "at the peak by predict(), without activations; with offload what stays on the GPU": on_gpu,
        "with offload what lies in host memory": on_host,
    }.items():
        if table is not on_host or any("offload" in row for row in rows):
            print(f"computed, not measured: GB (10^9 bytes) a process\n{title}")
            print_table(["model x processes", *rows], table)


GPUS = {"H100": (989e12, 450e9), "A100": (312e12, 300e9)}  # bf16 FLOP/s; bytes/s of NVLink, one way
GPUS_A_NODE = 8
NETWORK = 25e9  # bytes/s a GPU between nodes
SSV2_CLIPS = 168_913  # of training
EPOCHS = (400, 800)


def step_seconds(flop: float, parameters: int, gpu: str, gpus: int, share: float, passes: int = 2) -> tuple[float, ...]:
    """Seconds of a step's arithmetic, and of its traffic one after the other: float32 gradients (and ZeRO's weights)
    in a ring, passes x 4 bytes x parameters x (N - 1) / N; 2 passes for DDP and ZeRO 1 and 2, 3 for ZeRO 3."""
    peak, link = GPUS[gpu]
    traffic = passes * 4 * parameters * (gpus - 1) / gpus
    return flop / (share * peak), traffic / (link if gpus <= GPUS_A_NODE else NETWORK)


def cost_table(flags: argparse.Namespace) -> None:
    table = []
    for size in flags.sizes or list(MODELS)[1:]:
        for masks in ("tube", "tats"):
            defaults = f"--mask_ratio 0.95 --batch_size 32 --model pretrain_videomae_{MODELS[size]}"
            args = get_parser().parse_args([*defaults.split(), *flags.rest, "--mask_type", masks,
                                                           "--device", "cpu", "--amp", "bf16"])  # fmt: skip
            check_flags(args)
            if args.enable_deepspeed or args.compile:
                raise UsageError("--cost counts operations, which --enable_deepspeed and --compile do not change")
            args.rank, args.local_rank, args.world_size, args.print_freq = 0, 0, 1, 10**9
            with fake_gpu(), contextlib.redirect_stdout(io.StringIO()):
                with GPU:
                    _, _, step = prepare(args, GPU)
                flop = count_flop(lambda step=step: step(0))
            parameters = sum(parameter_sizes(args))
            clips = args.batch_size * args.accum_iter
            for gpu in GPUS:
                for gpus in (1, 8, 64):
                    seconds, traffic = step_seconds(flop, parameters, gpu, gpus, flags.share)
                    _, traffic3 = step_seconds(flop, parameters, gpu, gpus, flags.share, passes=3)
                    steps = SSV2_CLIPS // (clips * gpus)
                    days = [epochs * steps * (seconds + traffic) / 86400 for epochs in EPOCHS]
                    line = [f"{size} {masks}", gpu, str(gpus), f"{flop / clips / 1e12:.3f}", f"{seconds * 1e3:.1f}"]
                    line += [f"{traffic * 1e3:.1f}", f"{traffic3 * 1e3:.1f}", f"{clips / (seconds + traffic):.0f}"]
                    table.append(line + [f"{days[1] * gpus * 24:.0f}", *(f"{value:.2f}" for value in days)])
    batch = f"batch {args.batch_size} a GPU"
    clip = f"{args.num_frames} x {args.input_size} x {args.input_size}, mask ratio {args.mask_ratio}, {batch}"
    gpu = "; ".join(f"{name} {peak / 1e12:.0f} TFLOP/s, {link / 1e9:.0f} GB/s" for name, (peak, link) in GPUS.items())
    print(f"COMPUTED, NOT MEASURED: {clip}, {SSV2_CLIPS} clips an epoch (Something-Something v2), {torch.__version__}")
    print(f"assumed: {flags.share:.0%} of the bf16 peak; {gpu}, {NETWORK / 1e9:.0f} GB/s a GPU between nodes of 8")
    columns = ["model masks", "GPU", "GPUs", "TFLOP a clip", "ms a step", "DDP traffic ms", "ZeRO 3 traffic ms"]
    columns += ["clips/s a GPU", f"GPU hours {EPOCHS[1]}", *(f"days {epochs}" for epochs in EPOCHS)]
    print_table(columns, table)


def bench(flags: argparse.Namespace) -> None:
    if flags.worker:
        work(flags)
        return
    if flags.processes < 1 or not math.isfinite(flags.share) or not 0 < flags.share <= 1:
        raise UsageError("--processes must be at least 1, --share greater than 0 and at most 1")
    if flags.cost:
        cost_table(flags)
        return
    if not flags.skip_measuring:
        if not Path("/proc/self/clear_refs").exists():
            raise UsageError("this system does not tell a process's memory (/proc): --skip_measuring leaves it out")
        for size in flags.sizes or ["base", "large"]:
            measured_table(size, flags)
    predicted_tables(flags)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=list(MODELS), help="models (measured: base large; computed: "
                        "small base large huge)")  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"only these of {', '.join(ROWS)}")
    parser.add_argument("--processes", default=2, type=int, help="a measured row starts (2)")
    parser.add_argument("--skip_measuring", action="store_true", help="only what is computed for more processes")
    parser.add_argument("--cost", action="store_true", help="GPU hours of pre-training instead, computed")
    parser.add_argument("--share", default=0.35, type=float, help="of a GPU's peak that --cost assumes (0.35)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the file a row's process writes
    flags, rest = parser.parse_known_args()
    flags.rest = rest
    run_script(bench, flags)


if __name__ == "__main__":
    main()
