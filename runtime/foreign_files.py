"""Files and folders of weights, whoever wrote them: read without running code, or refused by what they are."""

import argparse
import json
import os
import pickletools
import re
import warnings
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from utils import UsageError


class CheckpointError(UsageError):
    """Names the file and what is wrong with it."""


# --- classes that are read ---------------------------------------------------------------------------------------


class _NotRead(ValueError):
    """Values of a kind that is not read."""


class _NumpyType:
    """Stands in for numpy.dtype: only numbers and text, whose values are plain bytes."""

    def __init__(self, code: str, align=False, copy=True):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)|[US]\d{1,4}", code):
            raise _NotRead(f"numpy values of type {code}")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _NumpyArray(np.ndarray):
    """Stands in for numpy.ndarray: takes its values from bytes alone."""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        values = np.frombuffer(_bytes(data), kind.dtype).reshape(shape, order="F" if fortran else "C")
        super().__setstate__(np.array(values).__reduce__()[2])


def _numpy_array(cls, shape, code) -> _NumpyArray:
    return _NumpyArray(0, np.uint8)  # __setstate__ fills it


def _numpy_scalar(kind: _NumpyType, data):
    """A Python number or text."""
    return np.frombuffer(_bytes(data), kind.dtype, count=1)[0].item()


def _bytes(data) -> bytes:
    if not isinstance(data, bytes):
        raise ValueError(f"numpy values in a {type(data).__name__}")
    return data


def _empty_bytes() -> bytes:
    """How pickle writes b""; a length as its argument could ask for any amount of memory."""
    return b""


def _dictionary(factory=None) -> dict:
    """Stands in for collections.defaultdict: what is missing stays missing."""
    return {}


# Name in a file -> what is built in its place. None of it calls what a file names.
SAFE = [
    argparse.Namespace,
    (_dictionary, "collections.defaultdict"),
    *((kind, f"builtins.{kind.__name__}") for kind in (int, float, list, dict)),  # of a defaultdict
    (_empty_bytes, "builtins.bytes"),
    (str, "torch.torch_version.TorchVersion"),
    (_NumpyType, "numpy.dtype"),
    (_NumpyArray, "numpy.ndarray"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_numpy_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((kind, f"{module}.{pure}{kind.__name__.removeprefix('Pure')}")  # 3.13 writes pathlib._local
      for kind in (PurePosixPath, PureWindowsPath)
      for module in ("pathlib", "pathlib._local") for pure in ("", "Pure")),
]  # fmt: skip


# --- one file ----------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, verify: bool = False) -> dict:
    """Reads a checkpoint on the CPU with weights_only=True. Of other classes only those of SAFE are built, which
    published files hold. safetensors, also in shards (give the index): {"model": the tensors}.

    verify: compare the checksums too, which torch writes and does not read (others can leave them out).
    Raises CheckpointError.
    """
    shard = re.search(r"-(\d{5})-of-(\d{5})\.\w+$", str(path))
    if shard and int(shard[2]) > 1 and os.path.isfile(path):
        raise CheckpointError(f"{path}: part {int(shard[1])} of {int(shard[2])}; give the folder of all, or its index")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise CheckpointError(f"{path}: not a regular file")  # a pipe or a device would be waited for
    if str(path).endswith(".index.json"):
        return {"model": _load_shards(Path(path))}
    state = _read(path, verify)
    _refuse_parts(state, path)
    return state


def _read(path: str | Path, verify: bool = False) -> dict:
    try:
        if verify and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("checksum")
        if _is_safetensors(path):
            return {"model": safetensors.torch.load_file(path)}
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that a damaged file seems to have
            with open(path, "rb") as file:  # by its name alone torch would take some for safetensors
                state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint (file or folder)") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder; give the checkpoint file inside it") from None
    except Exception as error:  # a damaged or foreign file can make the unpickler raise anything
        if isinstance(error, OSError) and error.strerror:  # no permission, a disk that fails
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        raise CheckpointError(f"{path}: not a readable checkpoint: {_what_is(path, error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: contains a {type(state).__name__}, not a dictionary of weights")
    return state


