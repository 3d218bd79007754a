"""tools/extract_features.py and tools/predict.py against what probes store, the test's scores, transformers, loops."""

import argparse
import json

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import VideoMAEConfig, VideoMAEModel

import run_class_finetuning
import run_mae_pretraining
from datasets.build import build_evaluation_loader
from datasets.decoding import PyAVReader, read_frames
from datasets.lists import read_list
from datasets.moving_shapes import FPS
from datasets.transforms import spatial_crops
from engine_for_finetuning import store_features
from tests.helpers.runs import TINY, assert_names, finetuning_flags, naming
from tools import convert_checkpoint, extract_features, predict
from tools.trained import flags_of_weights, open_trained
from utils import UsageError

HERE = ["--device", "cpu", "--num_workers", "0"]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def pretrained(labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    flags = ["--data_path", labelled / "train.csv", *TINY, "--epochs", 1, "--output_dir", folder]
    run_mae_pretraining.main([str(flag) for flag in flags])
    return folder / "checkpoint-0.pth"


@pytest.fixture(scope="module")
def finetuned(labelled, tmp_path_factory):
    """A run from random weights, whose classes.txt lies beside the lists."""
    folder = tmp_path_factory.mktemp("finetuned")
    run_class_finetuning.main(
        finetuning_flags(labelled, "--epochs", 1, "--num_sample", 1, "--no-test_best", "--mixup", 0, "--cutmix", 0,
                         "--init_scale", 1, "--output_dir", folder)
    )  # fmt: skip
    return folder


def extract(*arguments) -> None:
    extract_features.main([*map(str, arguments), *HERE])


def normalized(clips):
    """uint8 [B, T, 3, S, S] -> float32 [B, 3, T, S, S]."""
    return ((clips.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]).transpose(1, 2)


def listed(folder):
    return read_list(folder / "val.csv")[0]


# --------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_features_are_what_a_probe_stores_bit_for_bit(kind, labelled, pretrained, tmp_path):
    flags = finetuning_flags(labelled, f"--{kind}_probe", "--finetune", pretrained)
    args = run_class_finetuning.parse_args(flags)
    run_class_finetuning.check_flags(args)
    probe, loader = run_class_finetuning.load_finetune(args), build_evaluation_loader(args, "val")
    recipe = run_class_finetuning.build_recipe(args, torch.device("cpu"), {})
    stored = torch.cat([batch["video"] for batch in store_features(probe, loader, recipe, "none", 11)])
    tokens = ["--tokens"] if kind == "attentive" else []
    arguments = ["--list", labelled / "val.csv", "--model_path", pretrained, *tokens, "--batch_size", 4, "--output"]
    extract(*arguments, tmp_path / "f.npz")
    extract(*arguments, tmp_path / "f.safetensors")
    written = np.load(tmp_path / "f.npz")
    assert np.array_equal(written["features"], stored.numpy()) and written["features"].dtype == stored.numpy().dtype
    assert stored.shape == ((11, 96) if kind == "linear" else (11, 32, 96))
    assert written["video"].tolist() == list(range(11)) and written["paths"].tolist() == listed(labelled)
    assert written["label"].tolist() == read_list(labelled / "val.csv")[1]
    # 4 frames, 2 apart, in the middle of 12: from frame 3 to the end of frame 9
    assert set(written["start"]) == {3 / FPS} and set(written["end"]) == {10 / FPS}
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert all(np.array_equal(file.get_tensor(name), written[name]) for name in file.keys())
        assert json.loads(file.metadata()["about"])["paths"] == listed(labelled)


def test_features_of_hugging_faces_weights_are_those_of_transformers(labelled, tmp_path):
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=384, use_mean_pooling=False, layer_norm_eps=1e-6, initializer_range=0.2,
    )  # fmt: skip
    model = VideoMAEModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    extract("--list", labelled / "val.csv", "--model_path", tmp_path / "hf", "--output", tmp_path / "f.npz",
            "--sampling_rate", 2)  # fmt: skip
    clips = []
    for path in listed(labelled):
        frames = read_frames(path, [3, 5, 7, 9]).permute(0, 3, 1, 2)
        clips.append(spatial_crops(frames, 32, 32, 1)[0])
    with torch.no_grad():
        expected = model(normalized(torch.stack(clips)).transpose(1, 2)).last_hidden_state.mean(1)
    np.testing.assert_allclose(np.load(tmp_path / "f.npz")["features"], expected, rtol=1e-3, atol=1e-4)


