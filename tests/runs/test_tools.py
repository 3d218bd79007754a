"""The tools that prepare a data set: lists, subsets, the check of every video, smaller copies."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.decoding import VideoError, open_video
from datasets.lists import read_list
from datasets.moving_shapes import write_video
from tests.helpers.clips import open_av
from tests.helpers.misbehaving import Unloadable, misbehave
from tests.helpers.runs import assert_names, naming
from tools import check_videos, make_lists, make_subset, resize_videos
from tools.common import in_processes, run_all, write_list
from utils import UsageError

av = pytest.importorskip("av")
ROOT = Path(__file__).resolve().parents[2]
PEOPLE = "massaging person's head"


def error_of(main, *arguments):
    """What a tool that refuses its arguments prints; it must neither succeed nor show a traceback."""
    with pytest.raises(SystemExit) as refusal:
        main([str(argument) for argument in arguments])
    assert isinstance(refusal.value.code, str) and refusal.value.code.startswith("error: ")
    return refusal.value.code


def lists_of(data_set, annotations, videos, output, *more):
    """Runs make_lists and returns {split: [(path, label)]} as training reads them, and the class names."""
    flags = ["--data_set", data_set, "--annotations", annotations, "--videos", videos, "--output", output, *more]
    make_lists.main([str(flag) for flag in flags])
    splits = {name: Path(output, f"{name}.csv") for name in ("train", "val", "test_unlabelled")}
    lists = {name: list(zip(*read_list(path), strict=True)) for name, path in splits.items() if path.exists()}
    return lists, Path(output, "classes.txt").read_text().splitlines()


def write_files(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def touch(folder, *names):
    return write_files(folder, dict.fromkeys(names, ""))


# ----------------------------------------------------------------------------------------- lists: official files


@pytest.mark.parametrize("split, train, val", [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_ucf101(shared_data, tmp_path, split, train, val):
    annotations = shared_data / "annotations/ucf101"
    lists, classes = lists_of("UCF101", annotations, tmp_path, tmp_path / "out", "--split", split, "--missing", "keep")
    assert {name: len(listed) for name, listed in lists.items()} == {"train": train, "val": val}
    assert not {path for path, _ in lists["train"]} & {path for path, _ in lists["val"]}
    assert classes == [line.split()[1] for line in (annotations / "classInd.txt").read_text().splitlines()]
    for name, stem in (("train", "trainlist0"), ("val", "testlist0")):
        lines = (annotations / f"{stem}{split}.txt").read_text().split("\n")
        expected = [line.split()[0] for line in lines if line.strip()]
        assert [path for path, _ in lists[name]] == [f"{tmp_path}/{line}" for line in expected]
        assert [classes[label] for _, label in lists[name]] == [line.split("/")[0] for line in expected]


def test_hmdb51(shared_data, tmp_path):
    annotations = shared_data / "annotations/hmdb51"
    lists, classes = lists_of("HMDB51", annotations, tmp_path, tmp_path / "out", "--missing", "keep")
    assert {name: len(listed) for name, listed in lists.items()} == {"train": 3570, "val": 1530}
    assert len(classes) == 51 and classes == sorted(classes)
    use = {}  # of every video, read in another way than the tool's
    for path in annotations.iterdir():
        group = path.name.split("_test_split")[0]
        use |= {f"{tmp_path}/{group}/{line[:-3]}": line[-2] for line in path.read_text().splitlines()}
    assert Counter(use.values()) == {"1": 3570, "2": 1530, "0": 1666}
    for name, digit in (("train", "1"), ("val", "2")):
        assert {path for path, _ in lists[name]} == {path for path in use if use[path] == digit}
        assert all(classes[label] == path.split("/")[-2] for path, label in lists[name])
    assert sum(Path(path).name.startswith("#") for path, _ in lists["train"]) > 3  # would be comments


def test_ssv2_excerpt(shared_data, tmp_path, capsys):
    annotations = shared_data / "annotations/ssv2"
    lists, classes = lists_of("SSV2", annotations, tmp_path, tmp_path / "out", "--missing", "keep")
    assert list(lists) == ["val"] and len(lists["val"]) == 500 and len(set(classes)) == 174
    assert_names(capsys.readouterr().out, annotations, "train.csv")
    rows = json.loads((annotations / "validation_first500.json").read_text())
    for (path, label), row in zip(lists["val"], rows, strict=True):
        assert path == f"{tmp_path}/{row['id']}.webm"
        assert classes[label] == row["template"].translate({ord("["): None, ord("]"): None})


def test_kinetics400_excerpt(shared_data, tmp_path):
    annotations = shared_data / "annotations/kinetics400"
    lists, classes = lists_of("Kinetics-400", annotations, tmp_path, tmp_path / "out", "--missing", "keep")
    assert list(lists) == ["val"] and len(lists["val"]) == 499
    assert len(classes) == 400 and (classes[0], classes[-1]) == ("abseiling", "zumba")
    with open(annotations / "validate_first500.csv") as file:
        rows = list(csv.reader(file))[1:]
    for (path, label), (group, video, start, end, _) in zip(lists["val"], rows, strict=True):
        assert path == f"{tmp_path}/{group}/{video}_{int(start):06}_{int(end):06}.mp4" and classes[label] == group


def test_lists_of_a_part_of_ucf101(shared_data, tmp_path):
    """The 3 classes on the disk, as .mp4, become the lists that came with them, under UCF101's labels."""
    videos = shared_data / "ucf101_3class"
    lists, classes = lists_of("UCF101", shared_data / "annotations/ucf101", videos, tmp_path)
    for name, count in (("train", 290), ("val", 104)):
        expected, labels = read_list(videos / f"{name}.csv")
        assert sorted(path for path, _ in lists[name]) == sorted(expected) and len(expected) == count
        pairs = dict(lists[name])
        names = {(label, classes[pairs[path]]) for path, label in zip(expected, labels, strict=True)}
        assert names == {(0, "BabyCrawling"), (1, "Punch"), (2, "PushUps")}


# ------------------------------------------------------------------------------------------- lists: small examples


@pytest.fixture
def hmdb(tmp_path):
    return write_files(
        tmp_path / "annotations",
        {
            "run_test_split2.txt": "#1 of 2 (a), [b].avi 1 \nx y.avi 2 \nunused.avi 0 \n",
            "kick_test_split2.txt": "same.avi 1 \n same_2.avi 2\n\n",
            "kick_ball_test_split2.txt": "same.avi 2 \nother.avi 1\n",
            "kick_test_split1.txt": "old.avi 1\n",
        },
    )


