"""What only a GPU can show: `make gpu`, or `python -m pytest -m gpu tests/gpu`. Tiny models; minutes.

Attention kernels, mixed precision and --compile against the CPU and float64; steps that never wait; NCCL, ZeRO,
resume; out of memory as one line.
"""

import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch.nn.attention import SDPBackend, sdpa_kernel

import engine_for_finetuning
import trajectory_attention
from optim_factory import create_optimizer, parameter_groups
from runtime.backend import Backend
from tests.helpers.engines import ENGINES, TATS, TINY, classifier, clips, parse

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from without_gpu import Enough, prepare, some_batches  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MASKS = ["tube", "random", "frame", "motion", "adamae", "tats"]
TATS_KINDS = ["orthoformer", "trajectory", "mha"]
STEPS = 20


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"the package {package} is not here")


# --- numbers -----------------------------------------------------------------------------------------------------


def losses_of(flags: str, device: torch.device, steps: int = STEPS) -> torch.Tensor:
    """Of training on one batch; AdaMAE without dropout, whose random numbers are the device's own."""
    args = parse(f"{flags} --device {device.type} --batch_size 8 --num_landmarks 8 --lr 1e-2 --warmup_epochs 0")
    torch.manual_seed(0)
    found = []
    with mock.patch("runtime.epoch.EpochRunner.end_micro_batch", lambda *a: found.append(a[4].detach())):
        run, batch, step = prepare(args, device)
        for module in run.sampler.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch["video"].random_(generator=torch.Generator().manual_seed(0))
        for number in range(steps):
            step(number)
    return torch.stack(found).float().cpu()


@functools.cache
def losses_on_cpu(flags: str) -> torch.Tensor:
    return losses_of(f"{flags} --amp none", CPU)


def each_mask() -> list[str]:
    fixed = [f"--mask_type {name}" for name in MASKS if name != "tats"]
    return fixed + [f"{TATS} --tats_attention {kind} --tats_lr 1e-3" for kind in TATS_KINDS]


@pytest.mark.parametrize("amp, tolerance", [("none", 2e-3), ("bf16", 3e-2), ("fp16", 3e-2)])
@pytest.mark.parametrize("flags", each_mask())
def test_losses_follow_the_cpus(flags, amp, tolerance):
    found = losses_of(f"{flags} --amp {amp}", GPU)
    expected = losses_on_cpu(flags)
    assert expected[-1] < 0.9 * expected[0]  # it learns
    if amp == "fp16":  # the scale comes down by skipped steps: the same curve, some steps late
        assert found.isfinite().all() and found[-1] < 0.95 * found[0]
        torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    else:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


COMPILED = [f"{mask} --amp bf16" for mask in each_mask()] + [f"{mask} --amp none" for mask in each_mask()[::6]]


@pytest.mark.parametrize("flags", COMPILED)
def test_compiled_steps_give_the_same_losses(flags):
    """With --compile nothing changes but rounding."""
    torch._dynamo.reset()
    eager, compiled = losses_of(flags, GPU, 4), losses_of(f"{flags} --compile", GPU, 4)
    torch.testing.assert_close(compiled, eager, rtol=2e-2 if "bf16" in flags else 2e-3, atol=0)


KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 2e-3)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("frames, tokens, queries", [(8, 196, 392), (4, 49, 128)])
def test_queries_expanded_over_frames_are_read_right(kernel, dtype, tolerance, frames, tokens, queries):
    """trajectory_tokens gives every kernel queries of stride 0 (a silent error of this kind: pytorch#191937); against
    the plain form in float64 on contiguous copies, forward and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 24, queries, 64), (1, 24, frames * tokens, 64), (1, 24, frames * tokens, 64)]
    inputs = [torch.randn(shape, generator=generator).to(GPU, dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    try:
        with sdpa_kernel(kernel):
            found = trajectory_attention.trajectory_tokens(*inputs, frames)
            weight = torch.randn(found.shape, generator=generator).to(GPU)
            gradients = torch.autograd.grad(found, inputs, weight.to(dtype))
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "no kernel" not in str(error).lower():
            raise
        pytest.skip(f"{kernel.name} does not take {dtype} here")
    q, k, v = exact
    k, v = (x.unflatten(2, (frames, -1)) for x in (k, v))  # [1, h, t, S, d]
    scores = torch.einsum("bhnd,bhtsd->bhnts", q * 64**-0.5, k).softmax(dim=-1)
    expected = torch.einsum("bhnts,bhtsd->bnthd", scores, v).flatten(3)
    expected_gradients = torch.autograd.grad(expected, exact, weight.double())
    for one, other in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, count", [((2, 4, 300, 16), 64), ((1, 48, 1568, 64), 128), ((1, 2, 5, 96), 9)])
def test_landmarks_are_the_plain_forms(monkeypatch, dtype, shape, count):
    """The Triton kernel, and the plain search on the GPU and on the CPU. The first near tie that is decided otherwise
    changes all later picks of a head: most heads must agree whole, and every pick must be as good."""
    q = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as a layer's queries lie in memory
    found = trajectory_attention.orthogonal_landmarks(q.to(GPU), count).cpu()
    expected = trajectory_attention.orthogonal_landmarks(q, count)
    assert found.sort(dim=-1).values.diff(dim=-1).min() > 0  # none twice
    assert (found == expected).all(dim=-1).float().mean() > 0.8
    unit = torch.nn.functional.normalize(q.double(), dim=-1)
    picked = unit.gather(2, found.unsqueeze(-1).expand(-1, -1, -1, shape[-1]))
    cosine = (picked @ unit.transpose(2, 3)).abs().cummax(dim=2).values  # to the picks so far, [B, h, R, N]
    best = cosine.min(dim=-1).values[:, :, :-1]
    taken = cosine[:, :, :-1].gather(3, found[:, :, 1:, None]).squeeze(-1)
    assert (taken - best).max() < 1e-3
    monkeypatch.setattr(trajectory_attention, "_kernel", lambda: None)
    plain = trajectory_attention.orthogonal_landmarks(q.to(GPU), count).cpu()
    assert (plain == found).all(dim=-1).float().mean() > 0.8


def test_masks_are_the_cpus():
    from masking_generator import FrameMask, RandomMask, TubeMask

    seed = torch.arange(64) * 7919
    for kind in (RandomMask, TubeMask, FrameMask):
        sampler = kind((8, 14, 14), 0.9)
        one, other = sampler(None, seed), sampler(None, seed.to(GPU))
        assert torch.equal(one.visible, other.visible.cpu()) and torch.equal(one.masked, other.masked.cpu())


# --- steps that never wait ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("flags", ENGINES)
def test_no_pretraining_step_waits(flags, amp):
    flags = flags if "--amp" in flags else f"{flags} --amp {amp}"
    _, batch, step = prepare(parse(flags), GPU)
    for name in ("video", "seed"):
        batch[name] = batch[name].pin_memory()
    step(0)
    with no_waiting():
        step(1)
        step(2)


@pytest.mark.parametrize(
    "flags, mixup, average",
    [
        ("", None, False),
        ("", dict(mixup_alpha=0.8, cutmix_alpha=1.0), True),
        ("--linear_probe", None, False),
        ("--attentive_probe", None, False),
    ],
)
def test_no_finetuning_step_waits(flags, mixup, average):
    model, recipe = classifier(flags)
    recipe.mixup = Mixup(num_classes=5, label_smoothing=0.1, **mixup) if mixup else None
    model.to(GPU)
    optimizer = create_optimizer(parameter_groups(model, 0.05), lr=1e-3)
    backend = Backend(model, optimizer, GPU, "bf16", clip_grad=1.0)
    recipe.mean, recipe.std = recipe.mean.to(GPU), recipe.std.to(GPU)
    average = ModelEmaV3(model, decay=0.99) if average else None
    batch = clips()
    batch |= {name: batch[name].pin_memory() for name in ("video", "label")}
    with pytest.raises(Enough):
        engine_for_finetuning.train_one_epoch(backend, some_batches(batch, 1), recipe, 0, average)
    with no_waiting(), pytest.raises(Enough):
        engine_for_finetuning.train_one_epoch(backend, some_batches(batch, 2), recipe, 0, average)


def test_computed_memory_is_the_measured():
    """Live bytes as bench/step.py --memory counts them against the allocator's peak, for ViT-B as users train it."""
    from without_gpu import peak_of_a_step

    flags = (
        f"{TATS} --tats_attention trajectory --amp bf16 --model pretrain_videomae_base_patch16_224 --input_size 224 "
        "--num_frames 16 --batch_size 8 --mask_ratio 0.95"
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    _run, batch, step = prepare(parse(flags), GPU)  # _run: held while bytes are counted
    for number in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(number)
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    computed = peak_of_a_step(parse(flags))[1]
    assert computed == pytest.approx(measured, rel=0.06)


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    pytest.importorskip("av", reason="the package av is not here: no videos can be read")
    from datasets.moving_shapes import write_dataset

    return write_dataset(tmp_path_factory.mktemp("shapes"), train=16, val=10, size=32, frames=12) / "train.csv"


def command(shapes: Path, output: Path, *flags: str) -> list[str]:
    common = f"{TINY} --batch_size 4 --num_workers 2 --epochs 4 --sampling_rate 2 --save_ckpt_freq 1 --warmup_epochs 0"
    places = ["--data_path", str(shapes), "--output_dir", str(output)]
    return [str(ROOT / "run_mae_pretraining.py"), *common.split(), *places, *flags]


def run(arguments: list[str], expect: int = 0, launcher: list[str] | None = None) -> str:
    # plain numbers: DeepSpeed compiles its Adam for them and cannot read "9.0a"
    architecture = ".".join(map(str, torch.cuda.get_device_capability()))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    result = subprocess.run([*(launcher or [sys.executable]), *arguments], capture_output=True, text=True,
                            env=environment, timeout=400)  # fmt: skip
    assert result.returncode == expect, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


def losses_in(folder: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (folder / "log.txt").read_text().splitlines()]


def test_a_killed_run_resumes_to_the_same_losses(shapes, tmp_path):
    flags = [*TATS.split(), "--tats_start_epoch", "1", "--num_landmarks", "8", "--amp", "none"]
    run(command(shapes, tmp_path / "whole", *flags))
    process = subprocess.Popen([sys.executable, *command(shapes, tmp_path / "killed", *flags)],
                               stdout=subprocess.DEVNULL)  # fmt: skip
    while not (tmp_path / "killed/checkpoint-1.pth").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(command(shapes, tmp_path / "killed", *flags))
    assert losses_in(tmp_path / "killed") == pytest.approx(losses_in(tmp_path / "whole"), rel=1e-3)


@pytest.mark.parametrize("flags", ["--mask_type tube", f"{TATS} --tats_start_epoch 1 --num_landmarks 8"])
def test_nccl_with_all_gpus(shapes, tmp_path, flags):
    """torchrun with a process per GPU follows one process with the same effective batch."""
    number = torch.cuda.device_count()
    if 16 % number:
        pytest.skip(f"16 clips do not divide into {number} GPUs")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    flags = [*flags.split(), "--amp", "none"]
    run(command(shapes, tmp_path / "ranks", *flags, "--batch_size", str(8 // number)), launcher=launcher)
    run(command(shapes, tmp_path / "one", *flags, "--batch_size", "8"))
    assert losses_in(tmp_path / "ranks") == pytest.approx(losses_in(tmp_path / "one"), rel=1e-3)


ZERO = [f"--zero_stage {stage} --fused_adam torch" for stage in (0, 1, 2, 3)] + [
    "--zero_stage 2 --fused_adam deepspeed"
]


@needs("deepspeed")
@pytest.mark.parametrize("zero", ZERO)
def test_zero_follows_plain_training(shapes, tmp_path, zero):
    flags = [*TATS.split(), "--tats_start_epoch", "1", "--num_landmarks", "8", "--amp", "bf16"]
    run(command(shapes, tmp_path / "zero", *flags, "--enable_deepspeed", *zero.split()))
    run(command(shapes, tmp_path / "plain", *flags))
    assert losses_in(tmp_path / "zero") == pytest.approx(losses_in(tmp_path / "plain"), rel=2e-2)


def test_out_of_memory_is_one_line(shapes, tmp_path):
    code = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(2e7 / torch.cuda.mem_get_info()[1]); "
        "import run_mae_pretraining as r; r.main(sys.argv[2:])"
    )
    found = run(["-c", code, *command(shapes, tmp_path / "run", "--batch_size", "16")], expect=1)
    assert "Traceback" not in found
    assert "--batch_size" in found.splitlines()[-1] and found.splitlines()[-1].startswith("error: ")
