"""Lists of videos: reading them, and what a line looks like."""

import csv
import math
import os
import re

FORMATS = "write `path label` or `path num_frames label` on each line, label an integer (-1 = none)"
# Of --task: what a line looks like where it has no single label.
SEVERAL = {
    "multi_label": "write `path labels` on each line, the labels of a video joined by commas, as in `a.mp4 3,7` "
    "(-1 = none of the classes)",
    "regression": "write `path values` on each line, the values of a video joined by commas, as in `a.mp4 0.5,1.25`",
}
Label = int | tuple[int, ...] | tuple[float, ...]
MAX_LABEL = 999_999_999


class ListError(ValueError):
    """A video list cannot be used; the message names the file, the line, and what to do."""


def split_line(line: str) -> tuple[str, str] | None:
    """A stripped line of a list: (path, label as text), or None if it does not end with a whole number.

    `path label` or `path num_frames label`, columns separated by spaces or a comma. A path in quotes may contain both,
    as pandas and csv write it. Other lines are split from the right, because paths may contain spaces; one regular
    expression would need minutes for a line of 20,000 spaces.
    """
    if line.startswith('"'):
        quoted = _split_quoted(line)
        if quoted is not None:
            return quoted
    last = _cut_number(line)
    if last is None:
        return None
    path, label = last
    frames = _cut_number(path)
    if frames is not None:  # VideoMAE's column of frame counts, which is not used
        path = frames[0]
    if path.endswith(","):  # an empty column
        return None
    return path, label


def _split_quoted(line: str) -> tuple[str, str] | None:
    """As split_line, for a line `"path" label`, also with tabs or semicolons; None for other lines."""
    path = re.match('"((?:[^"]|"")*+)"([ ,;\t])', line)
    if not path or not path[1]:
        return None
    (numbers,) = csv.reader([line[path.end() :]], delimiter=path[2])
    numbers = [number.strip() for number in numbers if number.strip() or path[2] != " "]
    if not 1 <= len(numbers) <= 2 or not all(re.fullmatch("-?[0-9]+", number) for number in numbers):
        return None
    return path[1].replace('""', '"'), numbers[-1]


def _problem(line: str, first: bool) -> str:
    """What is wrong with a line that split_line does not accept. first: no video comes before it."""
    last = line.replace(",", " ").split()[-1:]
    if re.search(r",\s*(,|$)", line):
        return "an empty column"
    if not last or last == [line.strip(" ,")]:
        return "no label"
    label = last[0].strip('"')
    if first and label.lower() in ("label", "labels", "class", "class_id", "target"):
        return "a header in place of a video (pandas: header=False)"
    if re.fullmatch(r"-?[0-9]+\.0*", label):
        return f"label {excerpt(label)} is not an integer (pandas writes a column with gaps so: .astype(int))"
    return f"label {excerpt(label)} is not an integer"


def _cut_number(text: str) -> tuple[str, str] | None:
    """Splits off a whole number at the end: (text before the separator, number), or None if there is none."""
    head = text.rstrip("-0123456789")
    number = text[len(head) :]
    before = head.rstrip()
    if before.endswith(","):
        before = before[:-1].rstrip()
    elif before == head:
        return None
    if not before or not re.fullmatch("-?[0-9]+", number):
        return None
    return before, number


def excerpt(text: str) -> str:
    """A text of any length and content for a message of one line."""
    return repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-60:]}")


def _parse_line(line: str, place: str, first: bool, num_classes: int | None) -> tuple[str, int]:
    """(path, label) of a stripped line. place: file and line for messages. Raises: ListError."""
    if "\0" in line:
        raise ListError(f"{place}: a zero byte in {excerpt(line)}: not a text file, or damaged; {FORMATS}")
    columns = split_line(line)
    if columns is None:
        raise ListError(f"{place}: {_problem(line, first)} in {excerpt(line)}; {FORMATS}")
    path, label = columns
    if len(label) > 10 or not -1 <= int(label) <= MAX_LABEL:  # int() refuses thousands of digits
        raise ListError(f"{place}: label {excerpt(label)} is not in -1 to {MAX_LABEL}; {FORMATS}")
    if num_classes is not None and not 0 <= int(label) < num_classes:
        raise ListError(
            f"{place}: label {label} in {excerpt(line)} is not one of the {num_classes} classes, 0 to "
            f"{num_classes - 1}: correct the list or --nb_classes"
        )
    return path, int(label)


def _parse_several(line: str, place: str, task: str, count: int) -> tuple[str, Label]:
    """(path, labels) of a stripped line of SEVERAL. Raises: ListError."""
    form = SEVERAL[task]
    path, _, last = line.replace("\t", " ").rpartition(" ")
    path = path.rstrip().removesuffix(",")
    if not path or "\0" in line:
        raise ListError(f"{place}: no space between path and labels in {excerpt(line)}; {form}")
    if quoted := re.fullmatch('"((?:[^"]|"")+)"(?: +[0-9]+)?', path):
        path = quoted[1].replace('""', '"')
    elif frames := _cut_number(path):  # a column of frame counts, as in lists of single labels
        path = frames[0]
    values = last.split(",")
    if task == "regression":
        try:
            numbers = tuple(map(float, values))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            raise ListError(f"{place}: {excerpt(last)} in {excerpt(line)} is not a number, or several; {form}")
        if len(numbers) != count:
            raise ListError(f"{place}: {len(numbers)} value(s) in {excerpt(line)}, --nb_classes is {count}; {form}")
        return path, numbers
    if values == ["-1"]:
        return path, ()
    for value in values:
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) >= count:
            raise ListError(
                f"{place}: label {excerpt(value)} in {excerpt(line)} is not one of the {count} classes, 0 to "
                f"{count - 1}: correct the list or --nb_classes; {form}"
            )
    return path, tuple(map(int, values))


def read_list(
    list_path: str | os.PathLike, num_classes: int | None = None, task: str = "single_label"
) -> tuple[list[str], list[Label]]:
    """Reads a list of videos: one per line, `path label` or `path num_frames label`, separated by spaces or a comma.

    Lines that are blank or start with # are skipped; relative paths start at the list's folder. With num_classes every
    label must be one of 0 .. num_classes - 1. The other tasks of runtime/tasks.py need num_classes; their labels are
    tuples: the classes of a video, perhaps none; or its num_classes values (see SEVERAL).
    Returns: paths (absolute) and labels (-1 means no label, as in VideoMAE V2's lists).
    Raises: ListError.
    """
    form = SEVERAL.get(task, FORMATS)
    if os.path.isdir(list_path):
        raise ListError(f"{list_path} is a folder: give a list file; {form}")
    if not os.path.isfile(list_path):  # reading a pipe or a device would wait without end
        kind = "not a regular file" if os.path.exists(list_path) else "no such list of videos"
        raise ListError(f"{list_path}: {kind}; {form}")
    folder = os.path.dirname(os.path.abspath(list_path))
    paths, labels = [], []
    try:
        with open(list_path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                place = f"{list_path}, line {number}"
                if task in SEVERAL:
                    path, label = _parse_several(line, place, task, num_classes)
                else:
                    path, label = _parse_line(line, place, first=not paths, num_classes=num_classes)
                paths.append(os.path.join(folder, path))
                labels.append(label)
    except UnicodeDecodeError as error:
        raise ListError(f"{list_path} is not a text file ({error.reason}): give a list of videos; {form}") from error
    except OSError as error:  # no permission, a lost mount
        raise ListError(f"{list_path} cannot be read ({error.strerror}); {form}") from error
    if not paths:
        raise ListError(f"{list_path} names no video; {form}")
    return paths, labels