def test_difficult_names_survive(hmdb, tmp_path):
    """Names with #, spaces, commas and brackets, next to the lists, where paths are relative."""
    out = touch(tmp_path / "out", "#1 of 2 (a), [b].avi", "x y.avi", "kick/same.mp4", "kick/same_2.mkv", "other.avi")
    touch(out, "kick_ball/same.avi")
    lists, classes = lists_of("HMDB51", hmdb, out, out, "--split", 2)
    assert classes == ["kick", "kick_ball", "run"]
    assert [(os.path.relpath(path, out), label) for path, label in lists["train"] + lists["val"]] == [
        ("kick/same.mp4", 0), ("other.avi", 1), ("#1 of 2 (a), [b].avi", 2),
        ("kick/same_2.mkv", 0), ("kick_ball/same.avi", 1), ("x y.avi", 2),
    ]  # fmt: skip
    os.rename(out, tmp_path / "moved")
    assert all(os.path.exists(path) for path in read_list(tmp_path / "moved/train.csv")[0])
    lists, _ = lists_of("HMDB51", hmdb, tmp_path / "moved", tmp_path / "else", "--split", 2)
    assert len(lists["train"]) == 3 and all(os.path.exists(path) for path, _ in lists["train"] + lists["val"])


def test_missing_videos(hmdb, tmp_path, capsys):
    videos = touch(tmp_path / "videos", "kick_ball/same.avi", "kick_ball/other.avi", "run/x y.avi")
    lists, _ = lists_of("HMDB51", hmdb, videos, tmp_path / "out", "--split", 2)
    # kick/same.avi is missing although kick_ball has a file of that name
    assert lists["train"] == [(f"{videos}/kick_ball/other.avi", 1)]
    assert lists["val"] == [(f"{videos}/kick_ball/same.avi", 1), (f"{videos}/run/x y.avi", 2)]
    missing = ["train.csv kick/same.avi", "train.csv run/#1 of 2 (a), [b].avi", "val.csv kick/same_2.avi"]
    assert (tmp_path / "out/missing.txt").read_text().splitlines() == missing
    printed = capsys.readouterr().out
    assert_names(printed, "2 of 3", "train.csv", videos, "kick/same.avi, run/#1 of 2 (a), [b].avi")
    lists, _ = lists_of("HMDB51", hmdb, videos, tmp_path / "out", "--split", 2, "--missing", "keep")
    assert [path for path, _ in lists["train"]] == [
        f"{videos}/{name}" for name in ("kick/same.avi", "kick_ball/other.avi", "run/#1 of 2 (a), [b].avi")
    ]
    touch(videos, "kick/same.avi", "kick/same_2.avi", "run/#1 of 2 (a), [b].avi")
    lists_of("HMDB51", hmdb, videos, tmp_path / "out", "--split", 2)
    assert not (tmp_path / "out/missing.txt").exists()


def test_no_video_is_there(hmdb, tmp_path):
    touch(tmp_path / "videos", "run/elsewhere.avi")
    flags = ("--data_set", "HMDB51", "--annotations", hmdb, "--videos", tmp_path / "videos", "--output", tmp_path / "o")
    message = error_of(make_lists.main, *flags)
    assert_names(message, f"--videos {tmp_path / 'videos'}", 1, "kick/old.avi")
    assert not (tmp_path / "o").exists()


def test_two_files_for_one_video(hmdb, tmp_path):
    videos = touch(tmp_path / "videos", "a/kick/same.avi", "b/kick/same.avi", "b/kick/same.mp4")
    flags = ("--data_set", "HMDB51", "--annotations", hmdb, "--videos", videos, "--output", tmp_path / "out")
    message = error_of(make_lists.main, *flags, "--split", 2)
    assert_names(message, videos / "a/kick/same.avi", videos / "b/kick/same.avi")
    (videos / "a/kick/same.avi").unlink()  # the annotations' extension comes first
    lists, _ = lists_of("HMDB51", hmdb, videos, tmp_path / "out", "--split", 2)
    assert lists["train"] == [(f"{videos}/b/kick/same.avi", 0)]


SSV2 = {
    "something-something-v2-labels.json": {"Closing something": "1", "Burying something in something": "0"},
    "something-something-v2-train.json": [
        {"id": "7", "label": "closing a, box", "template": "Closing [something]", "placeholders": ["a box"]},
        {"id": 12, "template": "Burying [something] in [something]"},
    ],
    "something-something-v2-validation.json": [{"id": "70", "template": "Closing [something]"}],
    "something-something-v2-test.json": [{"id": "8"}],
}


def test_ssv2_names(tmp_path):
    annotations = write_files(tmp_path / "annotations", SSV2)
    videos = touch(tmp_path / "videos", "7.webm", "12.mp4", "70.webm", "20bn/8.webm", "17.webm", "7.txt")
    lists, classes = lists_of("SSV2", annotations, videos, tmp_path / "out")
    assert classes == ["Burying something in something", "Closing something"]
    assert lists["train"] == [(f"{videos}/7.webm", 1), (f"{videos}/12.mp4", 0)]
    assert lists["val"] == [(f"{videos}/70.webm", 1)] and lists["test_unlabelled"] == [(f"{videos}/20bn/8.webm", -1)]


HEADER = "label,youtube_id,time_start,time_end,split\n"
KINETICS = {
    "train.csv": f'{HEADER}"{PEOPLE}",-a_1,3,13,train\nair drumming,bb,1000,1010,train\nzumba,cc,0,10,train\n',
    "val.csv": f"{HEADER}zumba,dd,7,17,val\n",
    "test.csv": "youtube_id,time_start,time_end,split\nee,1,11,test\n",
}


def test_kinetics400_names(tmp_path, capsys):
    annotations = write_files(tmp_path / "annotations", KINETICS)
    names = [f"train/{PEOPLE}/-a_1_000003_000013.mp4", "train/air_drumming/bb_001000_001010.mkv", "val/dd.mp4"]
    videos = touch(tmp_path / "videos", *names, "zumba/aa.mp4", "air_drumming/cc.mp4", "ee_000001_000011.mp4")
    lists, classes = lists_of("Kinetics-400", annotations, videos, tmp_path / "out")
    assert classes == ["air drumming", PEOPLE, "zumba"]
    assert lists["train"] == [(f"{videos}/{names[0]}", 1), (f"{videos}/{names[1]}", 0)]
    assert lists["val"] == [(f"{videos}/{names[2]}", 2)]
    assert lists["test_unlabelled"] == [(f"{videos}/ee_000001_000011.mp4", -1)]
    printed = capsys.readouterr().out
    assert_names(printed, 3, "Kinetics-400", 400)
    assert "zumba/cc_000000_000010.mp4" in printed
    write_files(annotations, {"label_map_k400.txt": f"zumba\n{PEOPLE}\nair drumming\n"})
    lists, classes = lists_of("Kinetics-400", annotations, videos, tmp_path / "out")
    assert classes == ["zumba", PEOPLE, "air drumming"] and [label for _, label in lists["train"]] == [1, 2]