def _is_safetensors(path: str | Path) -> bool:
    """By the content: its length in 8 bytes, then JSON. Files are renamed."""
    with open(path, "rb") as file:
        head = file.read(9)
    plausible = int.from_bytes(head[:8], "little") <= os.path.getsize(path) - 8
    return head[8:] == b"{" and plausible or str(path).endswith(".safetensors") and head[:2] not in (b"PK", b"\x80\x02")


BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: run `git lfs pull` where it came from"),
    (b"<!doctype html", "a web page, not the file itself: download it again"),
    (b"<html", "a web page, not the file itself: download it again"),
    (b"\x93numpy", "a numpy array (.npy), not weights by name"),
    (b"\x89hdf", "an HDF5 file (Keras, TensorFlow): save its weights with torch or safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"{", "JSON, not weights"),
)
WITHOUT_CODE = "only its weights: torch.save({'model': MODEL.state_dict()}, FILE)"


def _what_is(path: str | Path, error: Exception) -> str:
    """What a file is that torch.load has refused: which class it contains, what else it is, or that it is damaged."""
    name, reason = Path(path).name, str(error).strip()
    damaged = f"damaged, cut off, or no file of weights ({type(error).__name__})"
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 20)
        if not head:
            return "damaged: it is empty"
        for beginning, words in BEGINNINGS:
            if head[:200].lstrip().lower().startswith(beginning):
                return words
        if head.startswith(b"PK"):
            if not zipfile.is_zipfile(path):
                return "damaged: the end of its zip archive is missing (a download or copy that was cut off)"
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
                pickles = [member for member in members if member.rsplit("/", 1)[-1] == "data.pkl"]
                if any(member.rsplit("/", 1)[-1] == "constants.pkl" for member in members):
                    return f"TorchScript: write {WITHOUT_CODE}, with MODEL = torch.jit.load({name!r})"
                if not pickles and any(member.endswith(".npy") for member in members):
                    return "numpy arrays (.npz), not torch's file: save them with torch.save or safetensors"
                if not pickles:
                    return f"a zip archive that torch.save did not write ({', '.join(members[:3])})"
                head = archive.read(pickles[0])
                is_whole = _is_whole_pickle(head)
        else:
            with open(path, "rb") as file:
                is_whole = _is_whole_pickle(file)
    except Exception:  # the file may hold anything, and it has been refused already: this only looks for the reason
        return damaged
    if isinstance(error, _NotRead):
        return f"it contains {reason}, which are not read: leave them out, and write it again"
    if refused := _refused_class(reason):
        return _words_on(refused, head, name)
    if head[:1] == b"\x80" and ("operand" in reason or "magic number" in reason) and is_whole:
        how = f"of protocol {head[1]}" if head[1] != 2 else "that torch.save did not write"
        return f"a pickle {how}: read it with what wrote it, and write {WITHOUT_CODE}"
    return damaged


def _refused_class(reason: str) -> str:
    """The name in torch's message, or ""."""
    for pattern in (r"GLOBAL ([\w.]+)", r"<class '([\w.]+)'>", r"<(?:built-in )?(?:function|method) ([\w.]+)",
                    r"``(torch\.[\w.]+)``.* must be imported"):  # fmt: skip
        if found := re.search(pattern, reason):
            return found[1]
    return ""


def _words_on(refused: str, pickled: bytes, name: str) -> str:
    if refused.startswith("deepspeed."):
        return f"{PART_OF_OPTIMIZER} (it contains a {refused})"
    if b"torch.nn.modules" in pickled:
        return f"a pickled model (it contains a {refused}), which could run code: with its code, write {WITHOUT_CODE}"
    return (
        f"it contains a {refused}, and building that could run code. If you trust the file, read it with "
        f"torch.load({name!r}, weights_only=False) and write only its weights, or leave that object out"
    )


def _is_whole_pickle(source) -> bool:
    """source: bytes or an open file; nothing in it is built."""
    try:
        return any(operation.name == "STOP" for operation, _, _ in pickletools.genops(source))
    except Exception:  # pickletools raises what it likes on bytes that are no pickle
        return False


PART_OF_OPTIMIZER = (
    "one process's part of DeepSpeed's optimizer state, not weights: of ZeRO 1 and 2 give mp_rank_00_model_states.pt "
    "beside it; of ZeRO 3 join the parts with DeepSpeed's zero_to_fp32.py, and give its result"
)


