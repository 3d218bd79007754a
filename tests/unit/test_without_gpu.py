"""What can be known of a GPU without one: every engine's step with all tensors on `cuda`, shapes without data.

An operator that mixes devices raises in FakeTensorMode by itself. Here besides: a step makes no tensor on the host,
copies nothing from there but the batch, and reads no value back, for which the host would wait.
"""

import contextlib
import dataclasses
import functools
import re
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine_for_finetuning
import engine_for_tats
from optim_factory import create_optimizer, parameter_groups
from runtime.backend import Backend
from tests.helpers.engines import ENGINES, TATS, classifier, clips, parse

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from without_gpu import GPU, Enough, fake_gpu, peak_of_a_step, prepare, some_batches  # noqa: E402

# Operators whose result's size depends on values, or that hand a value to the host.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class StepWatch(TorchDispatchMode):
    """Notes, while it is on, what makes the host wait for the GPU, and copies from the host: (operator, line)."""

    def __init__(self):
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.copies: list[tuple[str, str]] = []
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        name = function.overloadpacket.__name__
        if function.namespace == "prim" or function.is_view:  # computes nothing
            return function(*args, **(kwargs or {}))
        if name in READS or name == "index" and any(_is_bool(x) for x in args[1]):
            self.waits.append((name, _line()))
        out = function(*args, **(kwargs or {}))
        before, after = _devices((args, kwargs)), _devices(out)
        if name in ("_to_copy", "copy_") and "cpu" in before and after == {"cuda"}:
            self.copies.append((name, _line()))
        elif "cpu" in before | after:
            self.waits.append((f"{name} on {' and '.join(sorted(before | after))}", _line()))
        return out


def _is_bool(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _devices(values) -> set[str]:
    return {x.device.type for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


def _line() -> str:
    """Where in the project the operator was called."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent in (ROOT, ROOT / "datasets")]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def watch_pretraining(flags: str) -> StepWatch:
    """The second step and the third: the first one makes the optimizer's state and constants that stay."""
    args = parse(flags)
    with fake_gpu():
        with GPU:
            _, _, step = prepare(args, GPU)
        step(0)
        with StepWatch() as watch:
            step(1)
            step(2)
    assert watch.count > 300
    return watch


@pytest.mark.parametrize("flags", ENGINES)
def test_no_pretraining_step_waits(flags):
    flags = flags if "--amp" in flags else f"{flags} --amp bf16"
    args = parse(flags)
    watch = watch_pretraining(flags)
    assert watch.waits == []
    micro_batches = 2 * args.accum_iter * (args.tats_rollout_steps if args.mask_type == "tats" else 1)
    assert len(watch.copies) == 2 * micro_batches, watch.copies  # clips and seeds


# --- fine-tuning -------------------------------------------------------------------------------------------------


def watch_finetuning(flags: str = "", mixup: dict | None = None, amp: str = "bf16", ema: bool = False) -> StepWatch:
    with fake_gpu():
        model, recipe = classifier(flags)
        mixing = Mixup(num_classes=5, label_smoothing=0.1, **mixup) if mixup else None
        recipe = dataclasses.replace(recipe, mixup=mixing)
        with GPU:
            optimizer = create_optimizer(parameter_groups(model, 0.05, 0.75 if not flags else 1.0), lr=1e-3)
            backend = Backend(model, optimizer, GPU, amp, clip_grad=1.0)
            average = average_of(model) if ema else None
        train = engine_for_finetuning.train_one_epoch
        batch = clips()
        with pytest.raises(Enough):
            train(backend, some_batches(batch, 1), recipe, 0, average)
        with StepWatch() as watch, pytest.raises(Enough):
            train(backend, some_batches(batch, 2), recipe, 0, average)
    assert watch.count > 100
    return watch


def average_of(model: torch.nn.Module) -> ModelEmaV3:
    # a generator of roundings, which float32 weights do not use; and fake tensors cannot be copied whole
    with mock.patch("torch.Generator"), mock.patch("timm.utils.model_ema.deepcopy", lambda x: x):
        return ModelEmaV3(model, decay=0.99)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amp": "none"},
        {"mixup": dict(mixup_alpha=0.8, cutmix_alpha=1.0)},
        {"flags": "--use_checkpoint --drop_path 0.1 --fc_drop_rate 0.5"},
        {"flags": "--linear_probe"},
        {"flags": "--attentive_probe"},
        {"ema": True},
    ],
)
def test_no_finetuning_step_waits(options):
    watch = watch_finetuning(**options)
    assert watch.waits == []
    assert len(watch.copies) == 4, watch.copies  # clips and labels of two steps


