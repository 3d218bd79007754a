"""The rules of the tree (CONTRIBUTING.md), read off the syntax trees."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("datasets", "runtime", "tools", "examples")
FILES = {path.stem: path for path in ROOT.glob("*.py")} | {
    f"{folder}.{path.stem}": path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")
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


METHOD = r"ppo|masking_generator|trajectory_attention|landmark_kernel|optim_factory|modeling_\w+"
# Of a file whose name fits the first pattern: what of ours it may import. Each file fits one.
RULES = {
    r"ppo|landmark_kernel|optim_factory|utils": r"",
    r"masking_generator|trajectory_attention|modeling_\w+": METHOD,
    r"datasets\.\w+": r"datasets\.\w+",
    r"runtime\.\w+": r"runtime\.\w+|datasets\.\w+|utils|optim_factory|masking_generator",
    r"engine_\w+": rf"engine_\w+|runtime\.\w+|datasets\.\w+|utils|{METHOD}",
    # These run trained models; what compares runs reads their scripts' flags.
    r"tools\.(fixed_point|measure)": rf"tools\.\w+|datasets\.\w+|{METHOD}|run_mae_vis|"
    r"runtime\.(checkpoint|knn)|utils",
    r"tools\.(predict|extract_features|trained)": rf"tools\.\w+|runtime\.\w+|datasets\.\w+|utils|{METHOD}|"
    r"run_class_finetuning|engine_for_finetuning",
    r"tools\.(compare_\w+|run_folders)": r"tools\.\w+|run_mae_pretraining|runtime\.(resume|tasks)|utils",
    r"tools\.(convert_checkpoint|model_card)": rf"tools\.\w+|datasets\.\w+|runtime\.\w+|{METHOD}|run_\w+|utils",
    r"tools\.(?!fixed_point|measure|predict|extract_|trained|compare_|run_folders|convert_|model_)\w+": r"tools\.\w+|"
    r"datasets\.\w+|utils",
    r"run_\w+|examples\.\w+": r".*",
}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    (allowed,) = (allowed for pattern, allowed in RULES.items() if re.fullmatch(pattern, name))
    found = imports(FILES[name]) & set(FILES) - {name}
    assert {other for other in found if not re.fullmatch(allowed, other)} == set()


def test_no_file_imports_itself_through_others():
    needs = {name: imports(path) & set(FILES) for name, path in FILES.items()}
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f"a circle among {', '.join(needs)}"
        for name in free:
            del needs[name]


def test_the_root_is_what_a_user_of_videomae_looks_for():
    """What keeps a run going is in runtime/, so that the method is found at once."""
    assert len(list(ROOT.glob("*.py"))) <= 18


@pytest.mark.parametrize(
    "package,homes",
    [
        ("av", {"datasets.decoding", "datasets.moving_shapes", "tools.resize_videos"}),
        ("decord", {"datasets.decoding"}),
        ("deepspeed", {"runtime.zero"}),
        ("tensorboardX", {"runtime.outputs"}),
        ("mmcv", {"run_mae_vis"}),
        ("cv2", {"run_mae_vis"}),
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
        needed_here |= {"transformers"} if name == "examples.tats_on_transformers" else set()
        assert packages - set(sys.stdlib_module_names) - set(FILES) - set(FOLDERS) <= needed_here, name