def test_kinetics600_has_the_order_of_its_label_map(tmp_path):
    """VideoMAE V2's maps are not in alphabetical order, and have other names for some classes."""
    rows = "label,youtube_id,time_start,time_end,split\nzumba,aa,7,17,train\nballoon blowing,bb,0,10,train\n"
    files = {"train.csv": rows, "label_map_k600.txt": "zumba\ninflating balloons",
             "k710_identical_label_merge.json": {"balloon blowing": "inflating balloons", "hugging": "x"}}  # fmt: skip
    videos = touch(tmp_path / "videos", "zumba/aa_000007_000017.mp4", "bb.mp4")
    lists, classes = lists_of("Kinetics-600", write_files(tmp_path / "a", files), videos, tmp_path / "out")
    assert classes == ["zumba", "inflating balloons"]
    assert lists["train"] == [(f"{videos}/zumba/aa_000007_000017.mp4", 0), (f"{videos}/bb.mp4", 1)]


DIVING = {
    "Diving48_vocab.json": [["Back", "15som", "05Twis", "FREE"], ["Reverse", "Dive", "NoTwis", "TUCK"]],
    "Diving48_V2_train.json": [{"vid_name": "x_00001", "label": 1, "start_frame": 0, "end_frame": 101}],
    "Diving48_V2_test.json": [{"vid_name": "y_00000", "label": 0, "start_frame": 0, "end_frame": 77}],
}


def test_diving48(tmp_path, capsys):
    videos = touch(tmp_path / "rgb", "x_00001.mp4", "y_00000.mp4")
    lists, classes = lists_of("Diving48", write_files(tmp_path / "a", DIVING), videos, tmp_path / "out")
    assert classes == ["Back 15som 05Twis FREE", "Reverse Dive NoTwis TUCK"]
    assert lists == {"train": [(f"{videos}/x_00001.mp4", 1)], "val": [(f"{videos}/y_00000.mp4", 0)]}
    assert_names(capsys.readouterr().out, 2, "Diving48", 48)


SEGMENT = "narration_id,participant_id,video_id,start_timestamp,stop_timestamp"
EPIC = {
    "EPIC_100_verb_classes.csv": "id,key,instances,category\n0,take,\"['get', 'take']\",y\n1,knead,['knead'],x\n",
    "EPIC_100_noun_classes.csv": "id,key,instances,category\n1,board:chopping,['board'],x\n0,tap,['tap'],appliances\n",
    "EPIC_100_train.csv": f"{SEGMENT},narration,verb,verb_class,noun,noun_class,all_nouns\n"
    "P01_01_0,P01,P01_01,00:00:00.14,00:00:03.37,get tap,get,0,tap,0,\"['tap', 'sink']\"\n",
    "EPIC_100_train_missing_timestamp_narrations.csv": "narration_id\n",
    "EPIC_100_validation.csv": f"{SEGMENT},verb_class,noun_class\nP01_11_0,P01,P01_11,00:00:00.00,00:00:01.89,1,1\n",
    "EPIC_100_test_timestamps.csv": f"{SEGMENT}\nP01_101_0,P01,P01_101,00:00:02.86,00:00:03.87\n",
}


@pytest.mark.parametrize("part, names", [("verb", ["take", "knead"]), ("noun", ["tap", "board:chopping"])])
def test_epic_kitchens(tmp_path, part, names):
    """One file for each narration."""
    videos = touch(tmp_path / "clips", "P01/P01_01_0.mp4", "P01_11_0.MP4", "P01_101_0.mp4", "P01_01.mp4")
    lists, classes = lists_of(f"EPIC-100-{part}", write_files(tmp_path / "a", EPIC), videos, tmp_path / "out")
    assert classes == names
    assert lists == {
        "train": [(f"{videos}/P01/P01_01_0.mp4", 0)],
        "val": [(f"{videos}/P01_11_0.MP4", 1)],
        "test_unlabelled": [(f"{videos}/P01_101_0.mp4", -1)],
    }


def test_a_list_without_any_video_is_not_written(tmp_path, capsys):
    annotations = write_files(tmp_path / "annotations", KINETICS)
    lists, _ = lists_of("Kinetics-400", annotations, touch(tmp_path / "videos", "dd.mp4"), tmp_path / "out")
    assert list(lists) == ["val"]
    assert re.search(r"(?m)^warning: \D*train\.csv", capsys.readouterr().out)


UCF = {
    "classInd.txt": "1 A\n2 B\n",
    "trainlist01.txt": "A/v_A_g01.avi 1\r\n\r\nB/v_B_g01.avi 2\r\n",
    "testlist01.txt": "A/v_A_g02.avi\r\n",
}


@pytest.mark.parametrize(
    "data_set, files, words",
    [
        ("UCF101", UCF | {"trainlist01.txt": "\nA/v.avi 1\nv_B.avi 2\n"}, ["trainlist01.txt, line 3", "'v_B.avi 2'"]),
        ("UCF101", UCF | {"trainlist01.txt": "A/v.avi 2\n"}, ["trainlist01.txt, line 1", "id 2", "A", "id 1"]),
        ("UCF101", UCF | {"testlist01.txt": "A/v.avi\nC/v.avi\n"}, ["testlist01.txt, line 2", "'C'"]),
        ("UCF101", UCF | {"classInd.txt": "1 A\nB\n"}, ["classInd.txt, line 2", "'B'"]),
        ("UCF101", UCF | {"classInd.txt": "0 A\n1 B\n"}, ["classInd.txt", "1", "2"]),
        ("UCF101", UCF | {"testlist01.txt": "B/v_B_g01.avi\n"}, ["--annotations", "B/v_B_g01.avi"]),
        ("UCF101", {"trainlist01.txt": "A/v.avi 1\n"}, ["--annotations", "classInd*.txt"]),
        ("UCF101", {"classInd.txt": "1 A\n"}, ["--annotations", "train", "UCF101"]),
        ("UCF101", UCF | {"classInd_2.txt": "", "classInd_1.txt": "", "classInd.txt": "x"}, ["classInd.txt, line 1"]),
        ("HMDB51", {"run_test_split1.txt": "a.avi 1\nb.avi 3\n"}, ["run_test_split1.txt, line 2", "'b.avi 3'"]),
        ("HMDB51", {"run_test_split3.txt": "a.avi 1\n"}, ["CLASS_test_split1.txt"]),
        ("SSV2", SSV2 | {"train.json": []}, ["--annotations", "train.json", "something-something-v2-train.json"]),
        ("SSV2", {"labels.json": {"A": "0"}, "train.json": '[\n{"id": 1},\n'}, ["train.json, line 3", "JSON"]),
        ("SSV2", {"labels.json": {"A": "0"}, "train.json": [{"id": "1"}]}, ["train.json, entry 1", "template"]),
        ("SSV2", {"labels.json": {"A": "0"}, "train.json": [{"id": "1", "template": "[B]"}]},
         ["train.json, entry 1", "'B'"]),
        ("SSV2", {"labels.json": {"A": "1"}, "train.json": []}, ["labels.json", "0"]),
        ("SSV2", {"labels.json": ["A"]}, ["labels.json", "dict"]),
        ("Kinetics-400", {"train.csv": "a b 1\n"}, ["train.csv, line 1", "label, time_end, time_start, youtube_id"]),
        ("Kinetics-400", {"val.csv": f"{HEADER}a,b,1,11,val\na,b,x,11,val\n"}, ["val.csv, line 3", "'x'"]),
        ("Kinetics-400", {"val.csv": f"{HEADER}a,b,1,11,val\na,b\n"}, ["val.csv, line 3", "seconds"]),
        ("Kinetics-400", {"val.csv": f"{HEADER},b,1,11,val\n"}, ["val.csv, line 2", "''"]),
        ("Kinetics-400", KINETICS | {"label_map.txt": "zumba\n"}, ["train.csv, line 2", PEOPLE]),
        ("Diving48", DIVING | {"Diving48_V2_test.json": [{"vid_name": "y", "label": 2}]},
         ["Diving48_V2_test.json, entry 1", "'2'", 2]),
        ("Diving48", DIVING | {"Diving48_V2_test.json": [{"label": 1}]},
         ["Diving48_V2_test.json, entry 1", "vid_name"]),
        ("Diving48", {"Diving48_V2_train.json": []}, ["--annotations", "Diving48_vocab*.json"]),
        ("EPIC-100-verb", EPIC | {"EPIC_100_verb_classes.csv": "id,key\n1,take\n"}, ["EPIC_100_verb_classes.csv", 0]),
        ("EPIC-100-noun", EPIC | {"EPIC_100_train.csv": "narration_id,verb_class\nP,1\n"},
         ["EPIC_100_train.csv, line 1", "noun_class"]),
        ("EPIC-100-verb", EPIC | {"EPIC_100_train.csv": "narration_id,verb_class\nP,2\n"},
         ["EPIC_100_train.csv, line 2", "'2'", 2]),
    ],
)  # fmt: skip
def test_annotation_errors_name_file_and_line(tmp_path, data_set, files, words):
    annotations = write_files(tmp_path / "annotations", files)
    flags = ("--data_set", data_set, "--annotations", annotations, "--videos", tmp_path, "--output", tmp_path / "out")
    assert_names(error_of(make_lists.main, *flags, "--missing", "keep"), *words)
    assert not (tmp_path / "out").exists()


