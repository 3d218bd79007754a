import argparse
import errno
import io
import os
import pickle
import re
import zipfile

import pytest
import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint import CheckpointError, checkpoint_files, latest_checkpoint, load_checkpoint, save_checkpoint
from runtime.convert import load_weights, model_weights
from tests.helpers.runs import assert_names, naming

torch.set_num_threads(1)


def make_state(epoch=0):
    return {"model": {"weight": torch.full((50, 50), float(epoch))}, "epoch": epoch}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint-3.pth"


def test_a_saved_state_loads_back(path):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    state = {
        **make_state(7),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "best": 0.5,
        "none": None,
    }
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert loaded.keys() == state.keys() and loaded["epoch"] == 7 and loaded["best"] == 0.5 and loaded["none"] is None
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"]) and torch.equal(loaded["rng"], state["rng"])
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert load_checkpoint(str(path)).keys() == state.keys()
    assert os.listdir(path.parent) == [path.name]


def fill_the_disk(state, file):
    file.write(b"half of a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def unpicklable(state, file, save=torch.save):
    save({**state, "hook": lambda: None}, file)


@pytest.mark.parametrize("fail", [fill_the_disk, unpicklable])
def test_a_failed_save_leaves_the_old_file_whole(path, monkeypatch, fail):
    save_checkpoint(path, make_state(1))
    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises((CheckpointError, AttributeError, pickle.PicklingError)) as failure:
        save_checkpoint(path, make_state(2))
    if fail is fill_the_disk:
        assert_names(failure.value, path, "No space left on device")
    assert load_checkpoint(path)["epoch"] == 1
    assert checkpoint_files(path.parent) == [path]  # what is left of the failed one is not taken for a checkpoint
    monkeypatch.undo()
    save_checkpoint(path, make_state(2))
    assert load_checkpoint(path)["epoch"] == 2


def test_the_new_file_is_on_disk_before_it_replaces_the_old_one(path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda *args: calls.append("fsync") or fsync(*args))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *args: calls.append("replace") or replace(*args))
    save_checkpoint(path, make_state())
    assert calls == ["fsync", "replace", "fsync"]  # the last: of the folder, so that the new name stays too


def test_a_checkpoint_holding_videomaes_arguments_loads(path):
    torch.save({**make_state(), "args": argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.95], data_path="/x")}, path)
    assert load_checkpoint(path)["args"].opt_betas == [0.9, 0.95]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))])
def test_a_malicious_pickle_is_refused_and_not_executed(path, save):
    target = path.parent / "executed"
    save({**make_state(), "hook": Malicious(target)}, path)
    with pytest.raises(CheckpointError, match=naming(path)):
        load_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert target.exists()  # the attack itself works


def truncated(path):
    save_checkpoint(path, make_state())
    path.write_bytes(path.read_bytes()[:-200])


def half(path):
    save_checkpoint(path, make_state())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def legacy_truncated(path):
    torch.save(make_state(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:300])


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no checkpoint")


def numpy_object(path):
    torch.save({"model": io.BytesIO}, path)


DAMAGE = {
    "truncated": truncated,
    "half": half,
    "legacy truncated": legacy_truncated,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "text": lambda path: path.write_text("<html>404 not found</html>\n" * 40),
    "short text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "garbage": lambda path: path.write_bytes(bytes((i * i * 37 + i // 7) % 256 for i in range(5000))),
    "zip": foreign_zip,
    "class": numpy_object,
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_file_is_named(path, damage):
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(str(path)) and len(message) > len(str(path)) + 10 and "\n" not in message
    assert {"folder": "folder"}.get(damage, "") in message and ("damaged" not in message or damage != "missing")


@pytest.mark.parametrize("save_format", [True, False], ids=["zip", "legacy"])
def test_every_truncation_is_an_error_and_not_a_crash(path, save_format):
    torch.save({"model": {"weight": torch.ones(4)}}, path, _use_new_zipfile_serialization=save_format)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], "text"])
def test_a_file_without_a_dictionary_is_refused(path, content):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=type(content).__name__):
        load_checkpoint(path)


