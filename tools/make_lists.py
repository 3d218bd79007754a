"""Writes train.csv, val.csv, where there is one test.csv, and classes.txt from a data set's official annotations.

    python tools/make_lists.py --data_set UCF101 --annotations ucfTrainTestlist --videos UCF-101 --output lists

--annotations is the folder with the files as they are distributed (their names may have more characters at the end):
  UCF101        classInd.txt, trainlist0K.txt, testlist0K.txt (the test list becomes val.csv)
  HMDB51        CLASS_test_splitK.txt of all classes (1 = train.csv, 2 = val.csv, 0 = unused)
  SSV2          labels.json, train.json, validation.json, test.json, or with something-something-v2- in front
  Kinetics-400, -600, -700
                train.csv, validate.csv or val.csv, test.csv, label_map.txt (without it: all labels in order), and
                k710_identical_label_merge.json, where label_map.txt is VideoMAE V2's, with its names of the classes
  Diving48      Diving48_V2_train.json, Diving48_V2_test.json (becomes val.csv), Diving48_vocab.json
  EPIC-100-verb, EPIC-100-noun
                EPIC_100_train.csv, EPIC_100_validation.csv, EPIC_100_test_timestamps.csv, and
                EPIC_100_verb_classes.csv or EPIC_100_noun_classes.csv

Videos are found by name anywhere below --videos: in a folder for each class or all in one, with the extension of the
annotations or another (.mp4 after resizing). For Kinetics the name is ID_START_END (six digits each) or ID; for EPIC it
is the narration_id, because a list names whole files: cut each segment into its own file first.

A list has `path label` on each line; line n of classes.txt, counted from 0, names label n. Paths below --output are
written relative to it, others absolute. A test list with videos without a known label (-1) is called
test_unlabelled.csv: it cannot be scored, and fine-tuning would take a test.csv.
"""

import argparse
import csv
import functools
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.common import Formatter, excerpt, find_videos, run_tool, write_list, write_text
from utils import UsageError


class Entry(NamedTuple):
    """A video of the annotations: label, its class's folder ("" = none), names without extension that the file may
    have, the best first, and the extension."""

    label: int
    folder: str
    names: tuple[str, ...]
    suffix: str

    @property
    def expected(self) -> str:
        """The path below --videos where the file should be."""
        return os.path.join(self.folder, self.names[0] + self.suffix)


# ----------------------------------------------------------------------------------------------------- annotations
# A reader takes the folder and the split, and returns the class names in the order of the labels and
# {"train" | "val" | "test": list of Entry}, without those whose file is not there.


Splits = dict[str, list[Entry]]


def read_ucf101(folder: str, split: int) -> tuple[list[str], Splits]:
    ids = {}
    path = find_file(folder, ("classInd",), ".txt")
    for where, line in lines_of(path):
        number, name = fields(where, line, r"([0-9]{1,9})\s+(\S+)", "`id class`")
        ids[name] = int(number) - 1
    if sorted(ids.values()) != list(range(len(ids))):
        raise UsageError(f"{path}: the ids are not 1 to {len(ids)}, each once")
    splits = {}
    for name, stem in (("train", f"trainlist0{split}"), ("val", f"testlist0{split}")):
        path = find_file(folder, (stem,), ".txt", required=False)
        if path:
            entries = splits[name] = []
            for where, line in lines_of(path):
                pattern = r"([^/]+)/(.+)(\.\w+?)(?:\s+([0-9]{1,9}))?"
                group, video, suffix, number = fields(where, line, pattern, "`class/video.avi` or `class/video.avi id`")
                label = label_of(ids, group, where)
                if number is not None and int(number) - 1 != label:
                    raise UsageError(f"{where}: id {number}, but classInd.txt gives {group} the id {label + 1}")
                entries.append(Entry(label, group, (video,), suffix))
    return sorted(ids, key=ids.get), splits


def read_hmdb51(folder: str, split: int) -> tuple[list[str], Splits]:
    pattern = re.compile(rf"(.+)_test_split{split}.*\.txt")
    files = {match[1]: name for name in os.listdir(folder) if (match := pattern.fullmatch(name))}
    if not files:
        raise UsageError(f"--annotations {folder}: no file CLASS_test_split{split}.txt there")
    classes = sorted(files)
    splits = {"train": [], "val": []}
    for label, group in enumerate(classes):
        for where, line in lines_of(os.path.join(folder, files[group])):
            video, suffix, use = fields(where, line, r"(.+)(\.\w+)\s+([012])", "`video.avi 0|1|2`")
            if use != "0":
                splits["train" if use == "1" else "val"].append(Entry(label, group, (video,), suffix))
    return classes, splits