def test_make_lists_needs_folders_of_text(tmp_path):
    flags = ["--data_set", "UCF101", "--output", tmp_path / "out"]
    nowhere = tmp_path / "nowhere"
    message = error_of(make_lists.main, *flags, "--annotations", nowhere, "--videos", tmp_path)
    assert_names(message, f"--annotations {nowhere}")
    message = error_of(make_lists.main, *flags, "--annotations", tmp_path, "--videos", nowhere)
    assert_names(message, f"--videos {nowhere}")
    (tmp_path / "classInd.txt").write_bytes(b"\xff\xfe\x80")
    message = error_of(make_lists.main, *flags, "--annotations", tmp_path, "--videos", tmp_path)
    assert_names(message, tmp_path / "classInd.txt", "text")


@pytest.mark.parametrize("name", ["line\nbreak.mp4", "carriage\rreturn.mp4", "\udcff.mp4"])
def test_a_name_that_no_list_can_hold_is_refused(tmp_path, name):
    (tmp_path / "list.csv").write_text("old.mp4 1\n")
    with pytest.raises(UsageError, match=naming(tmp_path / "list.csv", repr(f"/videos/{name}"))):
        write_list(tmp_path / "list.csv", ["/videos/a.mp4", f"/videos/{name}"], [0, 1])
    assert [path.name for path in tmp_path.iterdir()] == ["list.csv"]
    assert (tmp_path / "list.csv").read_text() == "old.mp4 1\n"


# --------------------------------------------------------------------------------------------------------- subsets


@pytest.fixture
def long_tail(tmp_path):
    """A list of 1000 videos in 12 classes of 1 to 400, in no order."""
    sizes = [400, 200, 120, 90, 60, 50, 30, 24, 15, 8, 2, 1]
    lines = [f"videos/{label}_{number:03}.mp4 {label}\n" for label, size in enumerate(sizes) for number in range(size)]
    order = np.random.default_rng(0).permutation(len(lines))
    (tmp_path / "train.csv").write_text("".join(lines[i] for i in order))
    return tmp_path / "train.csv", sizes


def subset_of(listing, output, *flags):
    make_subset.main(["--list", str(listing), "--output", str(output), *(str(flag) for flag in flags)])
    return list(zip(*read_list(output), strict=True))


@pytest.mark.parametrize("flags, total", [((), 150), (("--fraction", 0.5), 500), (("--count", 333), 333)])
def test_subset_keeps_the_class_distribution(long_tail, tmp_path, flags, total):
    listing, sizes = long_tail
    subset = subset_of(listing, tmp_path / "elsewhere/small.csv", *flags)
    assert len(subset) == len(set(subset)) == total and set(subset) <= set(zip(*read_list(listing), strict=True))
    counts = Counter(label for _, label in subset)
    for label, size in enumerate(sizes):
        assert 1 <= counts[label] <= size and abs(counts[label] - total * size / 1000) < 1, label


def test_largest_remainders():
    assert make_subset.allocate({0: 46, 1: 25, 2: 29}, 10) == {0: 5, 1: 2, 2: 3}  # 4.6, 2.5, 2.9
    assert make_subset.allocate({0: 97, 1: 1, 2: 1, 3: 1}, 10) == {0: 7, 1: 1, 2: 1, 3: 1}
    assert make_subset.allocate({0: 97, 1: 1, 2: 1, 3: 1}, 3) == {0: 3, 1: 0, 2: 0, 3: 0}
    assert make_subset.allocate({0: 3, 1: 2}, 5) == {0: 3, 1: 2}
    rng = np.random.default_rng(0)
    for _ in range(300):
        sizes = dict(enumerate(rng.integers(1, 40, rng.integers(1, 12)).tolist()))
        total = int(rng.integers(1, sum(sizes.values()) + 1))
        shares = make_subset.allocate(sizes, total)
        assert sum(shares.values()) == total
        assert all(total >= len(sizes) <= share or share >= 0 for share in shares.values())
        assert all(int(total >= len(sizes)) <= shares[label] <= size for label, size in sizes.items())


def test_subset_depends_on_the_seed_alone(long_tail, tmp_path):
    listing, _ = long_tail
    subset = subset_of(listing, tmp_path / "a.csv")
    lines = listing.read_text().splitlines(keepends=True)
    (tmp_path / "reversed.csv").write_text("".join(lines[::-1]))
    assert subset_of(tmp_path / "reversed.csv", tmp_path / "b.csv") == subset
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
    other = subset_of(listing, tmp_path / "c.csv", "--seed", 1)
    assert len(set(other) & set(subset)) < 60  # 0.15 ** 2 * 1000 = 23 by chance, and the rare classes
    larger = subset_of(listing, tmp_path / "d.csv", "--fraction", 0.4)
    assert set(subset) <= set(larger)


