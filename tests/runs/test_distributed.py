"""One process, two processes, accumulation, DDP and every ZeRO stage train the same; all of them stop, save and go on,
also as one another. Two launches of distributed_worker.py do the work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_class_finetuning
from datasets.moving_shapes import write_dataset
from tests.helpers.runs import assert_names

ROOT = Path(__file__).resolve().parents[2]
MASKS = ("tube", "adamae", "tats")
slow = pytest.mark.slow
tats_and_slowly_the_others = pytest.mark.parametrize(
    "mask", ["tats", pytest.param("tube", marks=slow), pytest.param("adamae", marks=slow)]
)
STEPS = 14  # 2 epochs of 7
STAGES = (0, 1, 2, 3)
# All on float32: what differs is the order of sums. Measured: 2e-7 at the most.
TOLERANCE = 2e-6


def zero(stage: int) -> list[str]:
    return ["--enable_deepspeed", "--zero_stage", str(stage)] + ["--deepspeed_config", "ZERO3"] * (stage == 3)


NORMALIZED = {"ddp": [], "zero0": zero(0), "zero2": zero(2), "zero3": zero(3)}
# The cases of make test; `make test-slow` runs all. Some are only what others are compared with.
QUICK = {
    "tats-ddp", "tats-zero2", "tats-zero3", "tats-one", "tats-accumulated", "tube-one", "stopped-zero2", "zero3-to-ddp",
    "two-to-one", "one-goes-on", "nan-start0-ddp", "normalized-start0-ddp", "normalized-start0-one",
    "listwise-start0-ddp", "listwise-start0-one", "finetune-ddp", "finetune-zero1", "finetune-one",
}  # fmt: skip
at_every_stage = pytest.mark.parametrize(
    "stage", [stage if f"tats-zero{stage}" in QUICK else pytest.param(stage, marks=slow) for stage in STAGES]
)


def parameters(prefix: str, names) -> list:
    """Parameters of a test about the cases PREFIX-NAME."""
    return [name if f"{prefix}-{name}" in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Runs:
    """The cases' results by name, and the folders of their runs."""

    def __init__(self, folder: Path):
        self.folder, self.results = folder, {}
        self.data = write_dataset(folder / "shapes", train=56, val=10, size=32, frames=12)
        # the tiny model's weights are all smaller than what ZeRO 3 leaves whole by default
        (folder / "zero3.json").write_text(
            json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage3_param_persistence_threshold": 0}})
        )

    def flags(self, name: str, mask: str, batch_size: int, *more) -> list[str]:
        flags = [
            "--data_path", self.data / "train.csv", "--output_dir", self.folder / name, "--mask_type", mask,
            "--model", "pretrain_videomae_tiny_patch8_64", "--input_size", 32, "--num_frames", 4, "--sampling_rate", 2,
            "--decoder_depth", 1, "--num_workers", 0, "--device", "cpu", "--print_freq", 3, "--warmup_epochs", 0,
            "--lr", 0.01, "--tats_lr", 1e-3, "--epochs", 2, "--tats_start_epoch", 0 if "start0" in name else 1,
            "--save_ckpt_freq", 1, "--clip_grad", 0.5, "--batch_size", batch_size, *more,
        ]  # fmt: skip
        flags = [str(flag) for flag in flags]
        return flags

    def finetune_flags(self, name: str, batch_size: int, *more) -> list[str]:
        flags = [
            "--data_path", self.data, "--output_dir", self.folder / name, "--data_set", "custom", "--nb_classes", 10,
            "--model", "vit_tiny_patch8_64", "--input_size", 32, "--num_frames", 4, "--sampling_rate", 2,
            "--num_workers", 0, "--device", "cpu", "--print_freq", 3, "--warmup_epochs", 0, "--lr", 0.03, "--epochs", 2,
            "--num_sample", 1, "--mixup", 0, "--cutmix", 0, "--drop_path", 0, "--test_num_segment", 2,
            "--test_num_crop", 3, "--init_scale", 1, "--batch_size", batch_size, *more,
        ]  # fmt: skip
        return [str(flag) for flag in flags]

    def launch(self, cases: list[dict], processes: int) -> None:
        cases_file, result = (self.folder / f"{what}{processes}.json" for what in ("cases", "result"))
        cases_file.write_text(json.dumps(cases).replace("ZERO3", str(self.folder / "zero3.json")))
        command = [sys.executable]
        if processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
        command += [str(ROOT / "tests/helpers/distributed_worker.py"), str(cases_file), str(result)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(self.folder / "compiled")}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
        self.results |= json.loads(result.read_text())

    def losses(self, name: str) -> list[float]:
        found = self.results[name]["losses"]
        return [found[str(step)] for step in range(STEPS)]

    def log(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("distributed"))
    with_slow = "not slow" not in request.config.option.markexpr
    two = []
    for mask in MASKS:
        for name, more in [("ddp", []), *((f"zero{stage}", zero(stage)) for stage in STAGES)]:
            name = f"{mask}-{name}"
            two.append({"name": name, "flags": runs.flags(name, mask, 4, *more)})
    for name, more in [("ddp", []), *((f"zero{stage}", zero(stage)) for stage in STAGES)]:
        name = f"stopped-{name}"
        flags = runs.flags(name, "tats", 4, *more)
        two.append({"name": name, "flags": flags, "stop_at": 9, "then": flags})
    flags = [runs.flags("zero3-to-ddp", "tats", 4, *zero(3)), runs.flags("zero3-to-ddp", "tats", 4)]
    two.append({"name": "zero3-to-ddp", "flags": flags[0], "stop_at": 9, "then": flags[1]})
    flags = [runs.flags("ddp-to-zero2", "tats", 4), runs.flags("ddp-to-zero2", "tats", 4, *zero(2))]
    two.append({"name": "ddp-to-zero2", "flags": flags[0], "stop_at": 9, "then": flags[1]})
    two.append({"name": "two-to-one", "flags": runs.flags("two-to-one", "tube", 4, *zero(3)), "stop_at": 3})
    for name, more in [("ddp", []), ("zero0", zero(0)), ("zero1", zero(1)), ("zero3", zero(3))]:
        name = f"nan-start0-{name}"
        two.append({"name": name, "flags": runs.flags(name, "tats", 4, *more), "nan_at": [4, 5]})
    two.append({"name": "bf16-ddp", "flags": runs.flags("bf16-ddp", "tube", 4, "--amp", "bf16")})
    two.append({"name": "bf16-zero2", "flags": runs.flags("bf16-zero2", "tube", 4, "--amp", "bf16", *zero(2))})
    if with_slow:  # DeepSpeed compiles its Adam
        offload = runs.flags("offload", "tube", 4, *zero(2), "--offload", "cpu")
        two.append({"name": "offload", "flags": offload})
    ppo = ["--tats_rollout_steps", 2, "--ppo_epochs", 2, "--accum_iter", 2]
    two.append({"name": "rollouts-start0-ddp", "flags": runs.flags("rollouts-start0-ddp", "tats", 2, *ppo)})
    two.append(
        {"name": "rollouts-start0-zero2", "flags": runs.flags("rollouts-start0-zero2", "tats", 2, *ppo, *zero(2))}
    )
    for name, more in NORMALIZED.items():
        name = f"normalized-start0-{name}"
        two.append({"name": name, "flags": runs.flags(name, "tats", 4, "--normalize_advantage", *more)})
    flags = [*ppo, "--normalize_advantage"]
    two.append(
        {"name": "normalized-start0-rollouts2", "flags": runs.flags("normalized-start0-rollouts2", "tats", 2, *flags)}
    )
    listwise = ["--tats_objective", "listwise"]
    for name, size, more in [("ddp", 4, []), ("zero2", 4, zero(2)), ("rollouts2", 2, ppo)]:
        name = f"listwise-start0-{name}"
        two.append({"name": name, "flags": runs.flags(name, "tats", size, *listwise, *more)})
    for name, more in [("ddp", []), ("zero1", zero(1)), ("zero3", zero(3)), ("ema", [*zero(2), "--model_ema"])]:
        name = f"finetune-{name}"
        two.append({"name": name, "flags": runs.finetune_flags(name, 4, *more), "finetunes": True})
    flags = runs.finetune_flags("finetune-stopped", 4, *zero(3))
    two.append({"name": "finetune-stopped", "flags": flags, "finetunes": True, "stop_at": 9, "then": flags})
    runs.launch([case for case in two if with_slow or case["name"] in QUICK], 2)
    one = []
    for mask in MASKS:
        one.append({"name": f"{mask}-one", "flags": runs.flags(f"{mask}-one", mask, 8)})
        accumulated = runs.flags(f"{mask}-accumulated", mask, 4, "--accum_iter", 2)
        one.append({"name": f"{mask}-accumulated", "flags": accumulated})
    for name, size, more in [("one", 8, []), ("accumulated", 4, ["--accum_iter", 2]), ("rollouts1", 4, ppo)]:
        name = f"normalized-start0-{name}"
        one.append({"name": name, "flags": runs.flags(name, "tats", size, "--normalize_advantage", *more)})
    for name, size, more in [("one", 8, []), ("rollouts1", 4, ppo)]:
        name = f"listwise-start0-{name}"
        one.append({"name": name, "flags": runs.flags(name, "tats", size, *listwise, *more)})
    one.append({"name": "finetune-one", "flags": runs.finetune_flags("finetune-one", 8), "finetunes": True})
    one.append({"name": "one-goes-on", "flags": runs.flags("two-to-one", "tube", 8)})
    if with_slow:
        one.append(
            {"name": "alone-zero3", "flags": runs.flags("alone-zero3", "tube", 8, *zero(3))}
        )  # last: makes a group
    runs.launch([case for case in one if with_slow or case["name"] in QUICK], 1)
    return runs


