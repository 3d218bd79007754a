"""The figures that the paper (arXiv 2505.08561) reports, by the flags that reach its settings here: paper_tables.csv.

tube is the paper's VideoMAE, and its trajectory attention (TA) is the Orthoformer, as it says of its practice.
Table 3 is several tables in one. The row (1e-3, 1e-3, 1e-4) of table 6 is printed twice, with two errors.
"""

import ast
import csv
from pathlib import Path
from typing import Any, NamedTuple

METRICS = ("top-1", "top-5", "memory (GB)", "error")
ABOUT = {
    "table1": "fine-tuning after 400 epochs of pre-training on the small-scale set",
    "table2": "transfer, small-scale pre-training",
    "table3": "TATS on UCF101, mask ratio 0.95, memory at 32 clips per GPU",
    "table5": "lowest reconstruction error of TATS by (e, k)",
    "table6": "lowest reconstruction error of TATS on UCF101 by (c_p, c_v, c_e)",
    "table9": "pre-training and fine-tuning on the whole of SSv2",
}
WORDS = {"K400": ("k400", "kinetics"), "SSv2": ("ssv2", "something"), "UCF101": ("ucf101",), "HMDB51": ("hmdb51",)}


class Figures(NamedTuple):
    """A line of the CSV file: accuracies in %, memory in GB, the reconstruction error."""

    table: str
    source: str | None  # the data set of pre-training; only table 2 has one
    data_set: str | None  # of fine-tuning, or of both
    flags: dict[str, Any]
    metrics: dict[str, float]  # those that the paper reports there


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)  # a number or a truth value
    except ValueError:
        return text


def _read() -> list[Figures]:
    with open(Path(__file__).with_suffix(".csv"), newline="", encoding="utf-8") as file:
        return [
            Figures(
                row["table"],
                row["pre-trained on"] or None,
                row["data_set"] or None,
                {name: _value(value) for name, value in (part.split("=") for part in row["flags"].split())},
                {name: float(row[name]) for name in METRICS if row[name]},
            )
            for row in csv.DictReader(file)
        ]


FIGURES = _read()
# The sets of flags that the rows of a table differ in, and the data sets of which one has to be chosen.
BY = {name: tuple(dict.fromkeys(tuple(row.flags) for row in FIGURES if row.table == name)) for name in ABOUT}
DATA_SETS = {
    name: tuple(dict.fromkeys(row.data_set for row in FIGURES if row.table == name)) for name in ("table1", "table5")
}


def data_set_of(path: str) -> str | None:
    """The data set that the last telling part of a path names, or None."""
    for part in reversed(path.lower().split("/")):
        for name, words in WORDS.items():
            if any(word in part for word in words):
                return name
    return None


def reported(table: str, by: tuple[str, ...], data_set: str | None) -> dict[tuple, dict[str, list[float]]]:
    """{(values of the flags by, pre-trained on, fine-tuned on): {"top-1": [figures], ...}}; one figure each, two where
    the paper has two. The data sets are None except in table 2.

    Args: by, one of BY[table]; data_set, one of DATA_SETS[table], without effect for other tables.
    """
    found: dict[tuple, dict[str, list[float]]] = {}
    for row in FIGURES:
        if row.table == table and tuple(row.flags) == by and (table not in DATA_SETS or row.data_set == data_set):
            target = row.data_set if row.source else None
            figures = found.setdefault((tuple(row.flags.values()), row.source, target), {})
            for name, figure in row.metrics.items():
                figures.setdefault(name, []).append(figure)
    return found