def test_every_video_is_as_likely(tmp_path):
    paths, labels = [f"/{i}" for i in range(30)], [i % 2 for i in range(30)]
    counts = Counter(path for seed in range(600) for path in make_subset.draw(paths, labels, 10, seed)[0])
    expected = 600 * 10 / 30
    chi_square = sum((counts[path] - expected) ** 2 / (expected * (1 - 1 / 3)) for path in paths)
    assert chi_square < 28 + 5 * (2 * 28) ** 0.5


def test_subset_of_the_real_train_list_as_large_as_val(shared_data, tmp_path, capsys):
    data = shared_data / "ucf101_3class"
    subset = subset_of(data / "train.csv", tmp_path / "small.csv", "--count_like", data / "val.csv")
    assert len(subset) == 104 and all(os.path.exists(path) for path, _ in subset)
    assert Counter(label for _, label in subset) == {0: 35, 1: 43, 2: 26}  # of 97, 121, 72
    assert_names(capsys.readouterr().out, "small.csv", 104, 3, 26, 43)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--fraction", 0), ["--fraction 0"]),
        (("--fraction", 1.2), ["--fraction 1.2"]),
        (("--fraction", "nan"), ["--fraction nan"]),
        (("--fraction", 1e-4), ["--fraction 0.0001", "0"]),
        (("--count", 0), ["--count 0"]),
        (("--count", 1001), ["--count 1001", "1000"]),
        (("--count_like", "nowhere.csv"), ["nowhere.csv"]),
    ],
)
def test_subset_refuses_what_makes_no_sense(long_tail, tmp_path, flags, words):
    message = error_of(make_subset.main, "--list", long_tail[0], "--output", tmp_path / "out.csv", *flags)
    assert_names(message, *words)
    assert not (tmp_path / "out.csv").exists()


def test_subset_does_not_replace_its_list(long_tail):
    before = long_tail[0].read_text()
    message = error_of(make_subset.main, "--list", long_tail[0], "--output", long_tail[0])
    assert_names(message, f"--output {long_tail[0]}")
    assert long_tail[0].read_text() == before


# ------------------------------------------------------------------------------------------------------- processes


def test_crash_and_hang_cost_one_item_each(capsys):
    names = ["good1", "crash", "good2", "hang", "odd", "bad", "good3", "good4"]
    start = time.monotonic()
    outcomes = dict(zip(names, run_all(misbehave, [(f"/{name}.mp4",) for name in names], 2, 2), strict=True))
    assert time.monotonic() - start < 120  # not for ever; processes start slowly on a busy machine
    assert {name for name, (result, reason) in outcomes.items() if reason is None} == {
        "good1", "good2", "good3", "good4",
    }  # fmt: skip
    assert_names(outcomes["crash"][1], "SIGSEGV")
    assert_names(outcomes["hang"][1], "2 s")
    assert outcomes["odd"][1] == "ValueError: odd" and outcomes["bad"][1] == "no frames"
    processes = {int(result["decoder"]) for result, reason in outcomes.values() if reason is None}
    for process in processes | {os.getpid()}:
        if process != os.getpid():
            with pytest.raises(ProcessLookupError):  # none is left
                os.kill(process, 0)
    printed = capsys.readouterr().out
    assert_names(printed, "bad: /crash.mp4", "SIGSEGV")
    assert "[8/8]" in printed and "bad 4" in printed


def test_workers_end_when_their_consumer_stops():
    results = in_processes(misbehave, [("/good.mp4",), ("/hang.mp4",), ("/hang.mp4",)], 1, 100)
    _, result, _ = next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 5
    with pytest.raises(ProcessLookupError):
        os.kill(int(result["decoder"]), 0)


def test_workers_that_do_not_start_are_an_error():
    with pytest.raises(UsageError, match="start"):
        list(in_processes(Unloadable(), [("a",)] * 5, 1, 1))
    with pytest.raises(UsageError, match="--num_workers"):
        run_all(misbehave, [("a",)], 0, 1)


# ----------------------------------------------------------------------------------------------------- check_videos


def moving(frames, height, width, seed=0, grey=False):
    """Waves that drift to the right, uint8 [frames, height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x, t = np.ogrid[:height, :width, :frames]
    waves = [np.sin(rng.uniform(-7, 7) * y / height + 9 * (x - 2 * t) / width + rng.uniform(0, 7)) for _ in range(3)]
    waves = waves[:1] * 3 if grey else waves
    return (128 + 80 * np.stack(waves, axis=-1)).astype(np.uint8).transpose(2, 0, 1, 3)


def write_clip(path, clip, codec="libx264", pix_fmt="yuv420p", times=None, tags=None, **options):
    """Encodes uint8 [T, H, W, 3] at 25 frames a second, or at the given times in milliseconds; tags: colour tags. The
    index of an .mp4 is at its head."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        context = stream.codec_context
        context.thread_count = 1
        context.time_base = Fraction(1, 1000) if times else Fraction(1, 25)
        for name, value in (tags or {}).items():
            setattr(context, name, value)
        for index, image in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = times[index] if times else index, context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def check(output, *lists, workers=2, check=check_videos.check_video, **flags):
    """Runs check_videos; returns its exit status, the lines of the first report and the paths of the clean list."""
    args = dict(list=[str(path) for path in lists], output=str(output), num_workers=workers, decoder="auto", timeout=60)
    status = check_videos.check_lists(Namespace(**args | flags), check)
    name = Path(lists[0]).stem
    with open(output / f"{name}.report.csv") as file:
        report = list(csv.DictReader(file))
    clean = output / f"{name}.clean.csv"
    return status, report, list(zip(*read_list(clean), strict=True)) if clean.exists() else []


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Good clips and what may be found in their place."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(3):
        write_clip(folder / f"good {seed}.mp4", moving(20 + seed, 32, 64, seed))
    write_video(folder / "narrow.mp4", moving(6, 48, 48))  # decord cannot copy frames 48 pixels wide
    whole = (folder / "good 0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:200])
    (folder / "text.mp4").write_text("<html>404</html>")
    touch(folder, "empty.mp4")
    names = ["good 0", "missing", "good 1", "empty", "cut", "text", "narrow", "good 2"]
    (folder / "all.csv").write_text("".join(f"{name}.mp4 {label}\n" for label, name in enumerate(names)))
    (folder / "good.csv").write_text("good 0.mp4 5\ngood 1.mp4 6\ngood 0.mp4 7\n")
    return folder


def test_check_names_the_bad_and_lists_the_good(clips, tmp_path, capsys):
    status, report, clean = check(tmp_path, clips / "all.csv", clips / "good.csv")
    assert status == 1
    assert clean == [(f"{clips}/{name}.mp4", label) for label, name in enumerate(
        ["good 0", None, "good 1", None, None, None, "narrow", "good 2"]) if name]  # fmt: skip
    assert [row["path"] for row in report] == read_list(clips / "all.csv")[0]
    assert [row["label"] for row in report] == [str(label) for label in range(8)]
    assert [row["status"] for row in report] == ["ok", "bad", "ok", "bad", "bad", "bad", "ok", "ok"]
    good = [tuple(row[c] for c in ("frames", "decoded", "width", "height")) for row in report if row["status"] == "ok"]
    assert good == [
        (n, n, w, h) for n, w, h in [("20", "64", "32"), ("21", "64", "32"), ("6", "48", "48"), ("22", "64", "32")]
    ]
    assert all(report[i]["reason"] and report[i]["frames"] == "" for i in (1, 3, 4, 5))
    printed = capsys.readouterr().out
    assert "[8/8]" in printed and "bad 4" in printed  # a video of two lists is decoded once
    assert f"bad: {clips}/text.mp4: " in printed and "5 of 8" not in printed
    assert_names(printed, "4 of 8", "good")
    assert read_list(tmp_path / "good.clean.csv")[1] == [5, 6, 7]


def test_check_of_good_lists_succeeds(clips, tmp_path):
    status, report, clean = check(tmp_path, clips / "good.csv", decoder="pyav")
    assert status == 0 and clean == list(zip(*read_list(clips / "good.csv"), strict=True))
    assert {row["decoder"] for row in report} == {"pyav"}


def test_check_survives_crash_and_hang(tmp_path):
    (tmp_path / "l.csv").write_text("crash.mp4 0\ngood.mp4 1\nhang.mp4 2\n")
    status, report, clean = check(tmp_path, tmp_path / "l.csv", workers=1, check=misbehave, timeout=1)
    assert status == 1 and clean == [(f"{tmp_path}/good.mp4", 1)]
    assert "SIGSEGV" in report[0]["reason"] and "1 s" in report[2]["reason"]
    (tmp_path / "l.csv").write_text("crash.mp4 0\n")
    assert check(tmp_path, tmp_path / "l.csv", check=misbehave)[2] == []  # and no clean list of the earlier check


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_damage_anywhere_is_found(tmp_path, decoder):
    """The index at the head of the file still claims every frame."""
    if decoder == "decord":
        pytest.importorskip("decord")
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 64, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "whole.mp4", noise, g="10", bf="0")
    assert check_videos.check_video(str(path), decoder)["decoded"] == 60
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    found = check_videos.check_video(str(path), decoder)
    assert 56 < found["frames"] == found["decoded"] < 60 and found["errors"] > 0