def test_windows_are_those_of_a_loop_and_each_video_is_decoded_once(labelled, finetuned, tmp_path, monkeypatch):
    """A fine-tuned model's features are normed after the mean. 12 frames; windows of 6 frames, 5 apart: 0-6, 5-11, and
    10-12, whose missing frames are the last one."""
    decodes, plain = [], PyAVReader.plain
    monkeypatch.setattr(PyAVReader, "plain", lambda reader: decodes.append(reader.path) or plain(reader))
    monkeypatch.setattr(PyAVReader, "fetch", None)
    videos = listed(labelled)[:3]
    extract(*videos, "--model_path", finetuned, "--output", tmp_path / "w.npz", "--window", 6, "--stride", 5,
            "--batch_size", 2)  # fmt: skip
    assert decodes == videos
    monkeypatch.undo()
    written = np.load(tmp_path / "w.npz")
    assert written["video"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert written["start"].tolist() == [0, 5 / FPS, 10 / FPS] * 3
    assert written["end"].tolist() == [6 / FPS, 11 / FPS, 12 / FPS] * 3
    model = run_class_finetuning.build_classifier(classifier_args(finetuned), None).eval()
    model.load_state_dict(torch.load(finetuned / "checkpoint-0.pth", weights_only=True)["model"])
    for row, (video, begin) in enumerate((video, begin) for video in videos for begin in (0, 5, 10)):
        places = [min(begin + i, 11) for i in (0, 1, 3, 4)]  # 6 frames cut into 4
        clip = spatial_crops(read_frames(video, places).permute(0, 3, 1, 2), 32, 32, 1)
        with torch.no_grad():
            expected = model.forward_features(normalized(clip))[0]
        np.testing.assert_allclose(written["features"][row], expected, rtol=1e-4, atol=1e-5)


def classifier_args(folder) -> argparse.Namespace:
    args = run_class_finetuning.parse_args(["--eval", "--finetune", str(folder), "--device", "cpu"])
    run_class_finetuning.check_flags(args)
    return args


@pytest.mark.parametrize("mode", [["--batch_size", 2], ["--window", 4, "--stride", 2, "--batch_size", 3]])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_run_that_was_killed_continues_to_the_same_file(mode, suffix, labelled, pretrained, tmp_path, monkeypatch):
    arguments = ["--list", labelled / "val.csv", "--model_path", pretrained, *mode, "--output"]
    extract(*arguments, tmp_path / f"whole.{suffix}")
    saved, save_part = [], extract_features.save_part

    def dying(path, *rest):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path.name)
        save_part(path, *rest)

    monkeypatch.setattr(extract_features, "save_part", dying)
    with pytest.raises(SystemExit, match="interrupted"):
        extract(*arguments, tmp_path / f"killed.{suffix}")
    monkeypatch.setattr(
        extract_features, "save_part", lambda path, *rest: saved.append(path.name) or save_part(path, *rest)
    )
    extract(*arguments, tmp_path / f"killed.{suffix}")
    assert len(saved) == len(set(saved)) == (11 if "--window" in mode else 6)  # none was computed twice
    assert (tmp_path / f"killed.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert not list(tmp_path.glob("*.parts"))


def test_an_unreadable_video_is_named_and_the_others_are_written(labelled, pretrained, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("no video")
    good = listed(labelled)[:2]
    arguments = [good[0], tmp_path / "bad.mp4", good[1], "--model_path", pretrained, "--output", tmp_path / "f.npz"]
    for _ in range(2):  # computed, and found finished
        with pytest.raises(SystemExit) as end:
            extract(*arguments)
        assert end.value.code == 1
        error = capsys.readouterr().err
        assert_names(error, tmp_path / "bad.mp4")
        assert error.count(f"{tmp_path / 'bad.mp4'}: ") == 1
        assert_names(error, 1, 3)
    extract(*good, "--model_path", pretrained, "--output", tmp_path / "g.npz")
    found, expected = np.load(tmp_path / "f.npz"), np.load(tmp_path / "g.npz")
    assert found["video"].tolist() == [0, 2] and np.array_equal(found["features"], expected["features"])
    with pytest.raises(SystemExit, match=naming(tmp_path / "bad.mp4")):
        extract(tmp_path / "bad.mp4", "--model_path", pretrained, "--output", tmp_path / "h.npz", "--window", 8)


def test_what_cannot_be_extracted_is_said(labelled, pretrained, tmp_path):
    video = listed(labelled)[0]
    extract(video, "--model_path", pretrained, "--output", tmp_path / "f.npz")
    (tmp_path / "other.npz").write_text("text")
    for arguments, parts in (
        ([video, "--output", "f.txt"], ["--output f.txt", ".npz", ".safetensors"]),
        (["--output", "f.npz"], ["--list"]),
        ([video, "--output", tmp_path / "f.npz", "--window", 8], [tmp_path / "f.npz", "window"]),
        ([video, "--output", tmp_path / "other.npz"], [tmp_path / "other.npz"]),
        ([video, "--output", tmp_path / "g.npz", "--window", 3], ["--window 3", 4]),
        ([video, "--output", tmp_path / "g.npz", "--model_path", "no/such"], ["no/such"]),
    ):
        with pytest.raises(SystemExit, match=naming(*parts)):
            extract("--model_path", pretrained, *arguments)


def test_the_shapes_of_weights_say_which_model_it_is():
    model = run_class_finetuning.build_classifier(
        run_class_finetuning.parse_args(["--model", "vit_small_patch16_224", "--nb_classes", "7", "--num_frames", "2"]),
        None,
    )
    found = flags_of_weights(model.state_dict())
    assert found == dict(model="vit_small_patch16_224", patch_size=16, tubelet_size=2, nb_classes=7, data_set="custom",
                         use_mean_pooling=True)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ predictions


def test_another_size_has_crops_that_fit(finetuned):
    for given, sides in (({}, (32, 32)), ({"input_size": 48}, (48, 48)), ({"input_size": 24}, (32, 24))):
        args, _, _ = open_trained(str(finetuned), argparse.Namespace(**given))
        run_class_finetuning.check_flags(args)
        assert (args.short_side_size, args.input_size) == sides
    args, _, _ = open_trained(str(finetuned), argparse.Namespace(input_size=48, short_side_size=40))
    with pytest.raises(UsageError, match=naming("--short_side_size 40", "--input_size 48")):
        run_class_finetuning.check_flags(args)


def predictions(capsys, *arguments) -> list[dict]:
    predict.main([*map(str, arguments), "--json", *HERE])
    return json.loads(capsys.readouterr().out)


def test_predictions_are_the_tests_scores_by_name(labelled, finetuned, capsys):
    videos = listed(labelled)[:10]  # the list has one video twice
    found = predictions(capsys, *videos, "--model_path", finetuned, "--top_k", 3, "--batch_size", 4)
    scores = np.load(finetuned / "scores.npz")["probability"]
    names = (labelled / "classes.txt").read_text().split()
    assert [entry["video"] for entry in found] == videos
    for entry, row in zip(found, scores, strict=False):
        best = np.argsort(-row, kind="stable")[:3]
        assert [label["label"] for label in entry["labels"]] == best.tolist()
        assert [label["name"] for label in entry["labels"]] == [names[k] for k in best]
        assert [label["score"] for label in entry["labels"]] == row[best].tolist()  # to the last digit
    assert len(np.unique(np.argsort(-scores, axis=1)[:, :3], axis=0)) > 1  # or any order would do


def test_names_of_classes_travel_in_the_checkpoint_and_a_file_replaces_them(labelled, finetuned, tmp_path, capsys):
    state = torch.load(finetuned / "checkpoint-0.pth", weights_only=True)
    assert state["class_names"] == (labelled / "classes.txt").read_text().split()
    # VideoMAE's file: a Namespace, without names
    args = argparse.Namespace(**{n: state["args"][n] for n in ("model", "num_frames", "input_size", "sampling_rate")},
                              data_set="Kinetics-710", num_segments=1)  # fmt: skip
    torch.save({"model": state["model"], "args": args}, tmp_path / "videomae.pth")
    (tmp_path / "names.txt").write_text("".join(f"name {k}\n" for k in range(10)))
    arguments = [listed(labelled)[0], "--top_k", 1, "--model_path"]
    (ours,) = predictions(capsys, *arguments, finetuned)
    (theirs,) = predictions(capsys, *arguments, tmp_path / "videomae.pth", "--test_num_segment", 2)
    number = ours["labels"][0]["label"]
    assert theirs["labels"] == [ours["labels"][0] | {"name": str(number)}]
    named = ["--class_names", tmp_path / "names.txt", "--test_num_segment", 2]
    (renamed,) = predictions(capsys, *arguments, tmp_path / "videomae.pth", *named)
    assert renamed["labels"][0]["name"] == f"name {number}"


def test_an_unreadable_video_is_one_line_and_a_sheet_shows_the_others(labelled, finetuned, tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("no video")
    videos = [listed(labelled)[0], tmp_path / "bad.mp4", tmp_path / "gone.mp4", listed(labelled)[1]]
    arguments = [*map(str, videos), "--model_path", str(finetuned), *HERE]
    with pytest.raises(SystemExit) as end:
        predict.main([*arguments, "--picture", str(tmp_path / "sheet.png"), "--top_k", "2"])
    printed = capsys.readouterr()
    assert end.value.code == 1 and printed.err.count("error: ") == 2
    assert_names(printed.err, tmp_path / "bad.mp4")
    assert_names(printed.err, tmp_path / "gone.mp4")
    lines = printed.out.splitlines()
    assert len(lines) == 6 and (lines[0], lines[3]) == (str(videos[0]), str(videos[3]))
    height, width, _ = matplotlib.image.imread(tmp_path / "sheet.png").shape
    assert width > 2 * height > 400  # two rows of frames beside their labels
    with pytest.raises(SystemExit) as end:
        predict.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and [set(entry) - {"video"} for entry in found] == [
        {"labels"}, {"error"}, {"error"}, {"labels"},
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_predictions_of_other_tasks(task, labelled, tmp_path, capsys):
    torch.manual_seed(0)
    flags = finetuning_flags(labelled, "--task", task, "--nb_classes", 3)
    args = run_class_finetuning.parse_args(flags)
    run_class_finetuning.check_flags(args)
    model = run_class_finetuning.build_classifier(args, None).eval()
    torch.nn.init.normal_(model.head.weight)
    state = {"model": model.state_dict(), "args": vars(args), "class_names": ["x", "y", "z"]}
    torch.save(state, tmp_path / "checkpoint-0.pth")
    video = listed(labelled)[0]
    (found,) = predictions(capsys, video, "--model_path", tmp_path, "--test_num_segment", 1, "--test_num_crop", 1)
    clip = spatial_crops(read_frames(video, [3, 5, 7, 9]).permute(0, 3, 1, 2), 32, 32, 1)
    logits = model(normalized(clip))[0].detach()
    if task == "regression":
        assert [value["name"] for value in found["values"]] == ["x", "y", "z"]
        np.testing.assert_allclose([value["value"] for value in found["values"]], logits, rtol=1e-4, atol=1e-5)
    else:
        best = logits.argsort(descending=True)
        assert [label["name"] for label in found["labels"]] == ["xyz"[k] for k in best]
        np.testing.assert_allclose([label["score"] for label in found["labels"]], logits[best].sigmoid(), rtol=1e-4)
    # as a Hugging Face folder, also where only its own files say what it is
    convert_checkpoint.main(["--input", str(tmp_path / "checkpoint-0.pth"), "--output", str(tmp_path / "hf")])
    problem = json.loads((tmp_path / "hf/config.json").read_text())["problem_type"]
    assert problem == {"multi_label": "multi_label_classification", "regression": "regression"}[task]
    (tmp_path / "hf/args.json").unlink()
    capsys.readouterr()
    folder = ["--model_path", tmp_path / "hf", "--test_num_segment", 1, "--test_num_crop", 1]
    assert predictions(capsys, video, *folder) == [found]


def test_what_cannot_be_predicted_is_said(labelled, pretrained, finetuned, tmp_path):
    video = listed(labelled)[0]
    for arguments, parts in (
        (["--model_path", str(pretrained)], [pretrained, "classifier"]),
        (["--model_path", str(finetuned), "--top_k", "0"], ["--top_k 0"]),
        (["--model_path", str(finetuned), "--class_names", "no.txt"], ["--class_names no.txt"]),
        (["--model_path", "no/such"], ["no/such"]),
    ):
        with pytest.raises(SystemExit, match=naming(*parts)):
            predict.main([video, *arguments, *HERE])