@tats_and_slowly_the_others
def test_one_process_two_processes_and_accumulation_follow_the_same_losses(runs, mask):
    reference = runs.losses(f"{mask}-one")
    assert reference[-1] < 0.97 * reference[0]  # it trains
    for name in ("ddp", "accumulated"):
        assert runs.losses(f"{mask}-{name}") == pytest.approx(reference, rel=TOLERANCE), name


SAMPLER_VALUES = ("value_loss", "entropy", "value", "sampler_grad_norm")


@pytest.mark.parametrize(
    "name, reference",
    [
        ("ddp", "one"),
        *(pytest.param(name, "one", marks=slow) for name in ("accumulated", "zero0", "zero2", "zero3")),
        pytest.param("rollouts2", "rollouts1", marks=slow),
    ],
)
def test_normalised_advantages_do_not_depend_on_how_the_batch_is_shared_out(runs, name, reference):
    """One mean and one deviation for a step's clips, in one process, in two, in micro-batches. Measured: 1e-7 at the
    most; where each micro-batch has its own, gradient norm and entropy of the second epoch are 8e-4 and 3e-4 apart."""
    logs = [runs.log(f"normalized-start0-{run}") for run in (name, reference)]
    for record, expected in zip(*logs, strict=True):
        for value in SAMPLER_VALUES:
            found, right = (entry[f"train_{value}"] for entry in (record, expected))
            assert found == pytest.approx(right, rel=TOLERANCE, abs=0), value
        assert record["train_policy_loss"] == pytest.approx(expected["train_policy_loss"], abs=1e-6)
    assert runs.losses(f"normalized-start0-{name}") == pytest.approx(
        runs.losses(f"normalized-start0-{reference}"), rel=TOLERANCE
    )
    assert abs(logs[1][0]["train_policy_loss"]) < 1e-5 or reference != "one"  # the mean is 0 over the step


