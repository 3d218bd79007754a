"""Whole pre-training steps for every mask type: time, operations and memory, as ratios measured in one run.

    python bench/step.py [--tiny] [--rows tube tats-orthoformer ...] [--sweep] [flags of run_mae_pretraining.py]
    python bench/step.py --memory        # memory on a GPU of the configurations whose memory the paper reports

A step is everything but loading: mask, forward, backward, optimizer and PPO, by the engines, on one random batch. The
default is ViT-B on 16 x 224 x 224 with mask ratio 0.9, batch 32 on a GPU and 1 on a CPU; --tiny is the tests' model.

transformers is the reference: Hugging Face's VideoMAEForPreTraining with the tube row's weights and masks, its batch,
optimizer and mixed precision; nothing is timed if predictions or loss differ. It computes its own target, logs nothing
where the engines keep metrics, and is never compiled.

TFLOP: matrix products and fused attention of a step; of peak: that many per second over the rate of one big matrix
product in the same rounds. memory: a step's peak over weights, optimizer states and batch. --sweep: tables of more
frames, more pixels and other mask ratios besides. With --compile the first step is timed apart.

--memory measures on a GPU. With --device cpu it computes what a GPU would need: the engines run on fake tensors on
`cuda`, shapes without data, and the bytes of all live ones are added up: weights, AdamW's state, gradients,
activations, and workspaces that operators allocate as tensors. Not in it: what the allocator rounds up and cannot
reuse, cuBLAS workspaces and the CUDA context.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import statistics

import torch
from common import (
    Product,
    choose_rows,
    count_flop,
    fresh_process,
    header,
    new_parser,
    peak_growth,
    print_table,
    ratio,
    seconds_of,
    start,
    time_rounds,
)
from torch import nn
from without_gpu import peak_of_a_step

from engine_for_pretraining import PretrainRecipe, masked_error, to_device
from masking_generator import MaskSampler
from optim_factory import parameter_groups
from run_mae_pretraining import Run, check_flags, get_parser
from runtime.backend import Backend
from runtime.build import effective_batch, make_backend
from runtime.convert import load_weights, model_weights
from runtime.flags import resolve_amp
from runtime.launch import run_script
from utils import UsageError, init_distributed

TATS = "--mask_type tats --tats_attention"
ROWS = {  # name: its flags
    "tube": "--mask_type tube",
    "random": "--mask_type random",
    "frame": "--mask_type frame",
    "motion": "--mask_type motion",
    "adamae": "--mask_type adamae",
    "tats-orthoformer": f"{TATS} orthoformer",
    "tats-trajectory": f"{TATS} trajectory",
    "tats-mha": f"{TATS} mha",
    "tats-2-passes": f"{TATS} orthoformer --ppo_epochs 2",
    "transformers": "--mask_type tube",
}
# name: its flags, and the GB of the paper's table 3 (ViT-B, 16 x 224 x 224, mask ratio 0.95, batch 32)
MEMORY_ROWS = {
    "tube": (ROWS["tube"], "-"),
    "adamae": (ROWS["adamae"], "-"),
    "tats-orthoformer": (ROWS["tats-orthoformer"], "25.36"),
    "tats-trajectory": (ROWS["tats-trajectory"], "25.36"),  # which of the two the paper measured it does not say
    "tats-mha": (ROWS["tats-mha"], "25.37"),
    "decoder-depth-1": (f"{TATS} orthoformer --decoder_depth 1", "16.54"),
    "decoder-depth-2": (f"{TATS} orthoformer --decoder_depth 2", "19.48"),
    "decoder-depth-8": (f"{TATS} orthoformer --decoder_depth 8", "37.13"),
    "tats-blocks-2": (f"{TATS} orthoformer --tats_blocks 2", "32.18"),
    "tats-blocks-3": (f"{TATS} orthoformer --tats_blocks 3", "39.00"),
}
# what the memory flags save in one of these rows
SAVING = "--checkpoint_modules sampler", "--checkpoint_modules decoder", "--use_checkpoint", "--decoder_mask_ratio 0.5"
SAVING_ROWS = {f"tats-trajectory {saving}": (f"{TATS} trajectory {saving}", "-") for saving in SAVING}
TINY = "--model pretrain_videomae_tiny_patch8_64 --input_size 64 --num_frames 8 --batch_size 16"


def parse(
    flags: argparse.Namespace, rest: list[str], dtype: str, row_flags: str = "", shapes_alone: bool = False
) -> argparse.Namespace:
    """Flags of run_mae_pretraining.py: defaults of this command, the user's, the row's; --dtype decides --amp.
    shapes_alone: of a step on a GPU that need not be there."""
    device = "cuda" if shapes_alone else flags.device
    defaults = TINY if flags.tiny else f"--batch_size {32 if device == 'cuda' else 1}"
    defaults += f" --mask_ratio {0.95 if flags.memory else 0.9}"
    chosen = f"{row_flags} --device {device} --amp {'none' if dtype == 'fp32' else dtype}"
    args = get_parser().parse_args([*defaults.split(), *rest, *chosen.split()])
    args.epochs, args.print_freq = 10**6, 10**9
    check_flags(args)
    if shapes_alone:
        args.rank, args.local_rank, args.world_size = 0, 0, 1
    else:
        init_distributed(args)
        resolve_amp(args)
    return args


class OneBatch:
    """Stands in for a loader: the same batch for ever."""

    def __init__(self, args: argparse.Namespace):
        generator = torch.Generator().manual_seed(0)
        shape = (args.batch_size, args.num_frames, 3, args.input_size, args.input_size)
        video = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        video = video.pin_memory() if args.device == "cuda" else video
        self.batch = {"video": video, "seed": torch.arange(args.batch_size), "failed": []}

    def __iter__(self):
        while True:
            yield self.batch


class Row:
    """What trains in one row of a table."""

    def __init__(self, name: str, args: argparse.Namespace, tube: "Row | None" = None, override: list[str] = ()):
        self.name, self.args, self.override = name, args, override
        self.label = " ".join([name, *override])
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        self.run, self.loader = Run(args, self.device), OneBatch(args)
        joint = self.run.backend.unwrapped is not self.run.mae  # a sampler is part of the module
        if tube is not None and not joint and not args.compile:  # compiled for one number of tokens
            self.run.mae, self.run.backend = tube.run.mae, tube.run.backend  # the same autoencoder: once in memory
        self.recipe = self.run.recipe(steps_per_epoch=1)
        self.backends = [backend for backend in self.run.backends().values()]
        if name == "transformers":
            parts = (self.run.mae, self.run.sampler, self.loader.batch, self.recipe)
            self.backends = [build_reference(*parts, args)]

    def steps(self, count: int = 1) -> None:
        """So many optimizer steps; ends by reading the metrics, which waits for the device."""
        run, recipe = self.run, dataclasses.replace(self.recipe, steps_per_epoch=count)
        with contextlib.redirect_stdout(io.StringIO()):
            if self.name == "transformers":
                reference_steps(*self.backends, run.sampler, self.loader.batch, recipe)
            else:
                run.train_one_epoch(self.loader, recipe, self.args.tats_start_epoch)

    def memory(self, dtype: str) -> int | None:
        """Bytes of a step."""
        if self.device.type == "cuda":
            return peak_growth(self.steps, self.device)
        found = fresh_process(self.name, ["--dtype", dtype, *self.override])
        return found and found[0]

    def state_bytes(self) -> int:
        """Of weights, buffers and optimizer states."""
        tensors = [
            x for backend in self.backends for x in (*backend.unwrapped.parameters(), *backend.unwrapped.buffers())
        ]
        states = [state for backend in self.backends for state in backend.optimizer.state.values()]
        tensors += [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
        return sum(x.nbytes for x in tensors)


# --- the reference: Hugging Face's VideoMAEForPreTraining, which computes its own target and loss ------------------


def build_reference(mae: nn.Module, sampler: MaskSampler, batch: dict, recipe: PretrainRecipe, args) -> Backend:
    """transformers' model with our optimizer and mixed precision; our autoencoder gets its fresh weights.

    Raises UsageError where the flags ask for what it does not have, or the two models differ on the batch.
    """
    if args.loss != "mse" or args.drop_path or args.decoder_mask_ratio:
        raise UsageError(
            "transformers' model has no --loss l1, --drop_path or --decoder_mask_ratio: leave it out with --rows"
        )
    device = recipe.mean.device
    model = _huggingface_model(mae, args).to(device)
    load_weights(mae, model_weights(model.state_dict(), "transformers"), "transformers")
    _check_equal(mae, model, sampler, batch, recipe)
    if args.use_checkpoint:
        model.gradient_checkpointing_enable()
    model.no_weight_decay = mae.no_weight_decay
    groups = parameter_groups(model, args.weight_decay)
    return make_backend(
        args, model.train(), groups, device, lr=args.lr, eps=args.opt_eps, amp=args.amp, clip_grad=args.clip_grad
    )


def reference_steps(backend: Backend, sampler: MaskSampler, batch: dict, recipe: PretrainRecipe) -> None:
    """recipe.steps_per_epoch optimizer steps; waits for the device."""
    for index in range(recipe.steps_per_epoch * backend.accum_iter):
        recipe.apply_schedule(backend, index // backend.accum_iter)
        _, video, seed = to_device(batch, recipe)
        hidden = sampler(video, seed).hidden()
        with backend.autocast(), backend.no_sync():
            loss = backend.module(video.transpose(1, 2), bool_masked_pos=hidden).loss
        backend.backward(loss)
        backend.step()
    loss.item()


def _huggingface_model(mae: nn.Module, args) -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForPreTraining  # seconds, and not needed to train

    embed, block, decoder_block = mae.encoder.patch_embed, mae.encoder.blocks[0], mae.decoder.blocks[0]
    config = VideoMAEConfig(
        image_size=embed.img_size,
        patch_size=embed.patch_size[0],
        num_frames=embed.num_frames,
        tubelet_size=embed.tubelet_size,
        hidden_size=mae.encoder.embed_dim,
        num_hidden_layers=len(mae.encoder.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        decoder_hidden_size=mae.mask_token.shape[-1],
        decoder_num_hidden_layers=len(mae.decoder.blocks),
        decoder_num_attention_heads=decoder_block.attn.num_heads,
        decoder_intermediate_size=decoder_block.mlp.fc1.out_features,
        norm_pix_loss=args.normalize_target,
        use_mean_pooling=False,  # else the encoder has no last norm
        attn_implementation="sdpa",
    )
    model = VideoMAEForPreTraining(config)
    for module in model.modules():  # the decoder's last norm ignores the configuration's eps
        if isinstance(module, nn.LayerNorm):
            module.eps = mae.encoder.norm.eps
    return model


@torch.no_grad()
def _check_equal(mae: nn.Module, model: nn.Module, sampler: MaskSampler, batch: dict, recipe: PretrainRecipe) -> None:
    pixels, video, seed = to_device(batch, recipe)
    mask = sampler(video, seed)
    ours, theirs = mae(video, mask), model(video.transpose(1, 2), bool_masked_pos=mask.hidden())
    loss, their_loss = masked_error(ours, pixels, mask, recipe).mean().item(), theirs.loss.item()
    error = ((ours - theirs.logits).abs().max() / theirs.logits.abs().max()).item()
    if not (error < 1e-3 and abs(loss - their_loss) < 1e-3 * loss):
        raise UsageError(
            f"on the same weights and masks transformers' loss is {their_loss:.6f} and ours {loss:.6f}, predictions "
            f"differ by {error:.2g} of the largest: nothing was timed"
        )


# --- tables ------------------------------------------------------------------------------------------------------


def describe(args: argparse.Namespace, remark: str) -> str:
    size = f"{args.num_frames} x {args.input_size} x {args.input_size}"
    return f"{args.model}, {size}, mask ratio {args.mask_ratio}, batch {effective_batch(args)}, {remark}"


def report(rows: list[Row], references: dict[str, dict[str, str]], flags, rounds: int, dtype: str) -> None:
    """One table. references: column -> label of a row -> label of the row that its time is divided by."""
    device, compiled = rows[0].device, rows[0].args.compile
    first = {row.label: seconds_of(row.steps, device) for row in rows} if compiled else {}
    flop = {row.label: count_flop(row.steps) for row in rows}
    product = Product(device, dtype)
    calls = {row.label: functools.partial(row.steps, flags.steps) for row in rows}
    seconds = time_rounds(calls | {"product": product}, rounds, device)
    print(header(device, dtype, product.peak(seconds["product"])))
    unless = "unless the row says otherwise: " if any(row.override for row in rows) else ""
    print(unless + describe(parse(flags, flags.rest, dtype), f"{rounds} rounds, steps a round: {flags.steps}"))
    columns = ["masks", "ms per step", "clips/s", *references, "TFLOP", "TFLOP/s", "of peak"]
    if not flags.skip_memory:
        columns.append("memory MB")
    if compiled:
        columns.append("first step s")
    table = []
    for row in rows:
        times, done = seconds[row.label], flop[row.label]
        step = statistics.median(times) / flags.steps
        line = [row.label, f"{step * 1e3:.1f}", f"{effective_batch(row.args) / step:.4g}"]
        line += [ratio(times, seconds.get(reference_of[row.label])) for reference_of in references.values()]
        line += [f"{done / 1e12:.3g}", f"{done / step / 1e12:.3g}"]
        line.append(product.share(done * flags.steps, times, seconds["product"]))
        if not flags.skip_memory:
            grown = row.memory(dtype)
            line.append("-" if grown is None else f"{grown / 1e6:.0f}")
        table.append(line + ([f"{first[row.label]:.1f}"] if compiled else []))
    print_table(columns, table)


def compare_masks(flags: argparse.Namespace, dtype: str) -> None:
    rows: list[Row] = []
    more = {name: row_flags for name, (row_flags, _) in MEMORY_ROWS.items() if name not in ROWS and flags.rows}
    known = ROWS | more  # decoder depths and TATS blocks are timed where --rows names them
    for name in choose_rows(flags, list(known), always=("tube",)):
        args = parse(flags, flags.rest, dtype, known[name])
        same = rows and args.decoder_depth == rows[0].args.decoder_depth
        rows.append(Row(name, args, rows[0] if same else None))
    references = {f"x {name}": {row.label: name for row in rows} for name in ("tube", "transformers")}
    report(rows, references, flags, flags.rounds, dtype)


def sweep(flags: argparse.Namespace, dtype: str) -> None:
    frames, sizes = ((4, 8, 16), (32, 64)) if flags.tiny else ((8, 16, 32), (112, 224))
    for flag, values in {"num_frames": frames, "input_size": sizes, "mask_ratio": (0.75, 0.9, 0.95)}.items():
        rows, references = [], {"x tube": {}, "x first": {}}
        for value in values:
            override = ["--" + flag, str(value)]
            for name in ("tube", "tats-orthoformer"):
                args = parse(flags, [*flags.rest, *override], dtype, ROWS[name])
                rows.append(Row(name, args, None if name == "tube" else rows[-1], override))
                references["x tube"][rows[-1].label] = " ".join(["tube", *override])
                references["x first"][rows[-1].label] = f"{name} --{flag} {values[0]}"
        report(rows, references, flags, max(flags.rounds // 2, 1), dtype)


def paper_memory(flags: argparse.Namespace, dtype: str, device: torch.device) -> None:
    """The paper's memory table: measured on a GPU, computed without one."""
    computed = device.type != "cuda"
    args = parse(flags, flags.rest, dtype, shapes_alone=computed)
    if computed and (args.compile or args.enable_deepspeed):
        raise UsageError("shapes alone do not tell the memory of --compile and --enable_deepspeed: leave them out")
    print(f"computed for a GPU, not measured; {dtype}" if computed else header(device, dtype))
    print(describe(args, "GB = 10^9 bytes" + ("" if effective_batch(args) == 32 else "; the paper's batch is 32")))
    table = []
    known = MEMORY_ROWS | SAVING_ROWS
    for name in choose_rows(flags, list(known)):
        row_flags, paper = known[name]
        args = parse(flags, flags.rest, dtype, row_flags, shapes_alone=computed)
        if computed:
            at_rest, peak = peak_of_a_step(args)
        else:
            torch.cuda.empty_cache()
            step, at_rest = own_memory(Row(name, args))
            peak = step + at_rest
        table.append([name, *(f"{x / 1e9:.2f}" for x in (peak - at_rest, at_rest, peak)), paper])
    print_table(["masks", "step GB", "weights, optimizer GB", "together GB", "paper reports (GB)"], table)