def read_ssv2(folder: str, split: int) -> tuple[list[str], Splits]:
    def find(name: str, required: bool = True) -> str | None:
        return find_file(folder, (name, f"something-something-v2-{name}"), ".json", required)

    path = find("labels")
    labels = load_json(path, dict)
    ids = {text: int(number) for text, number in labels.items() if re.fullmatch("[0-9]{1,9}", str(number))}
    if len(ids) < len(labels) or sorted(ids.values()) != list(range(len(ids))):
        raise UsageError(f"{path}: the ids are not 0 to {len(labels) - 1}, each once")
    splits = {}
    for name, stem in (("train", "train"), ("val", "validation"), ("test", "test")):
        path = find(stem, required=False)
        if path:
            entries = splits[name] = []
            for where, row in rows_of(load_json(path, list), path):
                if "id" not in row or ("template" not in row and name != "test"):
                    raise UsageError(f"{where}: {excerpt(str(row))} has no id or no template")
                template = row.get("template", "")
                if not isinstance(template, str) or not isinstance(row["id"], str | int):
                    raise UsageError(f"{where}: {excerpt(str(row))} has an id or template that is no text")
                template = template.replace("[", "").replace("]", "")
                label = label_of(ids, template, where) if template else -1
                entries.append(Entry(label, "", (str(row["id"]),), ".webm"))
    return sorted(ids, key=ids.get), splits


def read_kinetics(folder: str, split: int) -> tuple[list[str], Splits]:
    files = {}
    for name, stems in (("train", ("train",)), ("val", ("validate", "val")), ("test", ("test",))):
        path = find_file(folder, stems, ".csv", required=False)
        if path:
            needed = {"youtube_id", "time_start", "time_end"} | ({"label"} if name != "test" else set())
            files[name] = load_csv(path, needed)
    label_map = find_file(folder, ("label_map",), ".txt", required=False)
    if label_map:
        classes = [line for _, line in lines_of(label_map)]
    else:
        classes = sorted({row["label"] for rows in files.values() for _, row in rows if row.get("label")})
    ids = {name: label for label, name in enumerate(classes)}
    merge = find_file(folder, ("k710_identical_label_merge",), ".json", required=False)
    renamed = load_json(merge, dict) if merge else {}
    splits = {name: [] for name in files}
    for name, rows in files.items():
        for where, row in rows:
            try:
                start, end = int(row["time_start"]), int(row["time_end"])
            except (TypeError, ValueError):
                raise UsageError(f"{where}: no whole seconds in {excerpt(str(row))}") from None
            group = row.get("label") or ""
            listed = group if group in ids else str(renamed.get(group, group))
            label = label_of(ids, listed, where) if group or name != "test" else -1
            names = f"{row['youtube_id']}_{start:06d}_{end:06d}", row["youtube_id"]
            splits[name].append(Entry(label, group, names, ".mp4"))
    return classes, splits


def read_diving48(folder: str, split: int) -> tuple[list[str], Splits]:
    path = find_file(folder, ("Diving48_vocab",), ".json")
    vocabulary = load_json(path, list)
    classes = [" ".join(map(str, parts)) if isinstance(parts, list) else str(parts) for parts in vocabulary]
    splits = {}
    for name, stem in (("train", "Diving48_V2_train"), ("val", "Diving48_V2_test")):
        path = find_file(folder, (stem,), ".json", required=False)
        if path:
            entries = splits[name] = []
            for where, row in rows_of(load_json(path, list), path):
                video, label = row.get("vid_name"), row.get("label")
                if not isinstance(video, str) or not video:
                    raise UsageError(f"{where}: {excerpt(str(row))} has no vid_name")
                entries.append(Entry(number_of(label, len(classes), where), "", (video,), ".mp4"))
    return classes, splits


def read_epic(part: str, folder: str, split: int) -> tuple[list[str], Splits]:
    """part: "verb" or "noun"."""
    path = find_file(folder, (f"EPIC_100_{part}_classes",), ".csv")
    names = {row["id"]: row["key"] for _, row in load_csv(path, {"id", "key"})}
    classes = [names.get(str(label)) for label in range(len(names))]
    if not all(classes):
        raise UsageError(f"{path}: the ids are not 0 to {len(names) - 1}, each once and with a key")
    splits = {}
    for name, stem in (("train", "train"), ("val", "validation"), ("test", "test_timestamps")):
        path = find_file(folder, (f"EPIC_100_{stem}",), ".csv", required=False)
        if path:
            entries, column = [], f"{part}_class"
            for where, row in load_csv(path, {"narration_id"} | ({column} if name != "test" else set())):
                if not row["narration_id"]:
                    raise UsageError(f"{where}: no narration_id in {excerpt(str(row))}")
                label = number_of(row[column], len(classes), where) if column in row else -1
                entries.append(Entry(label, "", (row["narration_id"],), ".mp4"))
            splits[name] = entries
    return classes, splits


