"""Every kind of bad input by table: each ends in one sentence that names the file and the way out, before training.

DATA breaks a data set and gives it to the training script; FILES makes one file and gives it to a reader. A new reader
appends its rows: a name, the reader, what makes the file (or returns its bytes), and a pattern of the sentence.
"""

import importlib.util
import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import ROOT, write_h5

from sdcl import checkpoints
from sdcl.checkpoints import load_weights
from sdcl.networks import build_network
from sdcl.runs.config import parse
from sdcl.runs.errors import UserError
from sdcl.runs.folder import read_config
from sdcl.steps import make_learners

SLICE = "data/slices/patient003_frame01_slice_1.h5"
VOLUME = "data/patient005_frame02.h5"
TRAIN, VAL, TEST = (f"data_split/{name}.list" for name in ("train_slices", "val", "test"))
IMAGE = np.random.default_rng(0).random((36, 40)).astype(np.float32)
LABEL = (np.arange(36 * 40).reshape(36, 40) % 4).astype(np.uint8)
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
pytestmark = pytest.mark.filterwarnings("ignore")  # what Python finds odd about making such files
NOT_ROOT = pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the administrator may read everything")


def text(path, content):
    """Write a list: text as UTF-8, or bytes as they are; a function changes the text that is there."""

    def write(root):
        there = (root / path).read_text(encoding="utf-8")
        new = content(there) if callable(content) else content
        (root / path).write_bytes(new if isinstance(new, bytes) else new.encode())

    return write


def arrays(path=SLICE, **datasets):
    """Write an HDF5 file with these arrays."""
    return lambda root: write_h5(root / path, **datasets)


def hdf5(write, path=SLICE):
    """Write an HDF5 file by a function of the open file."""

    def make(root):
        with h5py.File(root / path, "w") as file:
            write(file)

    return make


def content(change, path=SLICE):
    """Replace a file's content by a function of it."""
    return lambda root: (root / path).write_bytes(change((root / path).read_bytes()))


def replaced(put, path=SLICE):
    """Put something else in a file's place."""

    def make(root):
        elsewhere = root.parent / "elsewhere.h5"
        shutil.move(root / path, elsewhere)
        put(root / path, elsewhere)

    return make


def flip_data(root):
    """Damage the compressed image, whose checksum then fails."""
    with h5py.File(root / SLICE) as file:
        where = file["image"].id.get_chunk_info(0)
    raw = bytearray((root / SLICE).read_bytes())
    raw[where.byte_offset + where.size // 2] ^= 255
    (root / SLICE).write_bytes(raw)


def external_storage(file):
    file.create_dataset("image", (36, 40), "f4", external=[("/etc/hostname", 0, 36 * 40 * 4)])


def virtual(file):
    layout = h5py.VirtualLayout((36, 40), "f4")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "image", (36, 40))
    file.create_virtual_dataset("image", layout)


def links(kind):
    def write(file):
        file["other"] = IMAGE
        file["image"] = h5py.SoftLink("/other") if kind == "soft" else h5py.ExternalLink("/etc/other.h5", "/image")
        file["label"] = LABEL

    return write


def spacing(value):
    def make(root):
        with h5py.File(root / VOLUME, "r+") as file:
            file.attrs["spacing"] = value

    return make


def with_nan(array, value):
    return np.where(array > array.mean(), value, array)


