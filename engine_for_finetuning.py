"""Fine-tuning and evaluation: one epoch of training, views of all processes to scores, stored features of probes."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from torch import Tensor, nn

from datasets.decoding import VideoError
from datasets.transforms import normalize
from runtime.backend import AMP_DTYPES, Backend
from runtime.epoch import EpochRunner, Recipe, RunState
from runtime.knn import knn_votes
from runtime.tasks import SINGLE_LABEL, Task, correct, ranking
from utils import UsageError, all_gather_object, available_memory, format_time, log


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Recipe):
    task: Task = SINGLE_LABEL
    smoothing: float = 0.0
    mixup: Mixup | None = None


def prepare(video: Tensor, recipe: Recipe) -> Tensor:
    """Clips uint8 [B, T, 3, H, W] -> float32 [B, 3, T, H, W] on the device; stored features are only moved."""
    video = video.to(recipe.mean.device, non_blocking=True)
    return normalize(video, recipe.mean, recipe.std)[1] if video.dtype == torch.uint8 else video.float()


def mix(video: Tensor, label: Tensor, mixup: Mixup) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang 2018) or CutMix (Yun 2019) of a batch with itself reversed.

    video [B, 3, T, H, W], label int64 [B] -> mixed video, soft labels [B, K] with label smoothing. timm's Mixup knows
    images: frames are shown to it as channels, so that a CutMix box lies in H x W and is the same in every frame.
    """
    channels = video.shape[1:3]
    mixed, target = mixup(video.clone(memory_format=torch.contiguous_format).flatten(1, 2), label)
    return mixed.unflatten(1, channels), target


def train_one_epoch(
    backend: Backend, loader, recipe: FinetuneRecipe, epoch: int, ema=None, state: RunState | None = None
) -> dict[str, float]:
    """backend.unwrapped: clips -> logits. ema: timm's ModelEmaV3, or None. Returns epoch means; acc1 (%) where
    labels are classes that are not mixed."""
    backend.unwrapped.train()
    runner = EpochRunner(recipe, backend, epoch, state)
    for index, step, batch in runner.batches(loader):
        lr = recipe.apply_schedule(backend, step)
        video, label = prepare(batch["video"], recipe), batch["label"].to(recipe.mean.device, non_blocking=True)
        smoothing = recipe.smoothing
        if recipe.mixup is not None:
            video, label = mix(video, label, recipe.mixup)
            smoothing = 0.0  # already in the soft labels
        with backend.autocast(), backend.no_sync():
            logits = backend.module(video)
        loss = recipe.task.loss(logits.float(), label, smoothing)
        backend.backward(loss)
        runner.metrics.update(loss=loss)
        if label.ndim == 1:
            runner.metrics.update(acc1=100 * (logits.argmax(dim=1) == label).float().mean())
        stepped = backend.step()
        if stepped:
            runner.metrics.update(grad_norm=backend.grad_norm)
            if ema is not None:
                ema.update(backend.unwrapped)
        runner.end_micro_batch(index, step, lr, loss, stepped)
    for model in [backend.unwrapped] + ([ema.module] if ema is not None else []):
        average_batch_norm(model, recipe.mean.device)
    return runner.finish()


def average_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Gives all processes the same running statistics, so that they evaluate the same model.

    device: where processes can talk; a moving average may be kept in host memory.
    """
    if dist.is_initialized():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d):
                for buffer in (layer.running_mean, layer.running_var):
                    total = buffer.to(device, copy=True)
                    dist.all_reduce(total)
                    buffer.copy_(total / dist.get_world_size())


# --- evaluation --------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Of a whole list of videos, on the CPU, in the list's order, the same on every process."""

    probability: Tensor  # float32 [n, K], the task's scores averaged over views; zero where there are none
    label: Tensor  # int64 [n], or float32 [n, K]: the task's targets
    found: Tensor  # bool [n], False: the video could not be read
    failed: list[str]  # "path: reason"

    def measures(self, task: Task = SINGLE_LABEL) -> dict[str, float]:
        return task.measures(self.probability, self.label, self.found)

    def ranking(self) -> Tensor:
        """See runtime.tasks.ranking."""
        return ranking(self.probability)

    def correct(self, k: int) -> Tensor:
        """See runtime.tasks.correct."""
        return correct(self.probability, self.label, self.found, k)

    def predicted(self) -> Tensor:
        """int64 [n]: the most probable class, -1 where the video could not be read."""
        return self.ranking()[:, 0].where(self.found, -1)


