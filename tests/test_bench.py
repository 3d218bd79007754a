"""The commands in bench/ at their smallest sizes: tables, references, refusals. Nobody looks at the speed."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from optim_factory import parameter_groups
from run_mae_pretraining import build_mae, build_sampler, get_parser

ROOT = Path(__file__).resolve().parents[1]
SMALL_ATTENTION = "bench/attention.py --frames 2 --tokens 9 --dim 32 --heads 2 --rounds 1 --threads 1"
# one frame of 2 x 2 tokens, of which one is visible
SMALL_STEP = (
    "bench/step.py --tiny --num_frames 2 --input_size 16 --mask_ratio 0.75 --batch_size 2 --rounds 1 --threads 1"
)


def run(command: str) -> list[tuple[str, list[dict[str, str]]]]:
    """(header, rows) of every table a command prints."""
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return read_tables(result.stdout)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run without a new process for the command itself, which would import for seconds."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.chdir(ROOT)

    def call(command: str):
        monkeypatch.setattr(sys, "argv", command.split())
        importlib.import_module(Path(sys.argv[0]).stem).main()
        return read_tables(capsys.readouterr().out)

    return call


def read_tables(text: str) -> list[tuple[str, list[dict[str, str]]]]:
    return [read_table(part.splitlines()) for part in text.strip().split("\n\n")]


def read_table(lines: list[str]) -> tuple[str, list[dict[str, str]]]:
    """Two lines of header, then columns at least two blanks apart; of equal names the later one counts."""
    columns, *rows = (re.split(r"  +", line.strip()) for line in lines[2:])
    assert all(len(row) == len(columns) for row in rows)
    return "\n".join(lines[:2]), [dict(zip(columns, row, strict=True)) for row in rows]


def test_attention_prints_a_table_for_each_dtype():
    tables = run(f"{SMALL_ATTENTION} --dtype fp32 bf16 --skip_memory")
    assert [header.split(", ")[3] for header, _ in tables] == ["fp32", "bf16"]
    for _, rows in tables:
        by_name = {row["layer"]: row for row in rows}
        assert {"plain", "exact", "orthoformer", "naive"} <= by_name.keys() and len(by_name) == len(rows)
        assert by_name["plain"]["x plain"] == by_name["naive"]["x naive"] == "1.00"
        assert all(float(row[name]) > 0 for row in rows for name in ("forward ms", "both ms", "x plain", "x naive"))
        # forward and the gradients of both factors of qkv and proj; fused attention's backward pass is 2.5 forward ones
        expected = 3 * 2 * 18 * 32 * (3 * 32 + 32) + 3.5 * 2 * 2 * 18 * 18 * 32
        assert float(by_name["plain"]["GFLOP"]) == pytest.approx(expected / 1e9, rel=1e-3)


def test_attention_sweep_leaves_out_what_is_too_large(run_here):
    command = f"{SMALL_ATTENTION} --tokens 16 --sweep --naive_limit 2e-5 --rows plain naive --skip_memory"
    _, (_, rows) = run_here(command)
    naive = {row["N"]: row["both ms"] for row in rows if row["layer"] == "naive"}
    assert list(naive) == ["16", "32", "64", "128", "8", "72"]
    assert [n for n, cell in naive.items() if cell == "-"] == ["64", "128", "72"]
    assert all(row["x plain"] == "1.00" for row in rows if row["layer"] == "plain")


def test_attention_measures_memory_in_a_process_of_its_own(run_here):
    ((_, (row,)),) = run_here(f"{SMALL_ATTENTION} --tokens 512 --rows naive")
    weights = 4 * 2 * 1024**2 / 1e6
    assert 2 * weights < float(row["memory MB"]) < 10 * weights


def test_attention_refuses_a_naive_layer_that_disagrees(run_here, monkeypatch, capsys):
    import attention

    class Doubled(attention.Naive):
        def forward(self, x, num_frames):
            return 1.001 * super().forward(x, num_frames)

    monkeypatch.setattr(attention, "Naive", Doubled)
    with pytest.raises(SystemExit, match="exact and naive differ by 0.001"):
        run_here(SMALL_ATTENTION)
    assert "ms" not in capsys.readouterr().out


def test_peak_growth_is_the_largest_sum_alive_at_once(run_here):
    from common import peak_growth

    def call():
        for _ in range(2):
            torch.ones(32, 2**20)

    assert 128e6 < peak_growth(call, torch.device("cpu")) < 150e6


def test_step_times_every_mask_type_beside_transformers():
    ((header, rows),) = run(f"{SMALL_STEP} --skip_memory")
    assert "mask ratio 0.75, batch 2" in header
    by_name = {row["masks"]: row for row in rows}
    mask_types = next(a for a in get_parser()._actions if a.dest == "mask_type").choices
    for name in [*(name for name in mask_types if name != "tats"), "tats-2-passes", "transformers"]:
        assert float(by_name[name]["x tube"]) > 0
    assert {f"tats-{kind}" for kind in ("orthoformer", "trajectory", "mha")} <= by_name.keys()
    assert by_name["tube"]["x tube"] == by_name["transformers"]["x transformers"] == "1.00"
    flop = {name: float(row["TFLOP"]) for name, row in by_name.items()}
    assert flop["tats-2-passes"] > flop["tats-orthoformer"] > flop["tube"] > 0
    # what transformers computes for nothing: the hidden tokens' embedding, the visible ones in the last decoder block
    assert flop["tube"] < flop["transformers"] < 1.5 * flop["tube"]


def test_step_sweep_compares_sizes(run_here):
    _, *tables = run_here(f"{SMALL_STEP} --num_frames 8 --input_size 32 --rows tube --sweep --skip_memory")
    assert len(tables) == 3
    for (_, rows), flag in zip(tables, ("num_frames", "input_size", "mask_ratio"), strict=True):
        assert all(f"--{flag}" in row["masks"] for row in rows)
        assert all(row["x tube"] == "1.00" for row in rows if row["masks"].startswith("tube"))
        assert [row["x first"] for row in rows[:2]] == ["1.00", "1.00"]
    flop = [float(row["TFLOP"]) for _, rows in tables[:2] for row in rows if row["masks"].startswith("tube")]
    assert flop[0] < flop[1] < flop[2] and flop[3] < flop[4]


def test_step_memory_stands_beside_the_papers_figures(run_here):
    ((header, rows),) = run_here(f"{SMALL_STEP} --memory --rows decoder-depth-8")
    assert "the paper's batch is 32" in header and "mask ratio 0.75" in header
    assert [row["paper reports (GB)"] for row in rows] == ["37.13"]
    assert float(rows[0]["weights, optimizer GB"]) == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rows tube tubes", "--rows tubes: unknown; some of tube, random"),
        ("--mask_ratio 2", "--mask_ratio 2.0: must lie between 0 and 1"),
        ("--decoder_mask_ratio 0.5 --rows transformers", "transformers' model has no --loss l1"),
    ],
)
def test_step_explains_what_it_cannot_do(run_here, flags, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_here(f"{SMALL_STEP} {flags}")


def test_step_refuses_a_reference_that_disagrees(run_here, monkeypatch):
    import reference

    monkeypatch.setattr(reference, "load_weights", lambda *args: None)
    with pytest.raises(SystemExit, match="on the same weights and masks transformers' loss is .* nothing was timed"):
        run_here(f"{SMALL_STEP} --rows transformers")


def test_memory_computed_without_a_gpu_is_that_of_the_tensors(run_here):
    flags = "--model pretrain_videomae_tiny_patch8_64 --input_size 16 --num_frames 2 --mask_ratio 0.75 --amp none"
    small, large = (
        {
            row["masks"]: row
            for row in run_here(f"bench/memory.py --rows tube tats-mha {flags} --batch_size {size}")[0][1]
        }
        for size in (1000, 3000)
    )
    parameters = sum(p.numel() for p in build_mae(get_parser().parse_args(flags.split())).parameters())
    assert float(small["tube"]["weights, optimizer GB"]) == pytest.approx(12 * parameters / 1e9, abs=0.01)
    for name, row in small.items():
        activations = [float(r[name]["peak GB"]) - float(r[name]["weights, optimizer GB"]) for r in (small, large)]
        assert activations[1] == pytest.approx(3 * activations[0], rel=0.05), row
    assert float(small["tats-mha"]["peak GB"]) > float(small["tube"]["peak GB"])


SCALING_ROWS = ("ddp", "zero1-accum-2", "zero2", "zero3", "zero2-offload", "tats-ddp")


def count_rows(rank, folder):
    """What bench/scaling.py's processes do, for all rows in one group: resident memory means nothing here."""
    sys.path.insert(0, str(ROOT / "bench"))
    import scaling

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for row in SCALING_ROWS:
        args = scaling.parse("tiny", row, ["--deepspeed_config", str(folder / "config.json")] * ("zero" in row), 2)
        args.rank, args.local_rank, args.amp = rank, rank, "none"
        scaling.seed_everything(0)
        found[row] = scaling.measure_step(args)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def scaling_counts(tmp_path_factory):
    """Of two processes, with buckets of 1000 elements, and every weight spread in stage 3."""
    folder = tmp_path_factory.mktemp("scaling")
    zero = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
    (folder / "config.json").write_text(json.dumps({"zero_optimization": zero}))
    torch.multiprocessing.start_processes(count_rows, (folder,), nprocs=2, start_method="spawn")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


