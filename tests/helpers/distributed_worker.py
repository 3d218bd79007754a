"""Started by test_distributed.py in one or two processes: trains one configuration after the other and writes what
happened. python -m torch.distributed.run --nproc_per_node 2 tests/helpers/distributed_worker.py CASES.json RESULT.json

A case: {"name", "flags": [...], "finetunes": true for run_class_finetuning.py, "stop_at": step at which the last
process gets SIGTERM, "then": flags of the run that resumes, "nan_at": steps at which its error is not a number}.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

import engine_for_pretraining
import engine_for_tats
import modeling_adamae
import run_class_finetuning
import run_mae_pretraining
from runtime.epoch import EpochRunner
from runtime.preemption import Preempted
from runtime.zero import DeepSpeedBackend
from utils import all_gather_object

torch.set_num_threads(1)
one_group = dist.init_process_group
dist.init_process_group = lambda *args, **kwargs: None if dist.is_initialized() else one_group(*args, **kwargs)
# AdaMAE's dropout is drawn by each process for itself: without it all ways of training are the same
block = modeling_adamae.Block
modeling_adamae.Block = lambda *args, **kwargs: block(*args, **kwargs | {"drop": 0.0})

end_micro_batch, masked_error = EpochRunner.end_micro_batch, engine_for_pretraining.masked_error
case: dict = {}
losses: dict[int, list[float]] = {}  # optimizer step -> of its micro-batches here
partitioned: list[int] = []  # under ZeRO 3: weights that lie elsewhere between steps


def last_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def watch_step(runner, index, step, lr, loss, complete):
    losses.setdefault(step, []).append(float(loss))
    if isinstance(runner.backend, DeepSpeedBackend) and runner.backend.stage == 3:
        partitioned.append(sum(p.numel() == 0 for p in runner.backend.unwrapped.parameters()))
    if step == case.get("stop_at") and last_process():
        runner.state.watch.signal = "SIGTERM"
    end_micro_batch(runner, index, step, lr, loss, complete)


def error_or_nan(*args):
    error = masked_error(*args)
    step = len(losses)  # of those that ended
    return error * float("nan") if step in case.get("nan_at", ()) and last_process() else error


EpochRunner.end_micro_batch = watch_step
engine_for_pretraining.masked_error = engine_for_tats.masked_error = error_or_nan


def train(flags: list[str]) -> str:
    try:
        if case.get("finetunes"):
            run_class_finetuning.run_finetuning(run_class_finetuning.parse_args(flags))
        else:
            run_mae_pretraining.train(run_mae_pretraining.get_parser().parse_args(flags))
    except Preempted as stop:
        return str(stop)
    return "finished"


def main() -> None:
    cases, result = sys.argv[1:]
    results = {}
    for case_read in json.loads(Path(cases).read_text()):
        case.clear()
        case.update(case_read)
        losses.clear()
        partitioned.clear()
        ends = [train(case["flags"])]
        if "then" in case:
            case.pop("stop_at", None)
            ends.append(train(case["then"]))
        everywhere = all_gather_object(losses)
        merged = {step: [loss for rank in everywhere for loss in rank[step]] for step in losses}
        results[case["name"]] = {
            "losses": {step: sum(values) / len(values) for step, values in merged.items()},
            "ends": all_gather_object(ends),
            "partitioned": max(partitioned, default=0),
        }
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(result).write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
