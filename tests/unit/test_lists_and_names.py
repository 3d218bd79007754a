"""Lists as other programs write them, names of every kind, and text of users in pictures."""

import csv
import io
import json
import os
import random
import string
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import run_mae_vis
from datasets.lists import ListError, read_list, split_line
from datasets.moving_shapes import write_video
from engine_for_finetuning import Scores
from runtime import reports
from tests.helpers.runs import assert_names
from tools.common import VIDEO_SUFFIXES, find_videos, replacing, temporary_name, write_list
from utils import picture_text, tolerant_output

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT.parent / "shared" / "cases"
NAMES = ["a b.mp4", "a,b.mp4", 'a "b" c.mp4', '"quoted".mp4', '"', "a 1", "x,2", "a, ", "-", "#not a comment",
         "täst.mp4", "日本 語.mp4", "a;b.mp4", "$$.mp4", " leading.mp4", "tab\there.mp4", '""',
         '" 0', "a,,b", "1.0", "a,"]  # fmt: skip


# --- lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [" ", ",", "\t", ";"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lists_of_pythons_csv_are_read(tmp_path, separator, quoting, ending):
    """What pandas' to_csv writes too. A separator that is ours only in quotes has its paths quoted."""
    names = [name for name in NAMES if separator in name or quoting != csv.QUOTE_MINIMAL]
    names = [name for name in names if name == name.strip() or quoting != csv.QUOTE_MINIMAL]
    path = tmp_path / "list.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=ending)
        writer.writerows([name, 7] for name in names)
        writer.writerows([name, 300, 8] for name in names)
    paths, labels = read_list(path)
    assert paths == [os.path.join(tmp_path, name) for name in names] * 2
    assert labels == [7] * len(names) + [8] * len(names)


def test_the_given_lists_are_read():
    if not CASES.is_dir():
        pytest.skip("../shared/cases is not here")
    for name, other in (("quoted_space.csv", "with space.mp4"), ("quoted_comma.csv", "comma, name.mp4")):
        paths, labels = read_list(CASES / "lists" / name)
        assert labels == [0, 1] and all(os.path.isfile(path) for path in paths)
        assert [os.path.basename(path) for path in paths] == [other, "base.mp4"]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("a b.mp4 3", ("a b.mp4", "3")), ("a b.mp4 10 3", ("a b.mp4", "3")), ("a,b.mp4,3", ("a,b.mp4", "3")),
        ('say "hi".mp4 3', ('say "hi".mp4', "3")), ('"half.mp4 3', ('"half.mp4', "3")),
        ('"a" b.mp4 3', ('"a" b.mp4', "3")),
        ("a.mp4 0 -1", ("a.mp4", "-1")), ("a, 0", ("a", "0")), ('"a ""b"".mp4" 1', ('a "b".mp4', "1")),
        ('"a.mp4"  12   1', ("a.mp4", "1")), ('"a.mp4",,1', None), ('"" 1', ('""', "1")),
    ],
)  # fmt: skip
def test_lines(line, expected):
    assert split_line(line) == expected