DATA: dict[str, tuple] = {
    "list missing": (lambda root: (root / TRAIN).unlink(), r"train_slices.list does not exist: copy it"),
    "list empty": (text(TRAIN, ""), r"train_slices.list is empty: it needs a case name a line"),
    "list of blank lines": (text(TRAIN, "\r\n \n\t\n"), r"train_slices.list is empty"),
    "list in UTF-16": (text(TRAIN, lambda t: t.encode("utf-16")), r"cannot be read .*: write it as UTF-8 text"),
    "list of bytes": (text(TRAIN, b"\x80\x81\xfe"), r"cannot be read .*: write it as UTF-8 text"),
    "list is a folder": (
        lambda root: ((root / TRAIN).unlink(), (root / TRAIN).mkdir()), r"train_slices.list cannot be read",
    ),
    "list too large": (lambda root: os.truncate(root / TRAIN, 2**24 + 1), r"has more than \d+ bytes: write a case"),
    "name twice": (text(TRAIN, lambda t: t + t.splitlines()[0]), r"names patient001_frame01_slice_1 twice: remove"),
    "name leaves the folder": (text(TRAIN, lambda t: t + "../../secret"), r"names '../../secret', which .*: write"),
    "name climbs inside": (text(TRAIN, lambda t: t + "a/../../../secret"), r"names 'a/../../../secret', which"),
    "name is absolute": (text(TRAIN, lambda t: t + "/etc/passwd"), r"names '/etc/passwd', which is no case's name"),
    "name of a home": (text(TRAIN, lambda t: t + "~root/x"), r"names '~root/x', which is no case's name"),
    "name with a drive": (text(TRAIN, lambda t: t + "C:patient"), r"names 'C:patient', which is no case's name"),
    "name with backslashes": (text(TRAIN, lambda t: t + "..\\secret"), r"which is no case's name or leaves"),
    "name with control characters": (text(TRAIN, lambda t: t + "pat\x00ient\x1b[2J"), r"which is no case's name"),
    "name too long": (text(TRAIN, lambda t: t + "p" * 300), r"which is no case's name"),
    "name without a file": (text(TRAIN, lambda t: t + "patient099_frame01_slice_1"), r"slice_1.h5 does not exist"),
    "validation case in training": (
        text(VAL, lambda t: t + "patient002_frame01"),
        r"train_slices.list and val.list both name patient002: take it out of one of them",
    ),
    "test case in training": (
        text(TRAIN, lambda t: t + "patient006_frame01_slice_1"), r"and test.list both name patient006: take it out",
    ),
    "test list broken": (text(TEST, b"\xff\xfe"), r"test.list cannot be read"),
    "file missing": (lambda root: (root / SLICE).unlink(), r"slice_1.h5 does not exist: restore it, or take its name"),
    "file empty": (content(lambda b: b""), r"slice_1.h5 is empty: copy or convert"),
    "file cut short": (content(lambda b: b[: len(b) // 2]), r"not a readable HDF5 file .*: copy or convert it again"),
    "file of text": (content(lambda b: b"hello\n" * 400), r"not a readable HDF5 file"),
    "file of another format": (content(lambda b: b"\x1f\x8b\x08" + b), r"not a readable HDF5 file"),
    "file with a damaged block": (flip_data, r"not a readable HDF5 file"),
    "file not to be read": pytest.param(
        lambda root: (root / SLICE).chmod(0), r"may not be read: give yourself the permission", marks=NOT_ROOT
    ),
    "a folder for a file": (replaced(lambda path, _: path.mkdir()), r"slice_1.h5 is not a file: put the case's file"),
    "a pipe for a file": pytest.param(
        replaced(lambda path, _: os.mkfifo(path)), r"slice_1.h5 is not a file: put the case's file", marks=POSIX
    ),
    "a link out of the folder": pytest.param(
        replaced(lambda path, elsewhere: path.symlink_to(elsewhere)), r"leads out of .*: copy the case there",
        marks=POSIX,
    ),
    "no image": (arrays(label=LABEL), r"has no `image` \(it holds label\): convert the case again"),
    "no label": (arrays(VOLUME, image=np.stack([IMAGE] * 2)), r"frame02.h5 has no `label` \(it holds image\): convert"),
    "image is a group": (arrays(**{"image/nested": IMAGE}), r"not a readable HDF5 file"),
    "image of three dimensions": (arrays(image=np.stack([IMAGE] * 2)), r"shape \(2, 36, 40\), it needs 2 dimensions"),
    "image without pixels": (arrays(image=IMAGE[:0]), r"it needs 2 dimensions"),
    "image is a number": (arrays(image=3.0), r"it needs 2 dimensions"),
    "image is nothing": (arrays(image=h5py.Empty("f4")), r"it needs 2 dimensions"),
    "image of text": (arrays(image=np.full((36, 40), b"x")), r"has the type .*, it needs numbers: convert"),
    "image of strings": (arrays(image=["a", "b"]), r"has the type object, it needs numbers"),
    "image of complex numbers": (arrays(image=IMAGE.astype(np.complex64)), r"has the type complex64, it needs numbers"),
    "image of records": (arrays(image=np.zeros((36, 40), "i4,f4")), r"it needs numbers"),
    "image of truth values": (arrays(image=IMAGE > 0.5), r"has the type bool, it needs numbers"),
    "image with nan": (arrays(image=with_nan(IMAGE, np.nan)), r"`image` holds nan or infinite values: convert"),
    "image with infinity": (arrays(image=with_nan(IMAGE, -np.inf)), r"`image` holds nan or infinite values"),
    "image beyond float32": (arrays(image=with_nan(IMAGE.astype(np.float64), 1e300)), r"nan or infinite values"),
    "image constant": (
        arrays(VOLUME, image=np.full((2, 36, 40), 7.0), label=np.stack([LABEL] * 2)),
        r"`image` is 7 everywhere: convert .*, or take it out",
    ),
    "image declares a terabyte": (
        hdf5(lambda f: f.create_dataset("image", (2**20, 2**18), "f4", chunks=(64, 64))),
        r"declares 274877906944 voxels, more than the \d+ allowed: crop",
    ),
    "image declares what is not stored": (
        hdf5(lambda f: f.create_dataset("image", (2**14, 2**14), "f4", chunks=(64, 64))),
        r"`image` declares 1073741824 bytes, but only 0 are stored: copy the file again",
    ),
    "image through a soft link": (hdf5(links("soft")), r"`image` is a link to somewhere else: store the array"),
    "image through a link to a file": (hdf5(links("external")), r"`image` is a link to somewhere else: store"),
    "image kept in another file": (hdf5(external_storage), r"`image` is kept in another file: store the array"),
    "image pieced from other files": (hdf5(virtual), r"`image` is kept in another file: store the array"),
    "label of another shape": (
        arrays("data/slices/patient001_frame01_slice_1.h5", image=IMAGE, label=LABEL[:5]),
        r"`label` \(5, 40\) and `image` \(36, 40\) differ in shape: convert",
    ),
    "label beyond the classes": (
        arrays("data/slices/patient001_frame01_slice_1.h5", image=IMAGE, label=LABEL + 1),
        r"`label` holds 4, outside the classes 0 to 3: correct the label",
    ),
    "label negative": (
        arrays("data/slices/patient001_frame01_slice_1.h5", image=IMAGE, label=LABEL.astype(np.int8) - 1),
        r"`label` holds -1, outside the classes",
    ),
    "label fractional": (
        arrays("data/slices/patient001_frame01_slice_1.h5", image=IMAGE, label=LABEL / 2),
        r"`label` holds 0.5, outside the classes",
    ),
    "label nan": (
        arrays("data/slices/patient001_frame01_slice_1.h5", image=IMAGE, label=with_nan(LABEL, np.nan)),
        r"`label` holds nan, outside the classes",
    ),
    "label of text": (
        arrays("data/slices/patient001_frame01_slice_1.h5", image=IMAGE, label=np.full((36, 40), b"x")),
        r"`label` has the type",
    ),
    "spacing of text": (spacing("1 mm"), r"frame02.h5: the attribute `spacing` is .*, it needs 3 lengths in mm: "),
    "spacing negative": (spacing((1.0, -1.0, 1.0)), r"the attribute `spacing` is .*, it needs 3 lengths in mm"),
    "spacing of two sides": (spacing((1.0, 1.0)), r"the attribute `spacing` is .*, it needs 3 lengths in mm"),
}  # fmt: skip


def rows(table):
    """Return a table's rows as pytest's parameters, named."""
    return [
        pytest.param(*row.values, marks=row.marks, id=name) if hasattr(row, "marks") else pytest.param(*row, id=name)
        for name, row in table.items()
    ]


def script():
    spec = importlib.util.spec_from_file_location("ACDC_train", ROOT / "code" / "ACDC_train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_sentence(error, pattern):
    sentence = str(error.value)
    assert error.match(pattern)
    assert "\n" not in sentence and sentence.endswith(".") and ": " in sentence


@pytest.mark.parametrize(("damage", "pattern"), rows(DATA))
def test_bad_data_end_in_a_sentence_before_training(acdc_phantom, tmp_path, damage, pattern):
    root = shutil.copytree(acdc_phantom, tmp_path / "acdc")
    damage(root)
    train = script()
    arguments = ["--root_path", root, "--models_path", tmp_path / "models", "--patch_size", "32", "32",
                 "--labelnum", "2", "--batch_size", "2", "--device", "cpu", "--pre_iterations", "1"]  # fmt: skip
    with pytest.raises(UserError) as error:
        train.main(parse(train.Config, [str(argument) for argument in arguments]))
    check_sentence(error, pattern)
    assert not (tmp_path / "models").exists()


# --- single files ---

NETWORK = build_network("unet", 4)
STATE = NETWORK.state_dict()


def weights(path):
    load_weights(build_network("unet", 4), path)


def run_state(path):
    """Read a checkpoint as self-training's start does."""
    make_learners(build_network("unet", 4), build_network("unet", 4), 1e-3).load(checkpoints.load(path), path)


def saved(payload, **how):
    return lambda path: torch.save(payload, path, **how)


def rezipped(change):
    """Write a checkpoint whose archive has been changed: name and bytes of each record to new ones."""

    def make(path):
        torch.save({"w": torch.zeros(3)}, path.with_name("first.pth"))
        with zipfile.ZipFile(path.with_name("first.pth")) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                for record in change(name, old.read(name)):
                    new.writestr(*record)

    return make


def flipped(path):
    torch.save(STATE, path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path):
    torch.save(STATE, path)
    os.truncate(path, path.stat().st_size // 2)


def scripted(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))


class Executes:
    """What a pickle would call on being read."""

    def __reduce__(self):
        return print, ("executed",)


def moments(**changes):
    """Return a run's state with Adam's state changed for the first parameter."""
    learners = make_learners(build_network("unet", 4), build_network("unet", 4), 1e-3)
    for network in learners.students:
        network(torch.zeros(2, 1, 16, 32)).sum().backward()
    for optimiser in learners.optimisers.values():
        optimiser.step()
    state = learners.state()
    state["optimisers"]["student_b"]["state"][0].update(changes)
    return state


def config(**changes):
    """Return a config.json with changes; None leaves a field out."""
    fields = {"labelnum": 2, "patch_size": [32, 32], "select": "val", "student_a": "unet", "student_b": "resunet"}
    fields = {key: value for key, value in (fields | changes).items() if value is not None}
    return lambda path: path.write_text(json.dumps({"config": fields}))


def settings(path):
    read_config(path.parent)


UNSAFE = r"is not a checkpoint that can be read safely \(.*\): copy it again, or save it anew"
NO_CONFIG = r"config.json cannot be read: restore it from a copy, or remove the folder"
FILES: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "checkpoint missing": (weights, lambda path: None, r"a.pth does not exist: train first, or give"),
    "checkpoint is a folder": (weights, lambda path: path.mkdir(), r"a.pth is a folder: give a checkpoint in it, such"),
    "checkpoint empty": (weights, lambda path: path.touch(), UNSAFE),
    "checkpoint of text": (weights, lambda path: path.write_text("hello"), UNSAFE),
    "checkpoint cut short": (weights, cut, UNSAFE),
    "checkpoint with a flipped bit": (weights, flipped, r"fails its checksum\): copy it again"),
    "checkpoint that executes": (weights, saved({"net": Executes()}), UNSAFE),
    "checkpoint of an old format": (weights, saved(STATE, _use_new_zipfile_serialization=False), UNSAFE),
    "checkpoint of TorchScript": (weights, scripted, r"is none of torch.save"),
    "checkpoint with a record of its own": (
        weights, rezipped(lambda name, data: [(name, data), ("x/../../evil", b"")]), r"'x/../../evil' is none of",
    ),
    "checkpoint with a record twice": (
        weights, rezipped(lambda name, data: [(name, data), (name, data)]), r"it has a record twice",
    ),
    "checkpoint compressed": (
        weights, rezipped(lambda name, data: [(name, data, zipfile.ZIP_DEFLATED)]), r"compressed or encrypted",
    ),
    "checkpoint without its pickle": (
        weights, rezipped(lambda name, data: [] if "data.pkl" in name else [(name, data)]), UNSAFE,
    ),
    "checkpoint that declares more": (
        weights, rezipped(lambda name, data: [(name, data.replace(b"K\x03", b"J\0\0\0\x10"))]), UNSAFE,
    ),
    "checkpoint of one number, vast": (
        weights, saved({"w": torch.zeros(1).expand(2**40)}), r"tensor of the shape \(1099511627776,\) in 4 bytes",
    ),
    "checkpoint of sparse tensors": (weights, saved({"w": torch.eye(3).to_sparse()}), r"not dense on the CPU"),
    "checkpoint without storage": (weights, saved({"w": torch.zeros(3, device="meta")}), r"not dense on the CPU"),
    "checkpoint with a set": (weights, saved({"w": {1, 2}}), r"a value of the type set"),
    "checkpoint is a list": (weights, saved([1, 2]), r"holds a list, not a dict of tensors: save a state dict"),
    "checkpoint of numbers": (weights, saved({"epoch": 3}), r"neither a state dict nor a container .*: save one"),
    "checkpoint with networks of numbers": (weights, saved({"networks": {"student_a": 3}}), r"no networks by role"),
    "checkpoint lacks a name": (
        weights, saved(dict(list(STATE.items())[1:])), r"it lacks encoder.*; choose the checkpoint of this network",
    ),
    "checkpoint has another name": (weights, saved(STATE | {"x": torch.zeros(1)}), r"has the unknown x; choose"),
    "checkpoint has another shape": (
        weights, saved(STATE | {"decoder.out_conv.bias": torch.zeros(9)}), r"another shape for decoder.out_conv.bias",
    ),
    "checkpoint of whole numbers": (
        weights, saved(STATE | {"decoder.out_conv.bias": torch.zeros(4).long()}), r"another type of number for decoder",
    ),
    "checkpoint with nan": (
        weights, saved(STATE | {"decoder.out_conv.bias": torch.full((4,), math.nan)}), r"nan or infinite values in d",
    ),
    "run state without networks": (run_state, saved({"optimisers": {}}), r"is not a checkpoint of a run: choose one"),
    "run state of another role": (
        run_state, saved({"networks": {"x": STATE}, "optimisers": {"x": {}}}), r"is not a checkpoint of a run: choose",
    ),
    "optimiser of another shape": (run_state, saved(moments(exp_avg=torch.zeros(3))), r"its optimiser's state is not"),
    "optimiser with nan": (
        run_state, saved(moments(step=torch.tensor(math.nan))), r"its optimiser's state is not that of these networks",
    ),
    "config missing": (settings, lambda path: None, r"config.json does not exist: train first, or give the run's"),
    "config empty": (settings, lambda path: path.touch(), NO_CONFIG),
    "config of text": (settings, lambda path: path.write_text("hello"), NO_CONFIG),
    "config in UTF-16": (settings, lambda path: path.write_text("{}", encoding="utf-16"), NO_CONFIG),
    "config is a list": (settings, lambda path: path.write_text("[]"), NO_CONFIG),
    "config nested deeply": (settings, lambda path: path.write_text("[" * 100_000), NO_CONFIG),
    "config too large": (settings, lambda path: (path.touch(), os.truncate(path, 2**25)), NO_CONFIG),
    "config lacks a network": (settings, config(student_a=None), NO_CONFIG),
    "config of an unknown network": (settings, config(student_a="__class__"), NO_CONFIG),
    "config with a list for a network": (settings, config(student_b=["unet"]), NO_CONFIG),
    "config with text for a size": (settings, config(patch_size="big"), NO_CONFIG),
    "config with a vast size": (settings, config(patch_size=[32, 10**9]), NO_CONFIG),
    "config with text for a number": (settings, config(labelnum="2"), NO_CONFIG),
}  # fmt: skip


@pytest.mark.parametrize(("read", "make", "pattern"), rows(FILES))
def test_a_bad_file_ends_in_a_sentence(tmp_path, read, make, pattern):
    path = tmp_path / ("config.json" if read is settings else "a.pth")
    made = make(path)
    if isinstance(made, bytes):
        path.write_bytes(made)
    with pytest.raises(UserError) as error:
        read(path)
    check_sentence(error, pattern)
    assert path.name in str(error.value)


def test_the_tables_are_long_enough_and_a_good_set_passes_them(acdc_phantom, tmp_path):
    """The data set that the table breaks is one that trains; its folder may be a link as a whole."""
    assert len(DATA) + len(FILES) > 100
    if os.name != "nt":
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "data").symlink_to(acdc_phantom / "data")
        (tmp_path / "link" / "data_split").symlink_to(acdc_phantom / "data_split")
        acdc_phantom = tmp_path / "link"
    train = script()
    arguments = ["--root_path", acdc_phantom, "--models_path", tmp_path / "models", "--patch_size", "32", "32",
                 "--labelnum", "2", "--batch_size", "2", "--device", "cpu", "--pre_iterations", "1",
                 "--self_iterations", "0"]  # fmt: skip
    train.main(parse(train.Config, [str(argument) for argument in arguments]))
    assert list((tmp_path / "models").glob("*/pre_train/last.pth"))
