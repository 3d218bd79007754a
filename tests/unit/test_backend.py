"""DeepSpeed's configuration from flags, and what is refused. Training with it: test_distributed.py."""

import json
import re
import sys
import types

import pytest
import torch

import run_class_finetuning
import run_mae_pretraining
from runtime import zero
from runtime.zero import deepspeed_config
from tests.helpers.runs import assert_names, naming

FLAGS = dict(
    zero_stage=2, offload="none", fused_adam="torch", opt="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-7, batch_size=4,
    accum_iter=3, world_size=2, clip_grad=None, amp="none",
)  # fmt: skip


def written(tmp_path, content) -> str:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_every_setting_is_explicit():
    config = deepspeed_config(**FLAGS)
    assert config["gradient_clipping"] == 0.0  # left out, DeepSpeed would clip at 1
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 3)
    assert config["train_batch_size"] == 24
    adam = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.0, "adam_w_mode": True}
    assert config["optimizer"] == {"type": "AdamW", "params": adam | {"torch_adam": True, "fused": True}}
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert config["zero_optimization"]["reduce_bucket_size"] <= 5e7  # 5e8, DeepSpeed's own, is 2 GB
    assert [config[name]["enabled"] for name in ("torch_autocast", "bf16", "fp16")] == [False] * 3
    json.dumps(config)


def test_flags_reach_the_configuration():
    changed = dict(zero_stage=3, offload="cpu", fused_adam="deepspeed", opt="adam", clip_grad=0.3, amp="bf16")
    config = deepspeed_config(**FLAGS | changed)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["optimizer"]["type"] == "Adam" and config["optimizer"]["params"]["adam_w_mode"] is False
    assert config["optimizer"]["params"]["torch_adam"] is False and "fused" not in config["optimizer"]["params"]
    assert config["gradient_clipping"] == 0.3
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_a_file_is_merged(tmp_path):
    own = {
        "train_batch_size": "auto", "gradient_accumulation_steps": 3, "wall_clock_breakdown": True,
        "optimizer": {"params": {"lr": "auto"}}, "zero_optimization": {"reduce_bucket_size": 1000, "stage": 2},
        "comms_logger": {"enabled": True},
    }  # fmt: skip
    config = deepspeed_config(**FLAGS, file=written(tmp_path, own))
    plain = deepspeed_config(**FLAGS)
    assert config["zero_optimization"] == plain["zero_optimization"] | {"reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True and config["comms_logger"] == {"enabled": True}
    assert config["optimizer"] == plain["optimizer"] and config["train_batch_size"] == 24
    assert zero.TUNABLE["zero_optimization"]["reduce_bucket_size"] > 1000  # the defaults stay


def test_conflicts_are_all_named_with_their_flags(tmp_path):
    own = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "gradient_clipping": 1.0,
        "bf16": {"enabled": True}, "optimizer": {"params": {"betas": [0.9, 0.999]}}, "train_batch_size": 7,
    }  # fmt: skip
    with pytest.raises(ValueError) as error:
        deepspeed_config(**FLAGS, file=written(tmp_path, own))
    message = str(error.value)
    for name, there, here, flag in (
        ("zero_optimization.stage", 3, 2, "--zero_stage"),
        ("zero_optimization.offload_optimizer.device", '"cpu"', '"none"', "--offload"),
        ("gradient_clipping", 1.0, 0.0, "--clip_grad"),
        ("bf16.enabled", "true", "false", "--amp"),
        ("optimizer.params.betas", "[0.9, 0.999]", "[0.9, 0.95]", "--opt_betas"),
        ("train_batch_size", 7, 24, "--batch_size"),
    ):
        parts = (re.escape(str(part)) for part in (name, there, here, flag))
        assert re.search(r"\b" + "[^;]* ".join(parts) + r"\b", message), (name, message)
    assert "ds.json" in message and message.count("; ") == 5


@pytest.mark.parametrize("content,parts", [("{", ["JSON"]), ("[1]", ["JSON"]), (None, [])])
def test_a_file_that_is_none_is_said(content, parts, tmp_path):
    path = str(tmp_path / "absent.json") if content is None else written(tmp_path, content)
    with pytest.raises(ValueError, match=naming(f"--deepspeed_config {path}", *parts)):
        deepspeed_config(**FLAGS, file=path)


def refused(main, tmp_path, *flags) -> str:
    (tmp_path / "train.csv").write_text("a.mp4 0\n" * 8)
    with pytest.raises(SystemExit) as stop:
        main(["--data_path", str(tmp_path / "train.csv"), "--device", "cpu", *flags])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


PRETRAIN = [
    (["--offload", "cpu"], ["--offload cpu", "--enable_deepspeed"]),
    (["--fused_adam", "deepspeed"], ["--fused_adam deepspeed", "--enable_deepspeed"]),
    (["--deepspeed_config", "x.json"], ["--deepspeed_config x.json", "--enable_deepspeed"]),
    (["--enable_deepspeed", "--opt", "sgd"], ["--opt sgd", "--enable_deepspeed"]),
    (["--enable_deepspeed", "--zero_stage", "0", "--offload", "cpu"], ["--offload cpu", "--zero_stage 1"]),
    (["--enable_deepspeed", "--zero_stage", "3", "--compile"], ["--compile", "--zero_stage 3"]),
    (["--enable_deepspeed", "--deepspeed_config", "no.json", "--batch_size", "4"], ["--deepspeed_config no.json"]),
]
FINETUNE = [
    (["--zero_stage", "3", "--linear_probe"], ["--zero_stage 3", "probe"]),
    (["--zero_stage", "3", "--model_ema"], ["--zero_stage 3", "--model_ema"]),
]


@pytest.mark.parametrize("flags,parts", PRETRAIN)
def test_flags_that_make_no_sense_for_pretraining(flags, parts, tmp_path):
    tiny = ["--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--num_frames", "4"]
    assert_names(refused(run_mae_pretraining.main, tmp_path, *tiny, *flags), *parts)


@pytest.mark.parametrize("flags,parts", FINETUNE)
def test_flags_that_make_no_sense_for_fine_tuning(flags, parts, tmp_path):
    shared = ["--enable_deepspeed", "--data_set", "custom", "--nb_classes", "3", "--eval_data_path", "x"]
    assert_names(refused(run_class_finetuning.main, tmp_path, *shared, *flags), *parts)


def test_a_missing_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what an import of an absent package meets
    tiny = [
        "--model",
        "pretrain_videomae_tiny_patch8_64",
        "--input_size",
        "32",
        "--num_frames",
        "4",
        "--batch_size",
        "4",
    ]
    assert "pip install deepspeed" in refused(run_mae_pretraining.main, tmp_path, *tiny, "--enable_deepspeed")


def test_an_architecture_that_deepspeed_cannot_read_is_named(monkeypatch):
    """TORCH_CUDA_ARCH_LIST=9.0a, as an H100's image had it: DeepSpeed reads the minor number as an integer."""

    def initialize(**_):
        raise ValueError("invalid literal for int() with base 10: '0a'")

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(zero, "import_deepspeed", lambda: types.SimpleNamespace(initialize=initialize))
    monkeypatch.setattr(zero.dist, "is_initialized", lambda: True)
    config = deepspeed_config(**FLAGS | {"fused_adam": "deepspeed"})
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ImportError, match=naming("TORCH_CUDA_ARCH_LIST", "9.0a", "9.0", "--fused_adam torch")):
        zero.DeepSpeedBackend(module, [{"params": list(module.parameters())}], torch.device("cpu"), config)