@pytest.mark.parametrize(
    "name, reference",
    [("ddp", "one"), *(pytest.param(*pair, marks=slow) for pair in (("zero2", "one"), ("rollouts2", "rollouts1")))],
)
def test_listwise_does_not_depend_on_how_the_batch_is_shared_out(runs, name, reference):
    logs = [runs.log(f"listwise-start0-{run}") for run in (name, reference)]
    for record, expected in zip(*logs, strict=True):
        for value in ("train_policy_loss", "train_entropy", "train_sampler_grad_norm"):
            assert record[value] == pytest.approx(expected[value], rel=1e-5), value
        assert "train_value" not in record
    assert logs[0][1]["train_entropy"] < logs[0][0]["train_entropy"] < 1  # the sampler learns
    found, right = (runs.losses(f"listwise-start0-{run}") for run in (name, reference))
    assert found == pytest.approx(right, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["tats-ddp", "finetune-ddp"])
def test_ranks_have_random_states_of_their_own(runs, name):
    """Dropout, stochastic depth and Mixup: equal draws on all ranks would be one draw for the whole batch."""
    (state,) = states(runs, name)
    first, second = state["rng"]
    assert not torch.equal(first["torch"], second["torch"])
    assert first["python"] != second["python"] and first["numpy"] != second["numpy"]


