"""Lists of videos: reading them, and what a line looks like."""

import csv
import os
import re

FORMATS = "write `path label` or `path num_frames label` on each line, label an integer (-1 = none)"
MAX_LABEL = 999_999_999


class ListError(ValueError):
    """A video list cannot be used; the message names the file, the line, and what to do."""


def split_line(line):
    """A stripped line of a list: (path, label as text), or None where it does not end with a whole number.

    `path label`, `path num_frames label`, columns split by spaces or a comma. A path in quotes may hold both, as pandas
    and csv write it. Else the line is taken apart from the right because paths may hold spaces, and not by one regular
    expression: that needs minutes for a line of 20,000 spaces.
    """
    quoted = _split_quoted(line) if line.startswith('"') else None
    if quoted:
        return quoted
    last = _cut_number(line)
    if last is None:
        return None
    before, label = last
    frames = _cut_number(before)
    path = frames[0] if frames else before
    return None if path.endswith(",") else (path, label)  # an empty column


def _split_quoted(line):
    """Of a line `"path" label` with other separators too; None where it is no such line."""
    path = re.match('"((?:[^"]|"")*+)"([ ,;\t])', line)
    if not path or not path[1]:
        return None
    (numbers,) = csv.reader([line[path.end() :]], delimiter=path[2])
    numbers = [number.strip() for number in numbers if number.strip() or path[2] != " "]
    if not 1 <= len(numbers) <= 2 or not all(re.fullmatch("-?[0-9]+", number) for number in numbers):
        return None
    return path[1].replace('""', '"'), numbers[-1]


def _problem(line, first):
    """What is wrong with a line that split_line does not take. first: no video stands before it."""
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


def _cut_number(text):
    """(what stands before the separator, the whole number behind it), or None."""
    head = text.rstrip("-0123456789")
    number = text[len(head) :]
    before = head.rstrip()
    if before.endswith(","):
        before = before[:-1].rstrip()
    elif before == head:
        return None
    return (before, number) if before and re.fullmatch("-?[0-9]+", number) else None


def excerpt(text):
    """A text of any length and content for a message of one line."""
    return repr(text if len(text) <= 200 else f"{text[:100]} ... {text[-60:]}")


def read_list(list_path, num_classes=None):
    """Reads a list of videos: one a line, `path label` or `path num_frames label`, columns split by spaces or a comma.

    Lines that are blank or start with # are skipped; relative paths are taken from the list's folder. With num_classes
    every label must be one of 0 .. num_classes - 1.
    Returns: paths (list of str, absolute) and labels (list of int; -1 means no label, as in VideoMAE V2's lists).
    Raises: ListError.
    """
    if os.path.isdir(list_path):
        raise ListError(f"{list_path} is a folder: give a list file; {FORMATS}")
    if not os.path.isfile(list_path):  # a pipe or a device would be waited for
        kind = "not a regular file" if os.path.exists(list_path) else "no such list of videos"
        raise ListError(f"{list_path}: {kind}; {FORMATS}")
    folder = os.path.dirname(os.path.abspath(list_path))
    paths, labels = [], []
    try:
        with open(list_path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                line = line.strip()
                if not line or line.startswith("#"):
                    continue
                place = f"{list_path}, line {number}"
                if "\0" in line:
                    raise ListError(f"{place}: a zero byte in {excerpt(line)}: not a text file, or damaged; {FORMATS}")
                columns = split_line(line)
                if columns is None:
                    raise ListError(f"{place}: {_problem(line, first=not paths)} in {excerpt(line)}; {FORMATS}")
                path, label = columns
                if len(label) > 10 or not -1 <= int(label) <= MAX_LABEL:
                    raise ListError(f"{place}: label {excerpt(label)} is not in -1 to {MAX_LABEL}; {FORMATS}")
                if num_classes is not None and not 0 <= int(label) < num_classes:
                    raise ListError(
                        f"{place}: label {label} in {excerpt(line)} is not one of the {num_classes} classes, 0 to "
                        f"{num_classes - 1}: correct the list or --nb_classes"
                    )
                paths.append(os.path.join(folder, path))
                labels.append(int(label))
    except UnicodeDecodeError as error:
        raise ListError(f"{list_path} is not a text file ({error.reason}): give a list of videos; {FORMATS}") from error
    except OSError as error:  # no permission, a lost mount
        raise ListError(f"{list_path} cannot be read ({error.strerror}); {FORMATS}") from error
    if not paths:
        raise ListError(f"{list_path} names no video; {FORMATS}")
    return paths, labels