@pytest.mark.parametrize(
    "line, words",
    [
        ("a.mp4,0,", "column"), ("a.mp4,,0", "column"), ("a.mp4, 0 ,", "column"), ("a.mp4,", "column"),
        ('"a.mp4",,0', "column"), ("path,label", "header"), ("path label", "header"), ('"path","label"', "header"),
        ("a.mp4 1.0", "astype(int)"), ("a.mp4,3.", "astype(int)"), ("a.mp4 PushUps", "'PushUps'"), ("a.mp4", "'a.mp4'"),
        ("a.mp4 1e3", "'1e3'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, line, words):
    (tmp_path / "l.csv").write_text(line + "\n")
    with pytest.raises(ListError) as error:
        read_list(tmp_path / "l.csv")
    assert_names(error.value, tmp_path / "l.csv", "line 1", words)


def test_every_name_is_written_so_that_it_is_read_back(tmp_path):
    rng = random.Random(0)
    alphabet = string.ascii_letters + string.digits + " ,\"';:#$%-_.()[]{}\\äß語"
    names = NAMES + ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(3000)]
    names = [name for name in names if name == name.rstrip() and name]
    paths = [str(tmp_path / name) for name in names]
    write_list(tmp_path / "list.csv", paths, range(len(paths)))
    assert [os.path.normpath(path) for path in read_list(tmp_path / "list.csv")[0]] == [
        os.path.normpath(p) for p in paths
    ]
    assert read_list(tmp_path / "list.csv")[1] == list(range(len(paths)))


def test_any_bytes_are_a_list_or_a_list_error(tmp_path):
    rng, path = random.Random(0), tmp_path / "l.csv"
    pieces = [
        b'"',
        b'""',
        b",",
        b" ",
        b"\t",
        b"0",
        b"-1",
        b"a.mp4",
        b"\r",
        b"\n",
        b"\xff",
        b"\0",
        b"#",
        b"9" * 12,
        "語".encode(),
    ]
    for _ in range(1500):
        path.write_bytes(b"".join(rng.choices(pieces, k=rng.randint(1, 12))))
        try:
            paths, labels = read_list(path)
            assert len(paths) == len(labels) > 0
        except ListError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "line", ["a" + " " * 20000 + "b", '"' * 20001, '"' + " " * 20000, '"a"' + "," * 20000, "a" + "," * 20000]
)
def test_long_lines_take_no_time(line):
    start = time.perf_counter()
    split_line(line)
    assert time.perf_counter() - start < 5  # quadratic: minutes


# --- files -------------------------------------------------------------------------------------------------------


def test_every_video_is_found_once(tmp_path):
    videos = tmp_path / "videos"
    (videos / "class").mkdir(parents=True)
    for name in ("b.mp4", "class/a.ts", "class/notes.txt", "class/c.M2TS"):
        (videos / name).write_text(name)
    os.link(videos / "b.mp4", videos / "class" / "z hard link.mp4")
    (videos / "a link.mp4").symlink_to(videos / "class" / "a.ts")
    (videos / "nowhere.mp4").symlink_to(tmp_path / "gone.mp4")
    (videos / "round").symlink_to(videos)
    (videos / "class" / "up").symlink_to(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "d.gif").write_text("d")
    (videos / "other").symlink_to(outside)
    (videos / "other too").symlink_to(outside)
    found = [os.path.relpath(path, videos) for path in find_videos(str(videos))]
    assert found == ["b.mp4", "class/a.ts", "class/c.M2TS", "class/up/outside/d.gif"] or found == [
        "b.mp4", "class/a.ts", "class/c.M2TS", "other/d.gif"]  # fmt: skip
    skipped = str(videos / "class")
    assert not [path for path in find_videos(str(videos), skip=skipped) if path.startswith(skipped)]
    assert {".ts", ".mts", ".m2ts", ".vob", ".ogv", ".gif", ".asf"} <= set(VIDEO_SUFFIXES)


@pytest.mark.parametrize("length", [1, 247, 251, 252, 255])
def test_a_file_of_any_name_is_replaced(tmp_path, length):
    path = tmp_path / ("n" * length)
    with replacing(str(path)) as temporary:
        Path(temporary).write_text("new")
        assert temporary == temporary_name(str(path)) and not path.exists()
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_names_that_are_not_utf_8_are_printed(monkeypatch):
    for encoding in ("utf-8", "ascii"):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        tolerant_output()
        for stream in (sys.stdout, sys.stderr):
            print("bad \udcff name 語", file=stream, flush=True)
            assert stream.buffer.getvalue().startswith(b"bad \\udcff name")
    monkeypatch.undo()
    tolerant_output()  # not in the way of a captured stream


# --- names of classes and text in pictures -----------------------------------------------------------------------


def make_scores(num_classes):
    label = torch.arange(num_classes)
    return Scores(torch.eye(num_classes), label, torch.ones(num_classes, dtype=torch.bool), [])


@pytest.mark.parametrize(
    "data, expected, part",
    [
        ("\ufeffa\r\n\r\nb\r\n\n", ["a", "b"], ""), ("$$\n\\frac{\n", ["$$", "\\frac{"], ""),
        ("é\nb\n".encode("latin-1"), ["é", "b"], "latin-1"), ("a\nb\nc\n", ["0", "1"], "3"),
        ("", ["0", "1"], "0"),
        (b"\xff\xfe\0a", ["0", "1"], "latin-1"),
    ],
)  # fmt: skip
def test_names_of_classes(tmp_path, capsys, data, expected, part):
    (tmp_path / "classes.txt").write_bytes(data.encode() if isinstance(data, str) else data)
    assert reports.class_names(tmp_path, 2) == expected
    printed = capsys.readouterr().out
    assert bool(part) == ("classes.txt" in printed)
    if part:
        assert_names(printed, tmp_path / "classes.txt", part)


HOSTILE = ["$$", "$x", "\\frac{1}{0}", "a_b^c", "日本語", "tab\there", "bell\a", "\udcff", "x" * 300, "%s {} \\n"]


def test_a_report_is_written_whatever_the_classes_are_called(tmp_path):
    names = [name.replace("\t", " ") for name in HOSTILE]
    result = reports.write_report(tmp_path, make_scores(10), [f"{n}.mp4" for n in names], names, {"list": "l"})
    assert json.loads((tmp_path / "test.json").read_text())["acc1"] == result["acc1"] == 100
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    text = (tmp_path / "per_class.csv").read_text(encoding="utf-8", errors="surrogateescape")
    assert [row["class"] for row in csv.DictReader(text.splitlines())][:4] == names[:4]


def test_a_picture_that_cannot_be_drawn_loses_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_):
        assert (tmp_path / "test.json").exists()
        raise ValueError("no font")

    monkeypatch.setattr(reports, "draw_confusion", fail)
    reports.write_report(tmp_path, make_scores(3), ["a", "b", "c"], ["a", "b", "c"], {})
    assert_names(capsys.readouterr().out, "confusion.png", "no font")
    assert {"test.json", "per_class.csv", "predictions.csv", "scores.npz"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_drawn_as_it_is(text):
    from matplotlib.figure import Figure

    figure = Figure()
    drawn = figure.suptitle(picture_text(text))
    figure.canvas.draw()
    assert drawn._preprocess_math(drawn.get_text())[1] is False  # no formula
    if "$" in text:
        assert drawn._preprocess_math(drawn.get_text())[0] == text


def test_one_unreadable_video_does_not_stop_the_pictures(tmp_path, capsys):
    from run_mae_pretraining import get_parser
    from run_mae_pretraining import main as pretrain

    clip = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    long = "n" * 240 + "$$.mp4"
    for name in ("good.mp4", long):
        write_video(tmp_path / name, clip)
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "l.csv").write_text("good.mp4 0\ngood.mp4 0\n")
    assert get_parser()
    pretrain(
        f"""--data_path {tmp_path}/l.csv --output_dir {tmp_path}/run --model pretrain_videomae_tiny_patch8_64
        --input_size 32 --num_frames 4 --decoder_depth 1 --batch_size 2 --epochs 1 --num_workers 0
        --device cpu""".split()
    )
    videos = [str(tmp_path / name) for name in ("bad.mp4", long, "good.mp4")]
    with pytest.raises(SystemExit) as stop:
        run_mae_vis.main(
            ["--model_path", f"{tmp_path}/run", "--output_dir", f"{tmp_path}/out", "--gif", "--videos", *videos]
        )
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "bad.mp4" in printed.err and printed.out.count("wrote") == 4
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".gif", ".gif", ".png", ".png"]
