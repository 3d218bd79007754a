"""The rules of the tree (CONTRIBUTING.md), read off the syntax trees."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path for path in ROOT.glob("*.py")} | {
    f"{folder}.{path.stem}": path for folder in ("datasets", "tools") for path in (ROOT / folder).glob("*.py")
}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules a file imports; from package import name counts as package.name where that is a file."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


ALLOWED = {
    "ppo": set(),
    "trajectory_attention": {"landmark_kernel"},
    "landmark_kernel": set(),
    "masking_generator": set(),
    "optim_factory": set(),
    "modeling_finetune": set(),
    "backend": set(),
    "checkpoint": {"foreign_files"},
    "foreign_files": set(),
    "utils": set(),
    "mask_pictures": {"masking_generator"},
    "preemption": {"utils"},
    "sampler_guard": set(),
    "datasets.transforms": set(),
    "datasets.moving_shapes": set(),
    "datasets.lists": set(),
    "datasets.packets": set(),
    "datasets.decoding": {"datasets.packets"},
    "datasets.video": {"datasets.decoding", "datasets.lists"},
    "datasets.build": {"datasets.lists", "datasets.transforms", "datasets.video"},
    "modeling_pretrain": {"modeling_finetune", "masking_generator"},
    "modeling_tats": {"modeling_finetune", "masking_generator", "trajectory_attention"},
    "modeling_adamae": {"modeling_finetune", "masking_generator", "modeling_tats"},
    "epoch_runner": {"backend", "optim_factory", "preemption", "utils"},
    "engine_for_pretraining": {
        "backend",
        "datasets.transforms",
        "epoch_runner",
        "masking_generator",
        "modeling_adamae",
        "modeling_pretrain",
    },
    "engine_for_tats": {"backend", "engine_for_pretraining", "epoch_runner", "masking_generator", "ppo", "utils"},
    "engine_for_finetuning": {"backend", "datasets.decoding", "datasets.transforms", "epoch_runner", "utils"},
    "reports": {"utils"},
    "tools.common": {"datasets.decoding", "datasets.lists", "utils"},
    "tools.make_lists": {"tools.common", "utils"},
    "tools.make_subset": {"datasets.lists", "tools.common", "utils"},
    "tools.check_videos": {"datasets.decoding", "datasets.lists", "tools.common", "utils"},
    "tools.resize_videos": {"datasets.decoding", "datasets.lists", "tools.common", "utils"},
    "tools.paper_tables": set(),
    "tools.seed_statistics": set(),
    "tools.run_folders": {"utils"},
    "tools.compare_pictures": {"utils", "tools.common", "tools.run_folders", "tools.seed_statistics"},
    "tools.compare_runs": {
        "tools.common",
        "tools.compare_pictures",
        "tools.paper_tables",
        "tools.run_folders",
        "tools.seed_statistics",
        "utils",
    },
    "run_common": {
        "backend",
        "checkpoint",
        "datasets.decoding",
        "datasets.lists",
        "datasets.transforms",
        "optim_factory",
        "preemption",
        "utils",
    },
}


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_go_one_way(name):
    assert imports(FILES[name]) & set(FILES) <= ALLOWED[name]


def test_engines_and_models_do_not_import_scripts():
    for name, path in FILES.items():
        if not name.startswith("run_"):
            assert not {m for m in imports(path) if m.startswith("run_")}, name
        if name.startswith("modeling_"):
            assert not {m for m in imports(path) if m.startswith("engine_")}, name


@pytest.mark.parametrize(
    "package,homes",
    [
        ("av", {"datasets.decoding", "datasets.moving_shapes", "tools.resize_videos"}),
        ("decord", {"datasets.decoding"}),
        ("deepspeed", {"backend"}),
        ("tensorboardX", {"run_common"}),
        ("mmcv", set()),
        ("landmark_kernel", {"trajectory_attention"}),
    ],
)
def test_optional_packages_are_imported_where_used_and_only_then(package, homes):
    for name, path in FILES.items():
        if package in {module.split(".")[0] for module in imports(path)}:
            assert name in homes, f"{name} imports {package}"
        assert package not in {module.split(".")[0] for module in imports(path, top_level_only=True)}, name


def test_only_known_packages_are_imported_at_the_top():
    """What a machine must have to train; everything else is optional and imported in the function that uses it."""
    needed = {"torch", "torchvision", "timm", "numpy", "matplotlib"}
    needed |= {"PIL", "safetensors"}  # come with torchvision and timm
    needed |= {"scipy"}  # of tools/compare_runs.py alone
    for name, path in FILES.items():
        packages = {module.split(".")[0] for module in imports(path, top_level_only=True)}
        needed_here = needed | ({"triton"} if name == "landmark_kernel" else set())  # imported where there is a GPU
        assert packages - set(sys.stdlib_module_names) - set(FILES) - {"datasets", "tools"} <= needed_here, name