def test_second_decoder_is_said_why(tmp_path, monkeypatch):
    pytest.importorskip("decord")
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 64, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "a.mp4", noise, g="10", bf="0")
    monkeypatch.setattr(av, "open", lambda *_, **__: 1 / 0)
    found = check_videos.check_video(str(path), "auto")
    assert_names(found["reason"], f"av {av.__version__}", "ZeroDivisionError")
    assert found["decoder"] == "decord" and found["decoded"] == 60


def test_what_the_header_claims_beyond_the_end_is_said(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 64, 3), dtype=np.uint8)
    path = write_clip(tmp_path / "a.mp4", noise, g="10", bf="0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    found = check_videos.check_video(str(path), "auto")
    assert 40 < found["frames"] == found["decoded"] < 50
    assert re.search(rf"\b({60 - found['decoded']}|{59 - found['decoded']})\b", found["reason"])


def test_header_that_claims_a_frame_too_many_is_reported(shared_data):
    for path in sorted((shared_data / "clips/hmdb51").glob("*.avi")):
        found = check_videos.check_video(str(path), "auto")
        assert found["decoder"] == "pyav" and found["frames"] == found["decoded"]
        with open_av(path) as container:
            assert found["decoded"] == sum(1 for _ in container.decode(video=0))
    for path in [*(shared_data / "clips/ssv2").glob("*.webm"), *(shared_data / "clips/ucf101").glob("*.avi")]:
        found = check_videos.check_video(str(path), "auto")
        assert found["frames"] == found["decoded"] > 50


def test_check_errors(clips, tmp_path):
    (tmp_path / "all.csv").write_text("a.mp4 0\n")
    lists = ("--list", clips / "all.csv", tmp_path / "all.csv")
    assert_names(error_of(check_videos.main, *lists, "--output", tmp_path / "out"), "name", "all, all")
    message = error_of(check_videos.main, "--list", tmp_path / "none.csv", "--output", tmp_path / "out")
    assert_names(message, tmp_path / "none.csv")
    flags = ("--list", clips / "good.csv", "--output", clips / "text.mp4")
    assert "text.mp4" in error_of(check_videos.main, *flags)


# ---------------------------------------------------------------------------------------------------- resize_videos


def resize(source, target, short_side=64, gop=8, crf=10):
    resize_videos.resize_video(str(source), str(target), short_side, gop, crf)
    return target


def raw_packets(path):
    with open_av(path) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        return [(p.pts and p.pts * p.time_base, p.is_keyframe) for p in container.demux(video=0) if p.size]


def packets_of(path):
    """(time in seconds, whether a key frame) of the packets in file order, which is decoding order."""
    return [(float(time), key) for time, key in raw_packets(path)]


def frames_of(path, decoder="pyav"):
    with open_video(str(path), decoder) as video:
        return video.read(range(len(video))).numpy()


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def smaller(clip, height, width):
    """An independent resize with antialiasing."""
    pixels = torch.from_numpy(clip.copy()).permute(0, 3, 1, 2).float()
    pixels = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "size, short_side, expected",
    [
        ((240, 320), 256, (240, 320)), ((720, 1280), 256, (256, 456)), ((1280, 720), 256, (456, 256)),
        ((240, 427), 256, (240, 426)), ((241, 321), 240, (240, 320)), ((1080, 1920), 256, (256, 456)),
        ((256, 256), 256, (256, 256)), ((257, 257), 256, (256, 256)), ((360, 480), 256, (256, 342)),
        ((5, 3), 16, (4, 2)),
    ],
)  # fmt: skip
def test_output_size(size, short_side, expected):
    assert resize_videos.output_size(*size, short_side) == expected


@pytest.mark.parametrize(
    "name, codec, height, width, expected",
    [
        ("a.mp4", "libx264", 96, 160, (64, 106)),
        ("a.avi", "mpeg4", 131, 97, (86, 64)),
        ("a.mkv", "libx264", 50, 70, (50, 70)),
    ],
)
def test_resized_video(tmp_path, name, codec, height, width, expected):
    clip = moving(37, height, width, grey=True)  # colours are coded at half size, and coarser to compare
    options = dict(crf="8", bf="2", g="5") if codec == "libx264" else dict(b="20M", bf="2", g="5")
    source = write_clip(tmp_path / name, clip, codec, **options)
    original = frames_of(source)[:37]  # AVI may claim one more
    target = resize(source, tmp_path / "out/a.mp4")
    result = frames_of(target)
    assert result.shape == (37, *expected, 3)
    packets = packets_of(target)
    times = [at for at, _ in packets]
    assert times == sorted(times)  # decoding order is showing order: no B-frames
    np.testing.assert_allclose(times, np.arange(37) / 25, atol=1e-4)
    assert [index for index, (_, key) in enumerate(packets) if key] == [0, 8, 16, 24, 32]  # and not the source's
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 25, 37)
        assert {frame.pict_type for frame in container.decode(stream)} <= {1, 2}  # I and P
    reference = smaller(original, *expected)
    assert psnr(result, reference) > 43
    still = [psnr(result[i], reference[i]) - psnr(result[i], reference[i + 1]) for i in range(36)]
    assert min(still) > 10  # each frame is itself and not its neighbour
    assert sorted(os.listdir(tmp_path / "out")) == ["a.mp4"]