TINY_CLIP = ["--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "16", "--num_frames", "2"]


def tiny_parameters() -> tuple[int, int]:
    """Of the autoencoder: how many, and how many of them a process has where two share them: each of the two groups
    (with and without weight decay) is padded to a multiple of four."""
    groups = parameter_groups(build_mae(get_parser().parse_args(TINY_CLIP)), 0.05)
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    return sum(counts), sum(-(-count // 4) * 2 for count in counts)


@pytest.mark.parametrize("row", SCALING_ROWS[:-1])
def test_scaling_counts_are_the_bytes_of_the_layout(scaling_counts, row):
    whole, share = tiny_parameters()
    weights, copy, adam, gradients, other = {
        "ddp": (whole, 0, 2 * whole, whole, whole),  # buckets, in which the gradients lie
        "zero1-accum-2": (whole, share, 2 * share, whole, 0),
        "zero2": (whole, share, 2 * share, share, 0),
        "zero3": (share, share, 2 * share, share, 1000),
        "zero2-offload": (whole, share, 2 * share, share, share),
    }[row]
    stays = gradients * (row in ("zero3", "zero2-offload"))
    largest = 384 * 96  # elements of a weight
    for counts in scaling_counts:
        found = counts[row]
        assert found["weights"] == pytest.approx(4 * weights, rel=1e-3)
        assert found["copy"] == 4 * copy
        assert found["adam"] == pytest.approx(4 * adam, rel=1e-3)  # steps are counted too
        # a weight that lies on both sides of the cut has its whole gradient in both
        assert 4 * gradients <= found["gradients"] < 4 * (gradients + largest)
        small = 20_000 + 8 * largest * (row == "zero2-offload")  # position tables, the clip; two buffers on the way
        assert 4 * other <= found["other"] < 4 * other + small
        assert found["between"] == sum(found[name] for name in ("weights", "copy", "adam", "other")) + 4 * stays
        new = 0 if row == "ddp" else gradients - stays
        assert found["after"] >= found["between"] + 4 * new and found["peak"] >= found["after"]


def test_scaling_counts_the_sampler_too(scaling_counts):
    args = get_parser().parse_args([*TINY_CLIP, "--mask_type", "tats"])
    sampler = sum(p.numel() for p in build_sampler(args, build_mae(args)).parameters())
    whole, _ = tiny_parameters()
    for counts in scaling_counts:
        assert counts["tats-ddp"]["weights"] == 4 * (whole + sampler)
        assert counts["tats-ddp"]["adam"] == pytest.approx(8 * (whole + sampler), rel=1e-3)


def test_scaling_starts_processes_and_prints_what_they_held(run_here):
    measured, *computed = run_here("bench/scaling.py --sizes tiny --rows ddp")
    header, (row,) = measured
    assert "2 x 16 x 16" in header and "2 processes" in header
    whole, _ = tiny_parameters()
    for name, size in (("weights", 4), ("adam", 8), ("gradients", 4), ("between", 16), ("after", 16), ("paper", 16)):
        assert float(row[name]) == pytest.approx(size * whole / 1e6, abs=0.1)
    assert 0.99 < float(row["after / ours"]) < 1.02 and float(row["after / paper"]) == pytest.approx(1.0, abs=0.01)
    assert float(row["RSS peak"]) >= float(row["RSS"]) >= float(row["between"])  # tensors are resident memory
    assert len(computed) == 2  # nothing is offloaded


def test_scaling_formulas(run_here):
    (_, paper), (_, ours), (_, host) = run_here("bench/scaling.py --sizes base --skip_measuring")
    parameters = sum(p.numel() for p in build_mae(get_parser().parse_args([])).parameters()) / 1e9
    for rows, processes in (((paper[i], ours[i], host[i]), n) for i, n in enumerate((1, 2, 8, 64))):
        assert {row["model x processes"] for row in rows} == {f"base x {processes}"}
        expected = {"ddp": 16, "zero1": 8 + 8 / processes, "zero2": 4 + 12 / processes, "zero3": 16 / processes}
        for name, size in expected.items():
            assert float(rows[0][name]) == pytest.approx(size * parameters, abs=0.006)
        # with offload weights, and three buckets of 25 million elements
        assert float(rows[1]["ddp"]) == pytest.approx(16 * parameters, abs=0.006)
        assert float(rows[1]["zero2-offload"]) == pytest.approx(4 * parameters + 0.3, abs=0.006)
        assert float(rows[2]["zero2-offload"]) == pytest.approx(20 * parameters / processes, abs=0.006)


def test_scaling_cost_is_arithmetic(run_here):
    ((header, rows),) = run_here(
        "bench/scaling.py --cost --sizes tiny --input_size 16 --num_frames 2 --mask_ratio 0.75 --share 0.5"
    )
    assert "COMPUTED, NOT MEASURED" in header and "50% of the bf16 peak" in header and len(rows) == 12
    for row in rows:
        gpus, days = int(row["GPUs"]), float(row["days 800"])
        traffic, traffic3 = (float(row[f"{name} traffic ms"]) for name in ("DDP", "ZeRO 3"))
        assert (
            (traffic == 0 or gpus > 1)
            and (traffic > 0 or gpus < 64)
            and traffic3 == pytest.approx(1.5 * traffic, abs=0.11)
        )
        assert days == pytest.approx(2 * float(row["days 400"]), abs=0.011)
    import scaling

    # 989e12 / 2 operations a second; ring of 64 over 25 GB/s, of 8 over 450
    assert scaling.step_seconds(989e12, 10**9, "H100", 64, 0.5) == pytest.approx((2, 2 * 4 * 63 / 64 / 25))
    assert scaling.step_seconds(312e12, 10**9, "A100", 8, 1.0, passes=3) == pytest.approx((1, 3 * 4 * 7 / 8 / 300))


def test_scaling_counts_the_operations_of_a_real_step(run_here, monkeypatch):
    from common import count_flop
    from without_gpu import GPU, fake_gpu, prepare

    flags = [*TINY_CLIP, "--device", "cpu", "--amp", "none", "--batch_size", "2", "--mask_type", "tats"]
    args = get_parser().parse_args(flags)
    args.rank, args.local_rank, args.world_size = 0, 0, 1
    _, _, step = prepare(args, torch.device("cpu"))
    with fake_gpu():
        with GPU:
            _, _, shapes_alone = prepare(args, GPU)
        counted = count_flop(lambda: shapes_alone(0))
    assert counted == count_flop(lambda: step(0)) > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rows zero4", "--rows zero4: unknown; some of ddp, zero0"),
        ("--processes 0", "--processes must be at least 1"),
        ("--cost --share 35", "--share greater than 0 and at most 1"),
        ("--cost --compile", "--enable_deepspeed and --compile do not change"),
        ("--rows ddp --processes 1000000", "ddp of tiny takes about .* GB, .* are free: choose --rows"),
    ],
)  # fmt: skip
def test_scaling_explains_what_it_cannot_do(run_here, flags, message):
    with pytest.raises(SystemExit, match=message):
        run_here(f"bench/scaling.py --sizes tiny {flags}")


def test_scaling_hands_on_why_a_process_failed(run_here, monkeypatch):
    run_here("bench/scaling.py --sizes tiny --skip_measuring --rows ddp")
    result = subprocess.CompletedProcess([], 1, "", "noise\nerror: no room left\nTraceback")
    monkeypatch.setattr("scaling.subprocess.run", lambda *args, **kwargs: result)
    with pytest.raises(SystemExit, match="^error: ddp of tiny failed: no room left$"):
        run_here("bench/scaling.py --sizes tiny --rows ddp")


@pytest.fixture
def gpu(monkeypatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu")


def test_gpu_command_says_that_there_is_no_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py"])
    assert gpu.main() == 1
    assert "no GPU" in capsys.readouterr().err


@pytest.fixture
def gpu_jobs(monkeypatch, tmp_path):
    """bench/gpu.py with three small jobs; runs it and returns its status and the page."""
    import gpu

    jobs = {
        "good": gpu.Job(
            1, "Good", "-c 'print(1)'", f"-c \"open('{tmp_path}/count', 'a').write('x'); print('a table')\""
        ),
        "bad": gpu.Job(2, "Bad", "", "-c 'print(\"half\"); raise SystemExit(3)'"),
        "absent": gpu.Job(2, "Absent", "", "-c 'print(1)'", ("no_such_package",)),
        "long": gpu.Job(3, "Long", "", "-c 'import time; time.sleep(60)'", limit=1),
    }
    monkeypatch.setattr(gpu, "JOBS", jobs)

    def run_command(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry_run", "--output", str(tmp_path), *flags])
        return gpu.main(), (tmp_path / "GPU.md").read_text()

    return run_command, tmp_path


def test_gpu_command_writes_what_ran_what_failed_and_what_did_not_run(gpu_jobs):
    run_command, folder = gpu_jobs
    status, page = run_command()
    assert status == 1
    assert "a table" in page and "half" in page and "**ended with status 3**" in page and "stopped after 1 s" in page
    assert "- absent: needs the package no_such_package" in page
    record = json.loads((folder / "gpu.json").read_text())
    assert record["environment"]["torch"] and record["jobs"]["good"]["status"] == 0


def test_gpu_command_goes_on_where_it_was(gpu_jobs):
    run_command, folder = gpu_jobs
    run_command("--part", "1")
    assert run_command("--part", "1")[0] == 0 and (folder / "count").read_text() == "x"
    run_command("--part", "1", "--again")
    assert (folder / "count").read_text() == "xx"
    assert "a table" in run_command("--part", "2")[1]  # what other parts found stays
    assert "0.5 minutes were over" in run_command("--part", "3", "--minutes", "0.5")[1]


def test_gpu_jobs_are_commands_that_exist(gpu):
    for job in gpu.JOBS.values():
        for command in (job.command, job.dry):
            first = command.split()[0]
            assert first == "-m" or (ROOT / first).exists()
    assert {job.part for job in gpu.JOBS.values()} == {1, 2, 3}


def test_step_times_decoder_depths_where_they_are_named(run_here):
    ((_, rows),) = run_here(f"{SMALL_STEP} --skip_memory --rows decoder-depth-1 tats-blocks-2")
    assert [row["masks"] for row in rows] == ["tube", "decoder-depth-1", "tats-blocks-2"]