def own_memory(row: Row) -> tuple[int, int]:
    """Bytes of a step; of weights and optimizer states."""
    row.steps()  # makes the optimizer's states
    return peak_growth(row.steps, row.device), row.state_bytes()


def bench(flags: argparse.Namespace) -> None:
    if flags.memory and flags.dtype is None:
        flags.dtype = ["bf16"]  # also without a GPU, whose memory is then computed
    device = start(flags)
    flags.steps = flags.steps or (10 if device.type == "cuda" else 1)
    if flags.memory_of:
        row_flags = ROWS.get(flags.memory_of) or MEMORY_ROWS[flags.memory_of][0]
        print(*own_memory(Row(flags.memory_of, parse(flags, flags.rest, flags.dtype[0], row_flags))))
        return
    for dtype in flags.dtype:
        if flags.memory:
            paper_memory(flags, dtype, device)
            continue
        compare_masks(flags, dtype)
        if flags.sweep:
            sweep(flags, dtype)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", default=0, type=int, help="a round (1; on a GPU 10)")
    parser.add_argument("--tiny", action="store_true", help="64 pixels, 8 frames, width 96, batch 16")
    parser.add_argument("--memory", action="store_true", help="the paper's memory table instead (mask ratio 0.95)")
    flags, rest = parser.parse_known_args()
    flags.rest = rest
    run_script(bench, flags)


if __name__ == "__main__":
    main()
