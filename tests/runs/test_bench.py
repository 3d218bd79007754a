"""The commands in bench/ at their smallest sizes: tables, references, refusals. Nobody looks at the speed."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from run_mae_pretraining import build_mae, get_parser
from tests.helpers.runs import assert_names, naming

ROOT = Path(__file__).resolve().parents[2]
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


def test_attention_prints_a_table_for_each_dtype(run_here):
    tables = run_here(f"{SMALL_ATTENTION} --dtype fp32 bf16 --skip_memory")
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


@pytest.mark.slow
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
    with pytest.raises(SystemExit, match=r"naive.* 0\.001"):
        run_here(SMALL_ATTENTION)
    assert "ms" not in capsys.readouterr().out


def test_peak_growth_is_the_largest_sum_alive_at_once():
    """In a process of its own: in one that has freed as much before, the peak is not seen."""
    code = (
        "import torch; from common import peak_growth; "
        "call = lambda: [torch.ones(32, 2**20).sum() for _ in range(2)]; "
        "call(); print(peak_growth(call, torch.device('cpu')))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True)
    assert 128e6 < int(result.stdout) < 150e6, result.stderr


@pytest.mark.slow
def test_step_times_every_mask_type_beside_transformers():
    ((header, rows),) = run(f"{SMALL_STEP} --skip_memory")
    assert_names(header, 0.75, 2)
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


@pytest.mark.slow
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
    assert_names(header, "paper", 32)
    assert_names(header, 0.75)
    assert [row["paper reports (GB)"] for row in rows] == ["37.13"]
    assert float(rows[0]["weights, optimizer GB"]) == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--rows tube tubes", ["--rows tubes", "tube, random"]),
        ("--mask_ratio 2", ["--mask_ratio 2.0"]),
        ("--decoder_mask_ratio 0.5 --rows transformers", ["transformers", "--decoder_mask_ratio", "--rows"]),
    ],
)
def test_step_explains_what_it_cannot_do(run_here, flags, parts):
    with pytest.raises(SystemExit, match=naming(*parts)):
        run_here(f"{SMALL_STEP} {flags}")


def test_step_refuses_a_reference_that_disagrees(run_here, monkeypatch):
    import step

    monkeypatch.setattr(step, "load_weights", lambda *args: None)
    with pytest.raises(SystemExit, match=r"transformers\b.*\bloss\b.* \d+\.\d{6}\b.* \d+\.\d{6}\b"):
        run_here(f"{SMALL_STEP} --rows transformers")


def test_memory_computed_without_a_gpu_is_that_of_the_tensors(run_here):
    flags = "--model pretrain_videomae_tiny_patch8_64 --input_size 16 --num_frames 2 --mask_ratio 0.75"
    small, large = (
        {
            row["masks"]: row
            for row in run_here(
                f"bench/step.py --memory --device cpu --dtype fp32 --rows {rows} {flags} --batch_size {size}"
            )[0][1]
        }
        for size, rows in ((1000, "tube tats-mha"), (3000, "tats-mha"))
    )
    parameters = sum(p.numel() for p in build_mae(get_parser().parse_args(flags.split())).parameters())
    assert float(small["tube"]["weights, optimizer GB"]) == pytest.approx(12 * parameters / 1e9, abs=0.01)
    assert float(large["tats-mha"]["step GB"]) == pytest.approx(3 * float(small["tats-mha"]["step GB"]), rel=0.05)
    assert float(small["tats-mha"]["together GB"]) > float(small["tube"]["together GB"])


TINY_CLIP = ["--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "16", "--num_frames", "2"]


def test_shapes_alone_tell_the_operations_of_a_real_step(run_here, monkeypatch):
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


@pytest.fixture
def gpu(monkeypatch):
    """bench/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu")


def test_gpu_command_says_that_there_is_no_gpu(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench/gpu.py"])
    assert gpu.main() == 1
    assert "GPU" in capsys.readouterr().err


@pytest.fixture
def gpu_jobs(gpu, monkeypatch, tmp_path):
    """bench/gpu.py with small jobs; runs it and returns its status and the page."""
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
    assert "a table" in page and "half" in page
    assert_names(page, "status 3")
    assert_names(page, "stopped", "1 s")
    assert_names(page, "- absent: ", "no_such_package")
    record = json.loads((folder / "gpu.json").read_text())
    assert record["environment"]["torch"] and record["jobs"]["good"]["status"] == 0


def test_gpu_command_goes_on_where_it_was(gpu_jobs):
    run_command, folder = gpu_jobs
    run_command("--part", "1")
    assert run_command("--part", "1")[0] == 0 and (folder / "count").read_text() == "x"
    run_command("--part", "1", "--again")
    assert (folder / "count").read_text() == "xx"
    assert "a table" in run_command("--part", "2")[1]  # what other parts found stays
    assert_names(run_command("--part", "3", "--minutes", "0.5")[1], "0.5 minutes")


def test_gpu_page_names_what_no_part_has_run_yet(gpu_jobs):
    run_command, _ = gpu_jobs
    page = run_command("--part", "1")[1]
    for name, part in (("bad", 2), ("absent", 2), ("long", 3)):
        assert_names(page, f"- {name}: ", f"PART={part}")
    run_command("--part", "2")
    page = run_command("--part", "3")[1]
    assert_names(page, "- absent: ", "no_such_package")  # found by the part before
    assert "- bad" not in page and "PART=" not in page


def test_gpu_commit_is_not_another_one_for_what_the_command_writes(gpu, tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a", *command], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    (tmp_path / "docs").mkdir()
    for name in ("docs/GPU.md", "docs/gpu.json", "code.py"):
        (tmp_path / name).write_text("old")
    git("add", ".")
    git("commit", "-m", "a")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    clean = gpu.environment(dry=True)["commit"]
    for name in ("docs/GPU.md", "docs/gpu.json", "untracked"):
        (tmp_path / name).write_text("new")
    assert gpu.environment(dry=True)["commit"] == clean and "dirty" not in clean
    (tmp_path / "code.py").write_text("new")
    assert gpu.environment(dry=True)["commit"] == f"{clean}-dirty"


def test_gpu_job_that_is_too_slow_is_stopped_with_its_processes(gpu):
    job = gpu.Job(1, "Long", "", """-c "import subprocess; subprocess.run(['sleep', '60'])" """, limit=1)
    assert gpu.run_job(job, True, 60)["seconds"] < 30


def test_gpu_jobs_are_commands_that_exist(gpu):
    for job in gpu.JOBS.values():
        for command in (job.command, job.dry):
            first = command.split()[0]
            assert first == "-m" or (ROOT / first).exists()
    assert {job.part for job in gpu.JOBS.values()} == {1, 2, 3}


def test_step_times_decoder_depths_where_they_are_named(run_here):
    ((_, rows),) = run_here(f"{SMALL_STEP} --skip_memory --rows decoder-depth-1 tats-blocks-2")
    assert [row["masks"] for row in rows] == ["tube", "decoder-depth-1", "tats-blocks-2"]