READERS = {  # and the number of classes
    "UCF101": (read_ucf101, 101),
    "HMDB51": (read_hmdb51, 51),
    "SSV2": (read_ssv2, 174),
    "Kinetics-400": (read_kinetics, 400),
    "Kinetics-600": (read_kinetics, 600),
    "Kinetics-700": (read_kinetics, 700),
    "Diving48": (read_diving48, 48),
    "EPIC-100-verb": (functools.partial(read_epic, "verb"), 97),
    "EPIC-100-noun": (functools.partial(read_epic, "noun"), 300),
}


def find_file(folder: str, stems: tuple[str, ...], suffix: str, required: bool = True) -> str | None:
    """Path of the one file whose name starts with one of stems; None where there is none and it is not required.
    Raises: UsageError."""
    found = sorted(name for name in os.listdir(folder) if name.startswith(stems) and name.endswith(suffix))
    found = [name for name in found if name.removesuffix(suffix) in stems] or found
    if len(found) > 1:
        raise UsageError(f"--annotations {folder}: keep one of {', '.join(found)}")
    if not found and required:
        raise UsageError(f"--annotations {folder}: no file {' or '.join(f'{stem}*{suffix}' for stem in stems)} there")
    return os.path.join(folder, found[0]) if found else None


def read_text(path: str) -> str:
    """Raises: UsageError where it is no text file."""
    if not os.path.isfile(path):  # reading a pipe would wait for a writer
        raise UsageError(f"{path}: not a regular file")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file ({error.reason})") from error


def load_json(path: str, kind: type) -> Any:
    """The content of a JSON file, which has to be of the kind list or dict. Raises: UsageError."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 100,000 brackets
        raise UsageError(f"{path}: not the file of the data set ({error})") from error
    if not isinstance(content, kind):
        raise UsageError(f"{path}: not the file of the data set, it is no {kind.__name__}")
    return content


def rows_of(rows: list, path: str) -> Iterator[tuple[str, dict]]:
    """Yields ("FILE, entry N", row) of a list of dictionaries. Raises: UsageError."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{path}, entry {number}: {excerpt(str(row))} has no names and values")
        yield f"{path}, entry {number}", row


def load_csv(path: str, needed: set[str]) -> list[tuple[str, dict[str, str]]]:
    """("FILE, line N", row) of a CSV file that has the columns needed, and others. Raises: UsageError."""
    table = csv.DictReader(read_text(path).splitlines(), strict=True)
    try:
        rows = [(f"{path}, line {table.line_num}", row) for row in table]
    except csv.Error as error:
        raise UsageError(f"{path}, line {table.line_num}: not CSV ({error})") from error
    if not needed <= set(table.fieldnames or ()):
        raise UsageError(f"{path}, line 1: columns {', '.join(sorted(needed))} are needed")
    return rows