@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_mixup_of_single_clips_copies_its_draws(mode):
    """timm draws these modes' weights on the host: one copy more a step, without waiting."""
    watch = watch_finetuning(mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode))
    assert len(watch.copies) == 4 + 2
    assert watch.waits == []


def test_evaluation_reads_nothing_between_batches():
    with fake_gpu():
        model, recipe = classifier("")
        batch = clips(6) | {"index": torch.arange(3)}
        watch = StepWatch()
        with watch, pytest.raises(Enough):
            engine_for_finetuning.predict(model, some_batches(batch, 2), recipe, "bf16", batch_size=4)
    assert watch.waits == []
    assert len(watch.copies) == 4  # two parts of at most four views, twice


# --- the watch itself --------------------------------------------------------------------------------------------


def wrapped(monkeypatch, what: str):
    """Puts a fault into engine_for_tats: into the error of every step."""
    original = engine_for_tats.masked_error

    def faulty(prediction, pixels, mask, recipe):
        error = original(prediction, pixels, mask, recipe)
        if what == "item":
            error.mean().item()
        elif what == "host":
            error = error + torch.zeros(()).to(error.device)
        elif what == "boolean":
            error[error > 0]
        elif what == "mixed":
            error = error + torch.zeros(error.shape)
        return error

    monkeypatch.setattr(engine_for_tats, "masked_error", faulty)


@pytest.mark.parametrize(
    "what, seen",
    [
        ("item", "_local_scalar_dense"),
        ("mixed", "device"),
        ("boolean", "nonzero|index|data.dependent|unbacked|dynamic"),
        ("host", "zeros on cpu"),
    ],
)
def test_a_fault_put_into_an_engine_is_seen(monkeypatch, what, seen):
    wrapped(monkeypatch, what)
    try:
        found = str(watch_pretraining(f"{TATS} --tats_attention mha --amp bf16").waits)
    except Exception as error:  # fake tensors have no values to read, and refuse a mix of devices
        found = f"{type(error).__name__} {error}"
    assert re.search(seen, found, re.IGNORECASE), found


# --- the backward pass in Python ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", ["--mask_type tube", f"{TATS} --use_checkpoint --num_landmarks 8", "--mask_type adamae"]
)
def test_the_backward_pass_in_python_gives_the_engines_gradients(flags, monkeypatch):
    """With data, on the CPU: the walk over the graph against torch's own engine."""
    from without_gpu import BackwardPass

    args = parse(f"{flags} --amp none")
    args.device = "cpu"
    found = []
    for backward in (None, BackwardPass()):
        torch.manual_seed(0)
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            if backward is not None:
                patch.setattr(
                    torch.Tensor, "backward", functools.partialmethod(lambda loss, walk: walk(loss), backward)
                )
                patch.setattr(torch._C, "_current_graph_task_id", backward.task_id)
                stack.enter_context(backward.hooks)
            run, batch, step = prepare(args, torch.device("cpu"))
            batch["video"].random_(generator=torch.Generator().manual_seed(0))
            for number in range(2):
                step(number)
        modules = [backend.unwrapped for backend in run.backends().values()]
        found.append([p.detach().clone() for module in modules for p in module.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_recomputation_needs_less_memory():
    plain, recomputed = (
        peak_of_a_step(parse(f"{TATS} --batch_size 64 --amp bf16 --tats_attention trajectory {extra}"))
        for extra in ("", "--use_checkpoint")
    )
    assert plain[0] == recomputed[0] and recomputed[1] < 0.7 * plain[1]
