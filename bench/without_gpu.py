"""A training step on a GPU that is not there: every tensor on `cuda`, shapes without data. No command of its own.

FakeTensorMode gives the shapes; what of torch asks a driver is replaced in fake_gpu(). The engines, the
backend and the optimizer run as they are.
"""

import contextlib
import dataclasses
import heapq
import itertools
import weakref
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from run_mae_pretraining import Run

GPU = torch.device("cuda", 0)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages of tensors on a device that operators return, as long as anything refers to them."""

    def __init__(self, device_type: str):
        super().__init__()
        self.live = self.peak = 0
        self.device_type = device_type
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type != self.device_type:
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


class BackwardPass:
    """loss.backward() in Python. torch's own engine asks for the driver's streams before its first node
    (pytorch#92627). Order, reduction of broadcast gradients and release of what was saved are the engine's."""

    def __init__(self):
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)
        self.numbers = itertools.count()
        self.used: list[list[Tensor | None]] = []  # what the node at work has read

    def pack(self, tensor: Tensor) -> list[Tensor | None]:
        return [tensor]

    def unpack(self, kept: list[Tensor | None]) -> Tensor:
        if kept[0] is None:
            raise RuntimeError("a saved tensor is read twice, after it was released")
        self.used.append(kept)
        return kept[0]

    def task_id(self) -> int:
        """What checkpoint() knows a backward pass by."""
        return self.task

    def __call__(self, loss: Tensor) -> None:
        self.task = next(self.numbers)
        waiting = _consumers(loss.grad_fn)
        gradients = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}}
        order = itertools.count()
        ready = [(0, next(order), loss.grad_fn)]
        with torch.no_grad():
            while ready:
                node = heapq.heappop(ready)[2]
                found = gradients.pop(node, {})
                results = self.apply(node, [found.pop(i, None) for i in range(len(node._input_metadata))])
                del found
                for (child, place), gradient in results:
                    if gradient is not None:
                        _add(gradients.setdefault(child, {}), place, gradient, child)
                    waiting[child] -= 1
                    if not waiting[child]:  # the latest node of the forward pass first, weights' gradients at once
                        first = hasattr(child, "variable")
                        heapq.heappush(ready, (-float("inf") if first else -child._sequence_nr(), next(order), child))
                results = gradient = None  # lest they outlive their use
                for kept in self.used:
                    kept[0] = None
                self.used.clear()

    def apply(self, node, gradients: list[Tensor | None]) -> list[tuple[tuple, Tensor | None]]:
        """Runs one node: [((next node, its input), gradient)] of the inputs that have one."""
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        if hasattr(node, "variable"):
            if gradients[0] is not None:
                _accumulate(node.variable, gradients[0])
            return []
        if all(gradient is None for gradient in gradients):
            return [(edge, None) for edge in edges]
        if hasattr(node, "needs_input_grad"):  # torch.autograd.Function: one result an argument
            results = node.apply(*gradients)
            results = results if isinstance(results, tuple) else (results,)
            wanted = [r for r, needed in zip(results, node.needs_input_grad, strict=True) if needed]
            return list(zip(edges, wanted, strict=True))
        results = node(*gradients)
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(node.next_functions, results, strict=True)
        return [(edge, result) for edge, result in pairs if edge[0] is not None]


def _consumers(root) -> dict:
    """How many edges lead to each node of the graph."""
    counts, stack = {root: 0}, [root]
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                if child not in counts:
                    counts[child] = 0
                    stack.append(child)
                counts[child] += 1
    return counts


def _add(gradients: dict[int, Tensor], place: int, gradient: Tensor, node) -> None:
    expected = node._input_metadata[place]
    if gradient.shape != expected.shape:
        gradient = gradient.sum_to_size(expected.shape)
    gradient = gradient.to(expected.dtype)
    gradients[place] = gradients[place] + gradient if place in gradients else gradient


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    if parameter.grad is None:
        parameter.grad = gradient.detach()
    else:
        parameter.grad += gradient


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, scale=None) -> Tensor:
    """F.scaled_dot_product_attention by the kernel that an NVIDIA GPU from Ampere on takes for our shapes, which have
    no attn_mask."""
    if q.dtype == torch.float32:
        kept = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, kept, dropout_p, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, scale=scale)[0]


@contextlib.contextmanager
def fake_gpu():
    """Inside, tensors on `cuda` have a shape and no data, also where torch finds no GPU. Nothing may read a value."""
    backward = BackwardPass()
    replaced = {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # else autocast turns itself off
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.nn.Module.to": lambda module, *_, **__: module,  # a fake weight cannot be moved: build on the device
        "torch.nn.functional.scaled_dot_product_attention": _attention,  # without a driver torch takes the plain form
        "torch.Tensor.backward": lambda loss: backward(loss),
        "torch._C._current_graph_task_id": backward.task_id,
    }
    with contextlib.ExitStack() as stack:
        for target, value in replaced.items():
            stack.enter_context(mock.patch(target, value))
        mode = stack.enter_context(FakeTensorMode())
        stack.enter_context(backward.hooks)
        yield mode


class Enough(Exception):
    """Ends an epoch after the steps asked for, before anything reads a value."""


def some_batches(batch: dict, count: int):
    """A loader's batches; raises Enough behind the last."""
    yield from itertools.repeat(batch, count)
    raise Enough


def prepare(args, device: torch.device) -> tuple[Run, dict, Callable[[int], None]]:
    """A pre-training run on the device, its batch of black clips on the host, and a function that takes the optimizer
    step of this number (with TATS as many as a phase 1 has) by the engines. On a fake GPU: to be called `with GPU:`."""
    run = Run(args, device)
    recipe = dataclasses.replace(run.recipe(10**9), print_freq=10**9)
    shape = (args.batch_size, args.num_frames, 3, args.input_size, args.input_size)
    video = torch.zeros(shape, dtype=torch.uint8, device="cpu")
    batch = {"video": video, "seed": torch.arange(args.batch_size, device="cpu"), "failed": []}

    def step(number: int) -> None:
        count = args.accum_iter * (args.tats_rollout_steps if run.agent else 1)
        batches = some_batches(batch, count)
        with contextlib.suppress(Enough):
            run.train_one_epoch(batches, recipe, number + args.tats_start_epoch)

    return run, batch, step


def peak_of_a_step(args) -> tuple[int, int]:
    """Bytes on the GPU between steps (weights and optimizer) and at the peak of the second step."""
    args.rank, args.local_rank, args.world_size = 0, 0, 1
    with fake_gpu(), LiveBytes("cuda") as count:
        with GPU:
            _run, _, step = prepare(args, GPU)  # _run: held while bytes are counted
        for number in range(2):  # AdamW makes its state in the first
            at_rest = count.live
            count.peak = count.live
            step(number)
        return at_rest, count.peak