@at_every_stage
@tats_and_slowly_the_others
def test_zero_follows_ddp(runs, mask, stage):
    assert runs.losses(f"{mask}-zero{stage}") == pytest.approx(runs.losses(f"{mask}-ddp"), rel=TOLERANCE)
    assert (runs.results[f"{mask}-zero{stage}"]["partitioned"] > 0) == (stage == 3)


@slow
def test_one_process_trains_with_zero_3(runs):
    assert runs.losses("alone-zero3") == pytest.approx(runs.losses("tube-one"), rel=TOLERANCE)


@slow
def test_offload_follows_ddp(runs):
    assert runs.losses("offload") == pytest.approx(runs.losses("tube-ddp"), rel=TOLERANCE)


@slow
def test_bf16_under_zero_follows_bf16_under_ddp(runs):
    """Gradients cross the network in bf16 there."""
    assert runs.losses("bf16-zero2") == pytest.approx(runs.losses("bf16-ddp"), rel=2e-3)
    assert runs.losses("bf16-ddp") != runs.losses("tube-ddp")


@slow
def test_rollouts_and_passes_follow_ddp(runs):
    """Several steps of TATS's engine between two of the autoencoder's."""
    assert runs.losses("rollouts-start0-zero2") == pytest.approx(runs.losses("rollouts-start0-ddp"), rel=TOLERANCE)


@pytest.mark.parametrize("backend", parameters("stopped", ["ddp", "zero0", "zero1", "zero2", "zero3"]))
def test_stopped_in_mid_epoch_all_processes_save_the_same_step_and_go_on(runs, backend):
    """The last process gets SIGTERM at step 9; the losses, those of the log too, are the undisturbed run's."""
    result = runs.results[f"stopped-{backend}"]
    stopped = "stopped in epoch 1 after 4 of 7 batches; saved: the same command resumes here"
    assert result["ends"] == [[stopped, "finished"]] * 2
    assert runs.losses(f"stopped-{backend}") == runs.losses(f"tats-{backend}")
    assert (runs.folder / f"stopped-{backend}" / "checkpoint-1-step4.pth").exists()
    for record, expected in zip(runs.log(f"stopped-{backend}"), runs.log(f"tats-{backend}"), strict=True):
        assert {k: v for k, v in record.items() if "time" not in k and "memory" not in k} == {
            k: v for k, v in expected.items() if "time" not in k and "memory" not in k
        }


@pytest.mark.parametrize("name", ["zero3-to-ddp", pytest.param("ddp-to-zero2", marks=slow)])
def test_a_run_goes_on_under_another_backend(runs, name):
    assert runs.results[name]["ends"][0][1] == "finished"
    assert runs.losses(name) == pytest.approx(runs.losses("tats-ddp"), rel=TOLERANCE)


def test_a_zero_3_run_of_two_processes_goes_on_in_one(runs):
    first, second = runs.results["two-to-one"]["losses"], runs.results["one-goes-on"]["losses"]
    assert {int(step) for step in first} == set(range(5)) and {int(step) for step in second} == set(range(5, STEPS))
    together = [(first | second)[str(step)] for step in range(STEPS)]
    assert together == pytest.approx(runs.losses("tube-one"), rel=TOLERANCE)
    assert runs.log("two-to-one")[0]["train_loss"] == pytest.approx(runs.log("tube-one")[0]["train_loss"], rel=1e-6)


@pytest.mark.parametrize("backend", parameters("nan-start0", ["ddp", "zero0", "zero1", "zero3"]))
def test_an_error_that_is_not_finite_on_one_process_is_skipped_by_all_and_named(runs, backend):
    name = f"nan-start0-{backend}"
    assert runs.results[name]["ends"] == [["finished"]] * 2
    records = runs.log(name)
    assert [r["train_skipped_steps"] for r in records] == [2, 0]
    assert [r["train_sampler_skipped_steps"] for r in records] == [2, 0]
    found = runs.results[name]["losses"]
    sound = [found[str(step)] for step in range(STEPS) if step not in (4, 5)]
    reference = runs.results["nan-start0-ddp"]["losses"]
    assert sound == pytest.approx([reference[str(step)] for step in range(STEPS) if step not in (4, 5)], rel=TOLERANCE)
    assert all(loss == loss for loss in sound)
    lines = [json.loads(line) for line in (runs.folder / name / "skipped_steps.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"], line["rank"], line["loss"]) for line in lines] == [
        (0, 4, 1, "nan"), (0, 5, 1, "nan"),
    ]  # fmt: skip
    assert all(len(line["videos"]) == 4 and all(Path(v).exists() for v in line["videos"]) for line in lines)


