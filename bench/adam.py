"""Fused Adams: do they step where AdamW's formula does, and what does a step cost?

Rows: torch's AdamW with a kernel an operation (foreach) and fused, and through DeepSpeed (ZeRO 1, one process) torch's
fused one, DeepSpeed's FusedAdam and, offloaded, its CPUAdam, which are compiled at their first use (about two minutes).
deviation: after 12 steps with clipping and two parameter groups, of any weight from AdamW written out in float64, over
the largest change of a weight. backward, step ms: of a loss that costs little, with 21.7 M parameters. ratio: time over
foreach's, median of the rounds.
"""

import torch
from common import choose_rows, header, new_parser, print_table, ratio, start, time_rounds
from torch import nn

from runtime.backend import Backend
from runtime.zero import DeepSpeedBackend, deepspeed_config

LR, BETAS, EPS, DECAY, CLIP, STEPS = 1e-3, (0.9, 0.95), 1e-8, 0.05, 1.0, 12
ROWS = {  # fused_adam, offload of DeepSpeed; None: plain
    "foreach": None,
    "fused": None,
    "DeepSpeed, torch fused": ("torch", "none"),
    "DeepSpeed, FusedAdam": ("deepspeed", "none"),
    "DeepSpeed, CPUAdam": ("deepspeed", "cpu"),
}


def build(row: str, width: int, device: torch.device) -> Backend:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).to(device)
    biases = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": DECAY},
              {"params": biases, "weight_decay": 0.0}]  # fmt: skip
    if ROWS[row] is None:
        optimizer = torch.optim.AdamW(groups, LR, BETAS, EPS, **{row: True})
        return Backend(module, optimizer, device, clip_grad=CLIP)
    fused_adam, offload = ROWS[row]
    config = deepspeed_config(
        zero_stage=1, offload=offload, fused_adam=fused_adam, opt="adamw", lr=LR, betas=BETAS, eps=EPS, batch_size=1,
        accum_iter=1, world_size=1, clip_grad=CLIP, amp="none",
    )  # fmt: skip
    return DeepSpeedBackend(module, groups, device, config)


def gradients(module: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """The same for every row, of a norm around the clipping's."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.3 * (1 + step % 3) / p.numel() ** 0.5
        for name, p in module.named_parameters()
    }


def take_step(backend: Backend, wanted: dict[str, torch.Tensor]) -> None:
    """A loss whose gradient is the wanted one."""
    loss = sum((p * wanted[name]).sum() for name, p in backend.raw.named_parameters())
    backend.backward(loss)
    backend.step()


def written_out(module: nn.Module) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after STEPS steps of AdamW (Loshchilov 2019) in float64, and their largest change."""
    weights = {name: p.detach().cpu().double() for name, p in module.named_parameters()}
    first = {name: w.clone() for name, w in weights.items()}
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(1, STEPS + 1):
        grads = {name: g.double() for name, g in gradients(module, step).items()}
        norm = sum(g.square().sum() for g in grads.values()).sqrt()
        for name, w in weights.items():
            g = grads[name] * min(1.0, CLIP / norm)
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g.square()
            corrected = (v[name] / (1 - BETAS[1] ** step)).sqrt() + EPS
            w.mul_(1 - LR * (DECAY if w.ndim > 1 else 0.0)).sub_(LR * m[name] / (1 - BETAS[0] ** step) / corrected)
    return weights, max((weights[name] - first[name]).abs().max().item() for name in weights)


def deviation(row: str, width: int, device: torch.device) -> float:
    backend = build(row, width, device)
    expected, change = written_out(backend.raw)
    for step in range(1, STEPS + 1):
        take_step(backend, {name: g.to(device) for name, g in gradients(backend.raw, step).items()})
    found = backend.weights(backend.raw)
    return max((found[name].cpu() - expected[name]).abs().max().item() for name in expected) / change


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--width", default=2688, type=int, help="of the three layers timed (2688)")
    flags = parser.parse_args()
    device = start(flags)
    rows = choose_rows(flags, list(ROWS), ("foreach",))
    deviations = {row: deviation(row, 96, device) for row in rows}
    backends = {row: build(row, flags.width, device) for row in rows}
    wanted = {name: g.to(device) for name, g in gradients(backends["foreach"].raw, 1).items()}
    calls = {row: (lambda backend=backend: take_step(backend, wanted)) for row, backend in backends.items()}
    times = time_rounds(calls, flags.rounds, device)
    print(header(device, "fp32"))
    table = [
        [row, f"{deviations[row]:.1e}", f"{1e3 * min(times[row]):.0f}", ratio(times[row], times["foreach"])]
        for row in rows
    ]
    print_table(["AdamW", "deviation", "backward, step ms", "ratio"], table)


if __name__ == "__main__":
    main()