def test_every_decoder_reads_the_result_alike(tmp_path):
    pytest.importorskip("decord")
    target = resize(write_clip(tmp_path / "a.mp4", moving(30, 96, 160), bf="3"), tmp_path / "b.mp4")
    frames = frames_of(target)
    for indices in ([29], [7, 8, 23], [15, 3]):
        with open_video(str(target), "decord") as video:
            assert np.abs(video.read(indices).numpy().astype(int) - frames[indices]).max() <= 2


@pytest.mark.parametrize(
    "pix_fmt, tags",
    [
        ("yuvj420p", dict(color_range=2)),
        ("yuv420p", dict(color_range=1, colorspace=1, color_primaries=1, color_trc=1)),  # BT.709, as HD video has
        ("yuv444p", {}),
    ],
)
def test_colours_are_kept(tmp_path, pix_fmt, tags):
    source = write_clip(tmp_path / "a.mp4", moving(6, 80, 120), pix_fmt=pix_fmt, tags=tags, crf="8")
    original, result = frames_of(source), frames_of(resize(source, tmp_path / "b.mp4"))
    assert psnr(result, smaller(original, 64, 96)) > 34
    assert np.abs(result.mean((0, 1, 2)) - original.mean((0, 1, 2))).max() < 2
    with av.open(str(source)) as old, av.open(str(tmp_path / "b.mp4")) as new:
        old, new = (container.streams.video[0].codec_context for container in (old, new))
        assert (new.color_range, new.colorspace) == (old.color_range, old.colorspace)


def test_uneven_times_are_kept(tmp_path):
    times = [0, 40, 80, 240, 241, 300, 1000, 1040]
    source = write_clip(tmp_path / "a.mkv", moving(8, 64, 64), times=times)
    np.testing.assert_allclose([at for at, _ in packets_of(resize(source, tmp_path / "b.mp4"))], np.array(times) / 1000)


def test_stream_without_times_and_change_of_size(tmp_path):
    """A bare H.264 stream says neither when its frames are shown nor that they stay the same size."""
    source = write_clip(tmp_path / "a.h264", moving(12, 64, 64), bf="0")
    assert {time for time, _ in raw_packets(source)} == {None}
    times = [at for at, _ in packets_of(resize(source, tmp_path / "a.mp4"))]
    np.testing.assert_allclose(times, np.arange(12) / 25, atol=1e-4)
    source.write_bytes(source.read_bytes() + write_clip(tmp_path / "b.h264", moving(12, 80, 96), bf="0").read_bytes())
    with pytest.raises(VideoError, match=naming("a.h264", "size")):
        resize(source, tmp_path / "b.mp4")
    with pytest.raises(VideoError, match=naming("a.h264", "size")):
        check_videos.check_video(str(source), "pyav")


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_phone_video_is_turned_upright(tmp_path, quarters):
    data = bytearray(write_clip(tmp_path / "a.mp4", moving(5, 72, 104, grey=True), crf="8").read_bytes())
    matrix = data.find(b"tkhd") + 44  # ISO 14496-12: 9 numbers of 4 bytes, a rotation by quarter turns
    cosine, sine = {1: (0, 1), 2: (-1, 0), 3: (0, -1)}[quarters]
    numbers = [cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30]
    data[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    (tmp_path / "turned.mp4").write_bytes(data)
    original = frames_of(tmp_path / "a.mp4")
    upright = np.rot90(original, -quarters, axes=(1, 2))
    target = resize(tmp_path / "turned.mp4", tmp_path / "b.mp4")
    size = (64, 92) if quarters == 2 else (92, 64)
    assert psnr(frames_of(target), smaller(upright, *size)) > 43
    with av.open(str(target)) as container:
        assert {frame.rotation for frame in container.decode(video=0)} == {0}


def test_real_clips_are_resized(shared_data, tmp_path):
    """One of each data set, among them AVI with B-frames, whose decoded frames have wrong times."""
    for source in [next((shared_data / "clips" / name).glob("[!L]*")) for name in ("hmdb51", "ucf101", "ssv2")]:
        with open_av(source) as container:
            rate = float(container.streams.video[0].average_rate)
            original = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        target = resize(source, tmp_path / f"{source.stem}.mp4", short_side=112, crf=18)
        result = frames_of(target)
        assert len(result) == len(original) and min(result.shape[1:3]) == 112
        assert psnr(result[::7], smaller(original[::7], *result.shape[1:3])) > 32, source
        steps = np.diff([at for at, _ in packets_of(target)])
        np.testing.assert_allclose(steps, 1 / rate, atol=1.1e-3)  # webm counts milliseconds


def run_resize(*arguments):
    """The exit status of resize_videos: 0 or 1."""
    try:
        resize_videos.main([str(argument) for argument in arguments])
    except SystemExit as end:
        assert end.code == 1, end.code
        return 1
    return 0


def test_list_is_resized_once(clips, tmp_path, capsys):
    """Labels and folders are kept, bad videos named, and what is finished is left as it is."""
    videos = tmp_path / "videos"
    for name in ("class a/good 0.mp4", "class b/good 0.mp4", "class b/text.mp4", "class b/#1.avi"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes((clips / name.split("/")[1].replace("#1.avi", "good 1.mp4")).read_bytes())
    (tmp_path / "train.csv").write_text("videos/class a/good 0.mp4 3\nvideos/class b/text.mp4 4\n")
    (tmp_path / "val.csv").write_text(f"videos/class b/#1.avi 5\n{videos}/class b/good 0.mp4 6\n")
    small = tmp_path / "small"
    flags = ("--list", tmp_path / "train.csv", tmp_path / "val.csv", "--output", small, "--short_side", 16)
    assert run_resize(*flags, "--num_workers", 2) == 1
    assert list(zip(*read_list(small / "train.csv"), strict=True)) == [(f"{small}/class a/good 0.mp4", 3)]
    expected = [(f"{small}/class b/#1.mp4", 5), (f"{small}/class b/good 0.mp4", 6)]
    assert list(zip(*read_list(small / "val.csv"), strict=True)) == expected
    assert frames_of(expected[0][0]).shape == (21, 16, 32, 3)
    (line,) = (small / "failed.txt").read_text().splitlines()
    assert line.startswith(f"{videos}/class b/text.mp4: ")
    assert f"bad: {videos}/class b/text.mp4" in capsys.readouterr().out
    files = {path: path.stat().st_mtime_ns for path in small.rglob("*.mp4")}
    assert len(files) == 3 and not list(small.rglob("*.tmp"))

    (videos / "class b/text.mp4").write_bytes((clips / "good 2.mp4").read_bytes())
    assert run_resize(*flags, "--num_workers", 1) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert not (small / "failed.txt").exists()
    assert_names(capsys.readouterr().out, 4, 3, "already")
    assert read_list(small / "train.csv")[1] == [3, 4] and (small / "class b/text.mp4").exists()
    assert_names(error_of(resize_videos.main, *flags, "--crf", 30), f"--output {small}", small / "settings.json")


def test_folder_is_resized(clips, tmp_path):
    """Its own output, in a folder below, is not resized again."""
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/b/x.mp4", "y.MP4"):
        (tmp_path / name).write_bytes((clips / "good 0.mp4").read_bytes())
    flags = ("--videos", tmp_path, "--output", tmp_path / "small", "--num_workers", 1)
    assert run_resize(*flags) == run_resize(*flags) == 0
    made = sorted(str(path.relative_to(tmp_path / "small")) for path in (tmp_path / "small").rglob("*.mp4"))
    assert made == ["a/b/x.mp4", "y.mp4"]


def test_resize_errors(clips, tmp_path):
    for name in ("x.avi", "x.mp4"):
        (tmp_path / name).write_bytes((clips / "good 0.mp4").read_bytes())
    (tmp_path / "l.csv").write_text("x.avi 0\n")
    out = ("--output", tmp_path / "out")
    for flags, words in [
        (("--videos", tmp_path, *out), [tmp_path / "x.avi", tmp_path / "x.mp4", tmp_path / "out/x.mp4"]),
        (("--videos", tmp_path / "none", *out), [f"--videos {tmp_path / 'none'}"]),
        ((*out,), ["--list", "--videos"]),
        (("--list", tmp_path / "l.csv", *out, "--videos", tmp_path / "out2"), [f"--videos {tmp_path / 'out2'}"]),
        (("--list", clips / "good.csv", "--videos", tmp_path, *out), [clips, f"--videos {tmp_path}"]),
        (("--list", tmp_path / "l.csv", clips / "l.csv", *out), [clips / "l.csv"]),
        (("--list", tmp_path / "l.csv", *out, "--short_side", 15), ["--short_side", "even"]),
        (("--list", clips / "good.csv", "--output", clips), [clips, "--output"]),
    ]:
        assert_names(error_of(resize_videos.main, *flags), *words)
        assert not (tmp_path / "out").exists()


def test_damaged_video_is_resized_as_far_as_it_decodes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 64, 3), dtype=np.uint8)
    source = write_clip(tmp_path / "a.mp4", noise, g="10", bf="0")
    data = source.read_bytes()
    half = len(data) // 2
    for damaged in (data[:half], data[:half] + bytes(2000) + data[half + 2000 :]):
        source.write_bytes(damaged)
        length = check_videos.check_video(str(source), "pyav")["decoded"]
        assert 56 < length < 60 if len(damaged) == len(data) else length in (29, 30)
        assert len(frames_of(resize(source, tmp_path / "b.mp4"))) == length