def states(runs, *names):
    return [torch.load(runs.folder / name / "checkpoint-1.pth", weights_only=True) for name in names]


@at_every_stage
def test_checkpoints_are_the_same_whatever_the_backend(runs, stage):
    """Names, shapes, dtypes and Adam's moments, whole."""
    ours, plain = states(runs, f"tats-zero{stage}", "tats-ddp")
    assert ours.keys() == plain.keys()
    for part in ("model", "tats"):
        assert list(ours[part]) == list(plain[part])
        for name, value in plain[part].items():
            assert ours[part][name].dtype == value.dtype and ours[part][name].shape == value.shape
            assert torch.allclose(ours[part][name], value, atol=1e-4), name
    for optimizer in ("optimizer", "tats_optimizer"):
        assert ours[optimizer]["state"].keys() == plain[optimizer]["state"].keys()
        for i, kept in plain[optimizer]["state"].items():
            here = ours[optimizer]["state"][i]
            assert here["step"] == kept["step"] and here["step"].dtype == kept["step"].dtype
            for moment in ("exp_avg", "exp_avg_sq"):
                scale = kept[moment].abs().max().item()
                assert torch.allclose(here[moment], kept[moment], atol=1e-3 * scale + 1e-12), (optimizer, i)


def test_a_checkpoint_of_zero_3_is_fine_tuned_in_one_process(runs, tmp_path, capsys):
    checkpoint = runs.folder / "tats-zero3" / "checkpoint-1.pth"
    run_class_finetuning.main([
        "--finetune", str(checkpoint), "--data_path", str(runs.data), "--data_set", "custom", "--nb_classes", "10",
        "--model", "vit_tiny_patch8_64", "--input_size", "32", "--num_frames", "4", "--batch_size", "8", "--epochs",
        "1", "--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path), "--test_num_segment", "1",
        "--test_num_crop", "1", "--warmup_epochs", "0",
    ])  # fmt: skip
    assert_names(capsys.readouterr().out, checkpoint, "fc_norm.* (2)")
    assert (tmp_path / "test.json").exists()


def test_deepspeed_compiles_no_all_reduce_first(runs):
    """More than a minute on a CPU, and an error without a compiler."""
    assert not (runs.folder / "compiled" / "deepspeed_shm_comm").exists()


def test_the_configuration_is_in_the_output_folder(runs):
    mae, tats = (
        json.loads((runs.folder / "tats-zero2" / f"deepspeed_config_{name}.json").read_text())
        for name in ("mae", "tats")
    )
    assert mae["zero_optimization"]["stage"] == tats["zero_optimization"]["stage"] == 2
    assert (mae["gradient_clipping"], tats["gradient_clipping"]) == (0.5, 0.0)
    assert (mae["optimizer"]["params"]["eps"], tats["optimizer"]["params"]["eps"]) == (1e-8, 1e-12)
    assert mae["train_batch_size"] == 8 and mae["train_micro_batch_size_per_gpu"] == 4


def predictions(runs, name: str) -> list[list[str]]:
    return [line.split(",")[1:] for line in (runs.folder / name / "predictions.csv").read_text().splitlines()]


@pytest.mark.parametrize("name", parameters("finetune", ["ddp", "zero1", "zero3", "ema", "stopped"]))
def test_fine_tuning_follows_one_process(runs, name):
    """26 parameter groups of layer decay; under ZeRO 3 validation and test run on a copy of the weights."""
    name = f"finetune-{name}"
    assert runs.losses(name) == pytest.approx(runs.losses("finetune-one"), rel=1e-5)
    stopped = "stopped in epoch 1 after 4 of 7 batches; saved: the same command resumes here"
    assert runs.results[name]["ends"] == [[stopped, "finished"] if name.endswith("stopped") else ["finished"]] * 2
    for record, expected in zip(runs.log(name), runs.log("finetune-one"), strict=True):
        assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        if name != "finetune-ema":
            assert record["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
            assert record["val_acc1"] == expected["val_acc1"]
    if name != "finetune-ema":
        assert predictions(runs, name) == predictions(runs, "finetune-one")