@torch.no_grad()
def predict(
    model: nn.Module, loader, recipe: FinetuneRecipe, amp: str, batch_size: int, header: str = ""
) -> tuple[Tensor, Tensor, list[str]]:
    """This process's videos: index int64 [r], probability float32 [r, K] (both on the CPU), failures.

    A video's probability is the mean over its views of the task's scores, softmax(logits) for one label per video; the
    model sees batch_size views at a time.
    header: of a progress line every print_freq batches; "" prints none.
    """
    model.eval()
    device = recipe.mean.device
    indices, probabilities, failed = [], [], []
    start = time.perf_counter()
    for number, batch in enumerate(loader, 1):
        failed += batch["failed"]
        if batch["video"] is not None:
            outputs = []
            for views in batch["video"].split(batch_size):
                with torch.autocast(device.type, AMP_DTYPES[amp], enabled=AMP_DTYPES[amp] is not None):
                    logits = model(prepare(views, recipe))
                outputs.append(recipe.task.scores(logits.float()))
            indices.append(batch["index"])
            probabilities.append(torch.cat(outputs).unflatten(0, (len(batch["index"]), -1)).mean(dim=1))
        if header and number % recipe.print_freq == 0:
            left = (time.perf_counter() - start) / number * (len(loader) - number)
            log(f"{header} [{number}/{len(loader)} batches]  left {format_time(left)}")
    if not indices:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0), failed
    return torch.cat(indices), torch.cat(probabilities).cpu(), failed


def gather(index: Tensor, probability: Tensor, failed: list[str], label: Tensor) -> Scores:
    """Puts the predictions of all processes together by the videos' index. label: int64 [n] or float32 [n, K], of the
    whole list.

    Raises: RuntimeError where a video was predicted twice, is neither predicted nor failed, or has no finite score.
    """
    parts = all_gather_object((index, probability, failed))
    index = torch.cat([part[0] for part in parts])
    failed = sorted(failure for part in parts for failure in part[2])
    times = torch.bincount(index, minlength=len(label))
    if times.max() > 1 or int((times == 0).sum()) != len(failed):
        raise RuntimeError(
            f"evaluation is not complete: {int((times > 1).sum())} videos predicted twice, {int((times == 0).sum())} "
            f"not at all, {len(failed)} of them because they cannot be read"
        )
    num_classes = max((part[1].shape[1] for part in parts), default=0)
    scores = torch.zeros(len(label), max(num_classes, 1))
    if len(index):
        scores[index] = torch.cat([part[1] for part in parts if len(part[0])])
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).any(dim=1).sum())
        raise UsageError(
            f"the model gives no finite scores for {bad} of {len(label)} videos: its weights are damaged or "
            "diverged (lower --lr), or --amp fp16 overflows (use bf16 or none)"
        )
    return Scores(scores, label, times == 1, failed)


def evaluate(
    model: nn.Module,
    loader,
    recipe: FinetuneRecipe,
    amp: str,
    batch_size: int,
    allow_missing: bool = False,
    header: str = "",
) -> Scores:
    """Scores of all videos of loader.dataset, each counted once, whatever the number of processes.

    Raises: VideoError that names the videos that cannot be read, unless allow_missing; on every process together.
    """
    label = torch.as_tensor(loader.dataset.labels)
    scores = gather(*predict(model, loader, recipe, amp, batch_size, header), label)
    check_read(scores, loader.dataset.list_path, allow_missing)
    return scores


def check_read(scores: Scores, list_path: str, allow_missing: bool) -> None:
    """Raises VideoError where videos were not read; with allow_missing only where none was, else it names them."""
    if scores.failed and not (allow_missing and scores.found.any()):
        raise VideoError(
            f"{len(scores.failed)} of {len(scores.label)} videos of {list_path} cannot be read: "
            f"{'; '.join(scores.failed[:3])}{'; ...' if len(scores.failed) > 3 else ''} (repair the list, for example "
            "with tools/check_videos.py, or count them as wrong with --allow_missing)"
        )
    for failure in scores.failed:
        log(f"warning: counted as wrong, cannot be read: {failure}")


# --- probes: features of a frozen encoder, computed once ---------------------------------------------------------


