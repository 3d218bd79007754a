"""The documents: every command names a program, a flag and a file that exist; every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_COMMANDS = {"docs/LOG.md": "notes on what was run then", "docs/GPU.md": "written by make gpu"}
FOLDERS = ("", "datasets", "runtime", "tools", "bench", "examples")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
FLAGS = {flag for path in SOURCES for flag in re.findall(r'"(--[a-z]\w*)"', path.read_text())}
OTHERS = {"--nodes", "--array"}  # of sbatch


def commands(path: Path) -> list[str]:
    """Lines of indented blocks that start a program, comments left out."""
    lines = re.findall(
        r"^    ((?:\w+=(?:\"[^\"]*\"|\S+) )*(?:python|bash|make|sbatch) .*)$", path.read_text(), re.MULTILINE
    )
    return [line.split("  #")[0].split(" # ")[0].strip() for line in lines]


def checked(path: Path) -> bool:
    return str(path.relative_to(ROOT)) not in NOT_COMMANDS


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if checked(p)], ids=lambda path: path.name)
def test_commands_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(path):
        words = command.split()
        if "make" in words:
            assert words[words.index("make") + 1] in targets, command
        for word in words:
            if re.fullmatch(r"(?:[a-z_]\w*/)*[\w{},]+\.(?:py|sh|sbatch)", word):
                assert (ROOT / word).is_file(), f"{path.name}: {command}: no file {word}"
            if word.startswith("--"):
                flag = word.split("=")[0]
                known = flag in FLAGS | OTHERS or flag.replace("--no-", "--", 1) in FLAGS or flag == "--help"
                assert known, f"{path.name}: {command}: no flag {flag}"


def test_the_readme_shows_what_a_newcomer_runs():
    found = commands(ROOT / "README.md")
    assert len(found) > 10
    for command in ("make demo", "make test", "make gpu", "make compare"):
        assert any(line.startswith(command) for line in found), command


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_document_is_in_the_index():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.name}" in text, path.name
