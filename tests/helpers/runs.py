"""Whole runs on small clips, as a user starts them."""

import ast
import json
import re
import socket
import sys
from pathlib import Path

import run_mae_pretraining
from runtime.flags import NoEffect

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--model", "pretrain_videomae_tiny_patch8_64", "--input_size", "32", "--num_frames", "4", "--sampling_rate", "2",
    "--decoder_depth", "1", "--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--print_freq", "2",
    "--warmup_epochs", "0", "--lr", "0.01", "--tats_lr", "1e-3",
]  # fmt: skip


def command(data_path, *flags) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "run_mae_pretraining.py"),
        "--data_path",
        str(data_path),
        *TINY,
        *map(str, flags),
    ]


def run_here(data_path, *flags) -> None:
    """The same in this process, where starting one adds nothing to the claim."""
    run_mae_pretraining.main(command(data_path, *flags)[2:])


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def naming(*parts) -> str:
    """A regular expression for a line that names all parts, in any order and whatever the words around them."""

    def whole(part: str) -> str:  # 3 is not named by 13
        before, behind = re.match(r"\w", part) and r"(?<!\w)", re.search(r"\w\Z", part) and r"(?!\w)"
        return (before or "") + re.escape(part) + (behind or "")

    return "(?m)^" + "".join(f"(?=.*{whole(str(part))})" for part in parts)


def assert_names(text, *parts) -> None:
    assert re.search(naming(*parts), str(text)), (parts, text)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def flags_to_read(parser) -> set[str]:
    """Names of the flags that say more than "taken, without effect"."""
    return {action.dest for action in parser._actions if not isinstance(action, NoEffect)} - {"help"}


def flags_read(other_scripts: tuple[str, ...]) -> set[str]:
    """Names that some product file reads from args. Checks of a value alone do not count as reading."""
    files = [path for path in ROOT.glob("*.py") if path.name not in other_scripts]
    by_samplers = {flag for sampler in run_mae_pretraining.SAMPLERS.values() for flag in sampler.flags.values()}
    return by_samplers | {
        node.attr
        for path in [*files, *(ROOT / "datasets").glob("*.py"), *(ROOT / "runtime").glob("*.py")]
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.Assign) and getattr(function, "name", "") != "check_flags"
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value).endswith("args")
    }


TINY_FINETUNING = [
    "--data_set", "custom", "--nb_classes", "10", "--no-flip", "--model", "vit_tiny_patch8_64", "--input_size", "32",
    "--num_frames", "4", "--sampling_rate", "2", "--batch_size", "4", "--num_workers", "0", "--device", "cpu",
    "--print_freq", "2", "--warmup_epochs", "0", "--lr", "0.1", "--test_num_segment", "2", "--test_num_crop", "3",
]  # fmt: skip


def finetuning_flags(data_path, *flags) -> list[str]:
    return ["--data_path", str(data_path), *TINY_FINETUNING, *map(str, flags)]