def test_frames_that_no_player_shows_are_left_out(tmp_path):
    """A cut without re-encoding keeps the frames since the last key frame and marks them as not shown."""
    source = write_clip(tmp_path / "a.mp4", moving(30, 64, 64), bf="0")
    with av.open(str(source)) as old, av.open(str(tmp_path / "b.mp4"), "w", options={"avoid_negative_ts": "0"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts -= round(0.4 / packet.time_base)
                packet.dts = packet.pts
                packet.stream = stream
                new.mux(packet)
    result = frames_of(resize(tmp_path / "b.mp4", tmp_path / "c.mp4"))
    assert len(result) == 20 and psnr(result, frames_of(source)[10:]) > 34


def test_a_killed_run_leaves_no_half_video(tmp_path):
    """Neither the tool nor its workers go on; the next run finishes the work and removes what was left."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 240, 320, 3), dtype=np.uint8)
    write_clip(tmp_path / "videos.mkv", np.concatenate([noise] * 30), "mjpeg", "yuvj420p")
    (tmp_path / "l.csv").write_text("videos.mkv 1\n")
    flags = ["--list", tmp_path / "l.csv", "--output", tmp_path / "out", "--num_workers", "1", "--crf", "1"]
    tool = subprocess.Popen([sys.executable, ROOT / "tools/resize_videos.py", *flags], stdout=subprocess.DEVNULL)
    half = tmp_path / "out/videos.mp4.tmp"
    for _ in range(600):
        if half.exists() and half.stat().st_size > 1e6:
            break
        time.sleep(0.05)
    tool.kill()
    tool.wait()
    time.sleep(0.3)
    size = half.stat().st_size
    time.sleep(0.7)
    assert half.stat().st_size == size and not (tmp_path / "out/videos.mp4").exists()
    (tmp_path / "videos.mkv").write_bytes(
        write_clip(tmp_path / "short.mkv", noise[:3], "mjpeg", "yuvj420p").read_bytes()
    )
    assert run_resize(*flags) == 0 and len(frames_of(tmp_path / "out/videos.mp4")) == 3
    assert not half.exists()


def test_worker_that_dies_leaves_no_half_video(clips, tmp_path):
    """A time-out kills the worker in the middle of a file."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 480, 640, 3), dtype=np.uint8)
    write_clip(tmp_path / "long.mkv", np.concatenate([noise] * 60), "mjpeg", "yuvj420p")  # well over 10 s to encode
    (tmp_path / "l.csv").write_text(f"long.mkv 1\n{clips}/good 0.mp4 0\n")
    flags = ("--list", tmp_path / "l.csv", "--output", tmp_path / "out", "--num_workers", 1, "--timeout", 2)
    flags += ("--crf", 1, "--short_side", 480)
    assert run_resize(*flags) == 1
    assert_names((tmp_path / "out/failed.txt").read_text(), "long.mkv", "2 s")
    assert [path.name for path in (tmp_path / "out").rglob("*.mp4*")] == ["good 0.mp4"]


# --------------------------------------------------------------------------------------------------------- scripts


def test_tools_run_as_scripts_from_anywhere(tmp_path):
    code = "import runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_path({!r}, run_name='__main__')\n"
    code = "".join(
        code.format(str(ROOT / f"tools/{name}.py")) + "except SystemExit as end: assert end.code == 0\n"
        for name in ("make_lists", "make_subset", "check_videos", "resize_videos")
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("usage:") == 4 and "default: None" not in shown.stdout


def test_check_as_a_script(clips, tmp_path):
    """Its workers find the function in the script's own module; status 1 is a bad video, and no traceback."""
    command = [sys.executable, ROOT / "tools/check_videos.py", "--list", clips / "all.csv", "--output", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    assert len(read_list(tmp_path / "out/all.clean.csv")[0]) == 4