def lines_of(path: str) -> Iterator[tuple[str, str]]:
    """Yields ("FILE, line N", line) for the lines that are not blank."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def fields(where: str, line: str, pattern: str, wanted: str) -> tuple[str, ...]:
    """The groups of a pattern that the whole line matches. Raises: UsageError, with the form wanted."""
    match = re.fullmatch(pattern, line)
    if match is None:
        raise UsageError(f"{where}: {excerpt(line)} is not {wanted}")
    return match.groups()


def label_of(ids: dict[str, int], name: str, where: str) -> int:
    """Raises: UsageError for an unknown class."""
    if name not in ids:
        raise UsageError(f"{where}: unknown class {excerpt(name)}")
    return ids[name]


def number_of(label: Any, num_classes: int, where: str) -> int:
    """A label that the annotations give as a number. Raises: UsageError where it is none of the classes."""
    if not re.fullmatch("[0-9]{1,9}", str(label)) or int(label) >= num_classes:
        raise UsageError(f"{where}: label {excerpt(str(label))} is not one of the {num_classes} classes, from 0")
    return int(label)


# ---------------------------------------------------------------------------------------------------------- videos


class Index:
    """The video files below a folder, found by name in one walk."""

    def __init__(self, folder: str, classes: Iterable[str]):
        self.files: dict[str, list[str]] = defaultdict(list)  # {name without extension: paths}
        self.count = 0
        for self.count, path in enumerate(find_videos(folder), 1):
            self.files[os.path.splitext(os.path.basename(path))[0]].append(path)
        self.class_folders = {_plain(name) for name in classes}

    def find(self, entry: Entry) -> str | None:
        """The path of an entry's file or None. Folders of other classes are left out: names may repeat.
        Raises: UsageError for two files."""
        for name in entry.names:
            found = []
            for path in self.files.get(name, ()):
                parent = _plain(os.path.basename(os.path.dirname(path)))
                own = parent == _plain(entry.folder)
                if own or parent not in self.class_folders:
                    found.append((not own, not path.endswith(entry.suffix), path))
            found.sort()
            if len(found) > 1 and found[0][:2] == found[1][:2]:
                raise UsageError(f"two files for one video: {found[0][2]} and {found[1][2]}: move one away")
            if found:
                return found[0][2]
        return None


def _plain(name: str) -> str:
    return name.lower().replace("_", " ")  # the folders of Kinetics-400 come with spaces or underscores


def make_lists(args: argparse.Namespace) -> None:
    """Raises: UsageError."""
    for flag, folder in (("--annotations", args.annotations), ("--videos", args.videos)):
        if not os.path.isdir(folder):
            raise UsageError(f"{flag} {folder}: no such folder")
    reader, num_classes = READERS[args.data_set]
    classes, splits = reader(args.annotations, args.split)
    if not splits:
        raise UsageError(f"--annotations {args.annotations}: no train or validation file of {args.data_set} there")
    both = {e.expected for e in splits.get("train", ())} & {e.expected for e in splits.get("val", ())}
    if both:
        raise UsageError(f"--annotations {args.annotations}: {min(both)} is both for training and for validation")
    if len(classes) != num_classes:
        print(f"warning: {len(classes)} classes, {args.data_set} has {num_classes}: labels are not the official ones")
    for split in ("train", "val"):
        if split not in splits:
            print(f"note: no {split} file in {args.annotations}, so no {split}.csv is written")

    videos = os.path.abspath(args.videos)
    index = Index(videos, classes)
    lists, missing = {}, []
    for split, entries in splits.items():
        found = [(index.find(entry), entry) for entry in entries]
        absent = [entry.expected for path, entry in found if path is None]
        if absent:
            named = ", ".join([*absent[:3], "..."] if len(absent) > 3 else absent)
            print(f"warning: {len(absent)} of {len(entries)} videos of {split}.csv are not below {videos}: {named}")
            missing += [f"{split}.csv {path}\n" for path in absent]
        if args.missing == "keep":
            lists[split] = [(path or os.path.join(videos, entry.expected), entry.label) for path, entry in found]
        elif len(absent) < len(entries):
            lists[split] = [(path, entry.label) for path, entry in found if path]
        else:
            print(f"warning: no {split}.csv is written")
    if not lists:
        example = missing[0].split(maxsplit=1)[1].strip() if missing else "nothing: the annotations are empty"
        raise UsageError(
            f"--videos {videos}: none of the {index.count} video files there is in the annotations; looked for "
            f"{example}, in any folder and with any extension"
        )
    os.makedirs(args.output, exist_ok=True)
    for split, listed in lists.items():
        unlabelled = "_unlabelled" if any(label == -1 for _, label in listed) else ""
        path = os.path.join(args.output, f"{split}{unlabelled}.csv")
        write_list(path, [video for video, _ in listed], [label for _, label in listed])
        print(f"{path}: {len(listed)} videos of {len({label for _, label in listed} - {-1})} classes")
    write_text(os.path.join(args.output, "classes.txt"), "".join(f"{name}\n" for name in classes))
    missing_file = os.path.join(args.output, "missing.txt")
    Path(missing_file).unlink(missing_ok=True)  # of an earlier run
    if missing:
        write_text(missing_file, "".join(missing))
        print(f"{missing_file}: the {len(missing)} missing videos; --missing {args.missing}")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--data_set", required=True, choices=READERS)
    parser.add_argument("--annotations", required=True, metavar="FOLDER", help="the official annotation files")
    parser.add_argument("--videos", required=True, metavar="FOLDER", help="the videos, in any folders below")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the lists go")
    parser.add_argument("--split", type=int, default=1, choices=[1, 2, 3], help="UCF101 and HMDB51 only")
    parser.add_argument(
        "--missing",
        default="drop",
        choices=["drop", "keep"],
        help="videos that are not on the disk are named in missing.txt; drop leaves them out of the lists (training "
        "would replace each by another video), keep lists them where they are expected",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    run_tool(make_lists, get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