class FeatureLoader:
    """The training loader's place where the encoder is frozen: batches of stored features in a new order each epoch."""

    @classmethod
    def of(cls, batches: Iterable[dict], clips: int, batch_size: int, seed: int):
        """Puts the features of so many clips into one tensor, without ever holding them twice."""
        features = label = None
        start = 0
        for batch in batches:
            if features is None:
                features = batch["video"].new_empty(clips, *batch["video"].shape[1:])
                label = batch["label"].new_empty(clips, *batch["label"].shape[1:])
            end = start + len(batch["label"])
            features[start:end], label[start:end] = batch["video"], batch["label"]
            start = end
        return cls(features, label, batch_size, seed)

    def __init__(self, features: Tensor, label: Tensor, batch_size: int, seed: int):
        self.features, self.label, self.batch_size, self.seed = features, label, batch_size, seed
        self.sampler = self

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """start: clips to leave out, which a run that was interrupted has had."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return len(self.label) // self.batch_size

    def __iter__(self) -> Iterator[dict]:
        order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch]).permutation(len(self.label)))
        for chosen in order[self.start : len(self) * self.batch_size].split(self.batch_size):
            yield dict(video=self.features[chosen], label=self.label[chosen], failed=[])


class StoredViews(list):
    """The validation loader's place: its batches with features in place of clips."""

    def __init__(self, loader, batches: list[dict]):
        super().__init__(batches)
        self.dataset = loader.dataset


@torch.no_grad()
def store_features(probe: nn.Module, loader: Iterable, recipe: Recipe, amp: str, clips: int) -> Iterator[dict]:
    """Yields the loader's batches with probe.features of their clips (on the CPU; float16 where whole tokens are kept)
    in place of the clips. clips: how many there will be, to refuse what memory cannot hold. Raises UsageError."""
    probe.eval()
    device = recipe.mean.device
    checked = False
    for batch in loader:
        for failure in batch["failed"]:
            print(f"warning: unreadable video: {failure}", flush=True)
        if batch["video"] is not None:
            with torch.autocast(device.type, AMP_DTYPES[amp], enabled=AMP_DTYPES[amp] is not None):
                features = probe.features(prepare(batch["video"], recipe))
            features = (features.half() if features.ndim == 3 else features.float()).cpu()
            if not checked:
                needed = features[0].numel() * features.element_size() * clips
                free = available_memory()
                if free is None:
                    gib = f"{needed / 2**30:.1f} GiB"
                    log(f"the features of {clips} clips take {gib}; this system does not say what is free")
                elif needed > 0.8 * free:
                    raise UsageError(
                        f"the features of {clips} clips take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: "
                        "use --no-cache_features (the encoder then runs in every epoch), or a lower --num_sample"
                    )
                checked = True
            batch = batch | {"video": features}
        yield batch


def gather_features(probe: nn.Module, loader, recipe: Recipe, amp: str) -> Scores:
    """Features of all videos of an evaluation loader's list, in its order, in the place of scores."""
    index, features, failed = [torch.zeros(0, dtype=torch.int64)], [], []
    for batch in store_features(probe, loader, recipe, amp, len(loader.dataset.labels)):
        failed += batch["failed"]
        if batch["video"] is not None:
            index.append(batch["index"])
            features.append(batch["video"])
    features = torch.cat(features) if features else torch.zeros(0, 0)
    return gather(torch.cat(index), features, failed, torch.as_tensor(loader.dataset.labels))


def evaluate_neighbours(
    probe: nn.Module, loaders: dict, recipe: Recipe, amp: str, neighbours: int, classes: int, allow_missing: bool
) -> Scores:
    """Scores of the videos of loaders["test"] by the nearest ones of loaders["train"] (see knn_votes), one central view
    of each. The same on any number of processes. Raises: VideoError; UsageError."""
    train, test = (gather_features(probe, loaders[split], recipe, amp) for split in ("train", "test"))
    check_read(test, loaders["test"].dataset.list_path, allow_missing)
    if not train.found.any():
        raise VideoError(f"no video of {loaders['train'].dataset.list_path} can be read: {train.failed[0]}")
    known = train.probability[train.found], train.label[train.found]
    votes = knn_votes(*known, test.probability, classes, neighbours).float()
    return Scores(votes * test.found[:, None], test.label, test.found, test.failed)