def test_the_newest_checkpoint_has_the_largest_number(tmp_path):
    for epoch in (9, 10, 0, 100):
        save_checkpoint(tmp_path / f"checkpoint-{epoch}.pth", make_state(epoch))
    for name in ("checkpoint-best.pth", "checkpoint-200.pth.tmp", "checkpoint-300", "my-checkpoint-400.pth"):
        (tmp_path / name).write_bytes(b"not one of them")
    names = [path.name for path in checkpoint_files(tmp_path)]
    assert names == ["checkpoint-100.pth", "checkpoint-10.pth", "checkpoint-9.pth", "checkpoint-0.pth"]
    path, state = latest_checkpoint(tmp_path)
    assert path.name == "checkpoint-100.pth" and state["epoch"] == 100


def test_an_unreadable_newest_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint-1.pth", make_state(1))
    truncated(tmp_path / "checkpoint-2.pth")
    (tmp_path / "checkpoint-3.pth").mkdir()
    path, state = latest_checkpoint(tmp_path)
    assert path.name == "checkpoint-1.pth" and state["epoch"] == 1
    output = capsys.readouterr()
    assert "checkpoint-2.pth" in output.out + output.err and "checkpoint-3.pth" in output.out + output.err


def test_a_folder_without_a_checkpoint_has_no_latest_and_one_with_damaged_ones_is_refused(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None
    truncated(tmp_path / "checkpoint-2.pth")
    with pytest.raises(CheckpointError, match=naming(tmp_path, "checkpoint-2.pth")):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_weights_are_found_under_the_usual_keys(key, prefix):
    weights = {f"{prefix}fc.weight": torch.ones(2, 3), f"{prefix}fc.bias": torch.zeros(2)}
    state = weights if key is None else {key: weights, "epoch": 3, "optimizer": {"lr": torch.ones(1)}}
    found = model_weights(state, "x.pth")
    assert sorted(found) == ["fc.bias", "fc.weight"] and torch.equal(found["fc.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("state", [{}, {"model": {}}, {"epoch": 3}, {"model": {"fc.weight": [1.0]}}])
def test_a_checkpoint_without_weights_is_refused(state):
    with pytest.raises(CheckpointError, match=naming("x.pth", "weights")):
        model_weights(state, "x.pth")


def make_network():
    return nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.LayerNorm(3), "c": nn.Linear(3, 1)})


def test_weights_that_fit_are_loaded():
    source, target = make_network(), make_network()
    load_weights(target, source.state_dict(), "x.pth")
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_do_not_fit_are_listed_and_not_loaded():
    network, weights = make_network(), make_network().state_dict()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for name in ("b.weight", "b.bias", "c.weight", "c.bias"):
        del weights[name]
    weights["extra.gamma"] = torch.ones(1)
    weights["a.weight"] = torch.ones(5, 2)
    with pytest.raises(CheckpointError) as error:
        load_weights(network, weights, "x.pth")
    message = str(error.value)
    assert message.startswith("x.pth ")
    named = r"\b4 missing\b.*b\.weight, b\.bias, c\.weight, \.\.\..*\b1 unknown\b.*extra\.gamma"
    assert re.search(named, message) and "c.bias" not in message  # three named, the rest counted
    assert_names(message, "a.weight", "(5, 2)", "(3, 2)")
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda weights: weights.pop("c.bias"), ["c.bias"]),
        (lambda weights: weights.update(extra=torch.ones(1)), ["extra"]),
        (lambda weights: weights.update({"c.bias": torch.ones(2)}), ["c.bias", "(2,)", "(1,)"]),
    ],
)
def test_each_kind_of_misfit_alone_is_refused(change, parts):
    weights = make_network().state_dict()
    change(weights)
    with pytest.raises(CheckpointError, match=naming("x.pth", 1, *parts)):
        load_weights(make_network(), weights, "x.pth")


def test_adamaes_sampler_inside_the_encoder_is_left_out():
    weights = {"encoder.norm.weight": torch.ones(2), "encoder.get_token_probs.1.weight": torch.ones(1, 2),
               "encoder.pos_embed_probs": torch.ones(1, 4, 2)}  # fmt: skip
    assert set(model_weights({"model": weights}, "adamae.pth")) == {"encoder.norm.weight"}