def _refuse_parts(state: dict, path: str | Path) -> None:
    """Raises CheckpointError for one process's share of a DeepSpeed checkpoint."""
    if "optimizer_state_dict" in state and "ds_version" in state:
        raise CheckpointError(f"{path}: {PART_OF_OPTIMIZER}")
    if "ds_config" not in state and "param_shapes" not in state:
        return
    weights = [value for value in (state.get("module") or {}).values() if isinstance(value, Tensor)]
    if weights and all(value.numel() == 0 for value in weights):
        raise CheckpointError(
            f"{path}: one process's part of a ZeRO-3 checkpoint, its weights are spread over the files of all: join "
            "them with `python zero_to_fp32.py FOLDER OUTPUT`, which DeepSpeed wrote beside them, and give OUTPUT"
        )


def _load_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of a model.safetensors.index.json or pytorch_model.bin.index.json."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = sorted(set(places.values()))
        if not all(name and name == os.path.basename(name) for name in names):
            raise ValueError("shards in other folders")
    except FileNotFoundError:
        raise CheckpointError(f"{index}: no such checkpoint (file or folder)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({type(error).__name__})") from error
    weights = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: its shard {name} is missing, of {len(names)}")
        shard = _read(index.parent / name)
        weights |= shard["model"] if isinstance(shard.get("model"), dict) else shard
    if absent := [f"{name} ({place})" for name, place in places.items() if name not in weights]:
        raise CheckpointError(f"{index}: {len(absent)} tensors are not in their shards: {', '.join(absent[:3])}")
    return weights


# What tools/convert_checkpoint.py writes beside the weights of a Hugging Face folder.
SAMPLER_FILE, ARGS_FILE = "sampler.safetensors", "args.json"


def load_beside(weights: str | Path) -> dict:
    """What lies beside a Hugging Face folder's model.safetensors and the folder's config has no place for: "args", the
    flags of the run, and {name of a learned sampler: its tensors}; {} where there is nothing. Raises CheckpointError.
    """
    folder, state = Path(weights).parent, {}
    if not Path(weights).name.startswith("model.safetensors"):
        return {}
    if (folder / ARGS_FILE).is_file():
        try:
            state["args"] = dict(json.loads((folder / ARGS_FILE).read_text())["args"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / ARGS_FILE}: not the flags of a run ({type(error).__name__})") from error
    if (folder / SAMPLER_FILE).is_file():
        for name, value in load_checkpoint(folder / SAMPLER_FILE)["model"].items():
            sampler, _, inside = name.partition(".")
            state.setdefault(sampler, {})[inside] = value
    return state


# --- a folder ----------------------------------------------------------------------------------------------------

IN_ORDER = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "mp_rank_00_model_states.pt",
)  # fmt: skip
SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".ckpt")


def weights_in(folder: str | Path) -> Path:
    """The file, or the folder below, that holds the weights of a folder of Hugging Face or DeepSpeed, or of one with a
    single file of weights. Raises CheckpointError."""
    folder = Path(folder)
    try:
        names = sorted(os.listdir(folder))
        latest = (folder / "latest").read_text().strip() if (folder / "latest").is_file() else ""  # DeepSpeed's
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    if "mp_rank_01_model_states.pt" in names:
        raise CheckpointError(f"{folder}: a model that DeepSpeed cut up over several processes (mp_rank_*): join it")
    for name in IN_ORDER:
        if name in names:
            return folder / name
    if parts := [name for name in names if re.fullmatch(r"zero_pp_rank_\d+_.*model_states\.pt", name)]:
        return folder / parts[0]  # of ZeRO 3, which load_checkpoint refuses with what to do
    below = [name for name in names if re.fullmatch(r"checkpoint-\d+", name) and (folder / name).is_dir()]
    if latest in names:
        return folder / latest
    if below:  # VideoMAE's runs under DeepSpeed, transformers' Trainer
        return folder / max(below, key=lambda name: int(name.split("-")[1]))
    files = [name for name in names if name.endswith(SUFFIXES) and (folder / name).is_file()]
    if len(files) == 1:
        return folder / files[0]
    if files:
        raise CheckpointError(f"{folder}: contains {len(files)} files of weights, name one: {', '.join(files[:4])}")
    raise CheckpointError(f"{folder}: no checkpoint in this folder (it contains {', '.join(names[:4]) or 'nothing'})")
