"""Peak memory of a pre-training step on a GPU, computed without one: the rows of the paper's figures, and options.

    python bench/memory.py [--rows tube tats-mha ...] [flags of run_mae_pretraining.py]

The engines run on fake tensors, shapes without data, and the bytes of all live tensors are added up: weights, AdamW's
state, gradients, activations, workspaces that operators allocate as tensors. Layer norms take and give float32, as
autocast has it on a GPU. Not in it: the allocator's rounding and fragmentation, cuBLAS workspaces and the CUDA context.
bench/step.py measures the same on a GPU (torch.cuda.max_memory_allocated).
"""

import argparse
import contextlib
import sys
import weakref
from collections.abc import Callable
from unittest import mock

import torch
from common import choose_rows, print_table
from step import MEMORY_ROWS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import engine_for_pretraining
import engine_for_tats
from backend import Backend
from engine_for_pretraining import PretrainRecipe
from run_common import recipe_settings
from run_mae_pretraining import Run, check_flags, get_parser, ppo_settings

DEFAULTS = "--model pretrain_videomae_base_patch16_224 --mask_ratio 0.95 --batch_size 32 --device cpu --amp bf16"
# what the paper reports, and what the memory flags do to one of its rows
EXTRA = {
    " --checkpoint_modules sampler": "tats-trajectory",
    " --checkpoint_modules decoder": "tats-trajectory",
    " --use_checkpoint": "tats-trajectory",
    " --decoder_mask_ratio 0.5": "tats-trajectory",
}
ROWS = MEMORY_ROWS | {name + flag: (MEMORY_ROWS[name][0] + flag, "-") for flag, name in EXTRA.items()}


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of tensors that operators return, for as long as anything refers to them."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":  # those have no bytes
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, storage: int) -> None:
        self.live -= self.sizes.pop(storage)


class NoMetrics:
    def update(self, **values) -> None:
        pass


class FakeBackend(Backend):
    """A step that never looks at a value, which fake tensors have not."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.skipped = 0.0

    def step(self) -> bool:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True


@contextlib.contextmanager
def without_data():
    layer_norm = torch.nn.functional.layer_norm

    def in_float32(x, *args, **kwargs):
        return layer_norm(x.float(), *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for target, value in {
            "run_common.Backend": FakeBackend,
            "epoch_runner.Metrics": NoMetrics,
            "epoch_runner.EpochRunner.end_micro_batch": lambda *_: None,
            "epoch_runner.EpochRunner.finish": lambda _: {},
            "torch.nn.functional.layer_norm": in_float32,
            "torch.nn.Module.to": lambda module, *_: module,
        }.items():
            stack.enter_context(mock.patch(target, value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def prepare(args, device: torch.device) -> tuple[Run, dict, Callable[[int], None]]:
    """A run, its batch of black clips, and a function that takes the step of this number by the engines."""
    run = Run(args, device)
    recipe = PretrainRecipe(grid=run.mae.grid, loss=args.loss, normalize_target=args.normalize_target,
                            **recipe_settings(args, device, 1))  # fmt: skip
    shape = (args.batch_size, args.num_frames, 3, args.input_size, args.input_size)
    seed = torch.zeros(args.batch_size, dtype=torch.int64)
    batch = {"video": torch.zeros(shape, dtype=torch.uint8), "seed": seed, "failed": []}
    batches = [batch] * args.accum_iter

    def step(number: int) -> None:
        if run.tats_backend is None:
            engine_for_pretraining.train_one_epoch(run.backend, run.sampler, batches, recipe, number)
        else:
            engine_for_tats.train_one_epoch(run.backend, run.tats_backend, batches, recipe, ppo_settings(args), number)

    return run, batch, step


def peak_of_a_step(args) -> tuple[int, int]:
    """Bytes between steps (weights and optimizer) and at the peak of the second step."""
    args.rank, args.local_rank, args.world_size = 0, 0, 1
    with without_data(), LiveBytes() as count:
        run, batch, step = prepare(args, torch.device("cpu"))  # run: held while bytes are counted
        batch_bytes = batch["video"].nbytes + batch["seed"].nbytes
        for number in range(2):  # AdamW makes its state in the first
            at_rest = count.live - batch_bytes
            count.peak = count.live
            step(number)
        return at_rest, count.peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these")
    flags, rest = parser.parse_known_args()
    print(f"computed, not measured; GB = 10^9 bytes\n{' '.join([DEFAULTS, *rest])}")
    table = []
    for name in choose_rows(flags, list(ROWS)):
        row_flags, reported = ROWS[name]
        args = get_parser().parse_args([*DEFAULTS.split(), *row_flags.split(), *rest])
        check_flags(args)
        if args.compile or args.enable_deepspeed:
            sys.exit("error: shapes alone do not tell the memory of --compile and --enable_deepspeed: leave them out")
        table.append([name, *(f"{x / 1e9:.2f}" for x in peak_of_a_step(args)), reported])
    print_table(["masks", "weights, optimizer GB", "peak GB", "paper reports (GB)"], table)


if __name__ == "__main__":
    main()
