"""A second start trusts what the first one found of unchanged files, and of nothing else; both start the same run."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from helpers import ROOT, write_h5
from test_honest_runs import VOLUMES, main

from dataloaders import acdc, cache, checked, la, study
from dataloaders.slices import SliceData
from dataloaders.volumes import VolumeData
from sdcl.runs.errors import UserError
from sdcl.runs.folder import run_folder

BOTH = pytest.mark.parametrize("name", ["acdc", "la"])


def header(root, models, **changes):
    """Return what data ask of a training script's header."""
    fields = {
        "root_path": root, "models_path": models, "exp": "x", "labelnum": 2, "select": "test", "val_cases": 0,
        "self_iterations": 1, "cache_gb": 1.0, "intensity": 0.0, "cache_dtype": "float32",
        "unlabelled_crop": "random", "augment_probability": 0.5, "max_angle_deg": 20, "stride": (16, 16, 16),
        "window_batch": 4, "precision": "fp32", "decision_rule": "argmax", "batch_size": 2, "labelled_repeat": 4,
        "unlabelled_repeat": 4, "seed": 1, "shuffle": False, "workers": 1, "device": "cpu",
    }  # fmt: skip
    return SimpleNamespace(**(fields | changes))


@pytest.fixture
def start(acdc_phantom, la_phantom, tmp_path, monkeypatch, said):
    """Return what starts a run on a copy of a phantom: what it was given, the files decoded, and the log."""
    roots = {"acdc": acdc_phantom, "la": la_phantom}
    decoded = []
    whole = cache.read_sample
    monkeypatch.setattr(cache, "read_sample", lambda path, **how: decoded.append(path) or whole(path, **how))

    def begin(name, **changes):
        root = tmp_path / name
        if not root.exists():
            shutil.copytree(roots[name], root)
            for path in sorted(root.rglob("*.h5"))[:4]:
                with h5py.File(path, "a") as file:
                    file.attrs["spacing"] = [1.1, 2.2, 0.3][: file["image"].ndim]
        decoded.clear()
        changes = {"patch_size": (32, 32) if name == "acdc" else (16, 16, 16)} | changes
        config = header(root, tmp_path / "models", **changes)
        data = SliceData(acdc.DATA_SET, config) if name == "acdc" else VolumeData(la.DATA_SET, config)
        given = data.training()
        folder = run_folder(config.models_path, name, "x", 2)
        folder.mkdir(parents=True, exist_ok=True)
        count = len(decoded)
        given.keep(folder)
        return SimpleNamespace(given=given, count=count, decoded=list(decoded), folder=folder, root=root, said=said())

    return begin


def files(name, root):
    """Return the training files of a phantom."""
    return sorted((root / "data" / "slices").glob("*.h5") if name == "acdc" else (root / "data").rglob("*.h5"))


def read_of(given):
    """Return all that a run reads: its batches, its cases, its facts."""
    batches = [given.streams(stage).batch(k) for stage in ("pre_train", "self_train") for k in range(3)]
    arrays = [batch[key].numpy() for batch in batches for key in sorted(batch)]
    cases = list(given.validation_cases)
    arrays += [array for case in cases for array in (case.image, case.label)]
    told = [(c.name, c.spacing, None if c.affine is None else c.affine.tolist()) for c in cases]
    return [(a.dtype, a.shape, a.tobytes()) for a in arrays], told, given.facts, given.lists, given.trained_on


@BOTH
def test_a_second_start_decodes_nothing_and_reads_the_same(start, name):
    first, second = start(name), start(name)
    assert first.count > 0 and second.count == 0
    assert "each read and checked" in first.said and "read and checked" not in second.said
    assert "none changed since the last start, by size and time" in second.said
    assert first.given.waiting_bytes == 0 < second.given.waiting_bytes
    assert read_of(first.given) == read_of(second.given)
    names = first.given.validation_cases.names
    assert [case.name for case in second.given.validation_cases[1:]] == names[1:]


@BOTH
def test_a_changed_file_is_read_again_alone(start, name):
    root = start(name).root
    path = files(name, root)[0]
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    again = start(name)
    assert again.decoded == [path] and "1 of them changed since the last start, or are new: read again" in again.said
    assert start(name).count == 0  # and is known from then on
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * 8)  # another size, the same time
    os.utime(path, ns=(1, path.stat().st_mtime_ns))
    assert start(name).decoded == [path]


def test_other_content_of_the_same_size_is_seen_by_its_time(start):
    first = start("acdc")
    path = files("acdc", first.root)[0]
    with h5py.File(path) as file:
        arrays = {key: file[key][()] for key in ("image", "label")}
    path.unlink()
    write_h5(path, **arrays)  # not compressed, so that it can be changed in place
    start("acdc")
    size, then = path.stat().st_size, path.stat().st_mtime_ns
    with h5py.File(path, "r+") as file:
        file["label"][...] = 7  # no class
    os.utime(path, ns=(1, then + 1))
    assert path.stat().st_size == size
    kept = (first.folder / checked.NAME).read_bytes()
    with pytest.raises(UserError, match="outside the classes"):
        start("acdc")
    assert (first.folder / checked.NAME).read_bytes() == kept  # a start that was refused leaves no record


@BOTH
def test_a_longer_list_reads_the_new_file_alone(start, name):
    root = start(name).root
    file = root / "data_split" / ("train_slices.list" if name == "acdc" else "train.txt")
    names = file.read_text().split()
    new = names[-1][:-1] + "9"
    path_of = acdc.DATA_SET.path_of if name == "acdc" else la.DATA_SET.path_of
    path_of(root, new).parent.mkdir(exist_ok=True)
    shutil.copy(path_of(root, names[-1]), path_of(root, new))
    file.write_text("\n".join([*names, new]))
    again = start(name)
    assert again.decoded == [path_of(root, new)]
    file.write_text("\n".join(names))
    assert start(name).count == 0


def test_a_case_that_becomes_labelled_is_read_as_such(start):
    first = start("la")
    file = first.root / "data_split" / "train.txt"
    names = file.read_text().split()
    file.write_text("\n".join([names[0], names[2], names[1], *names[3:]]))
    again = start("la")  # now the second is unlabelled and the third labelled
    assert again.count == 2 and "read again" in again.said


@pytest.mark.parametrize("what", ["setting", "checks", "classes"])
def test_other_settings_or_checks_read_everything_again(start, what, monkeypatch):
    first, changes = start("la"), {}
    if what == "setting":
        changes = {"cache_dtype": "float16"}
    elif what == "checks":
        monkeypatch.setattr(checked, "version", lambda: "a later one")
    else:
        monkeypatch.setattr(la, "DATA_SET", replace(la.DATA_SET, class_names=("LA", "veins")))
    again = start("la", **changes)
    assert again.count == first.count
    assert "all files are read again: the settings or the checks are other ones than at the last start" in again.said


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forge(path, change):
    """Write a record with a right checksum and a wrong content."""
    content = json.loads(path.read_text().partition("\n")[2])
    change(content)
    text = json.dumps(content)
    path.write_text(f"{checked.hashlib.sha256(text.encode()).hexdigest()}\n{text}")


DAMAGES = {
    "one bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "emptied": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a list": lambda path: path.write_text(f"{checked.hashlib.sha256(b'[]').hexdigest()}\n[]"),
    "no shape": lambda path: forge(path, lambda content: content["files"][0].__setitem__(3, None)),
    "no such text": lambda path: forge(path, lambda content: content.update(texts=[])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_no_error(start, damage):
    first = start("la")
    DAMAGES[damage](first.folder / checked.NAME)
    again = start("la")
    assert again.count == first.count and "all files are read again: " in again.said
    assert read_of(again.given) == read_of(first.given)
    if damage == "a folder":
        assert "cannot be written" in again.said and "the next start reads all files again" in again.said
    else:
        assert start("la").count == 0


def test_a_missing_record_is_a_first_start(start):
    first = start("la")
    (first.folder / checked.NAME).unlink()
    again = start("la")
    assert again.count == first.count and "all files are read again" not in again.said


def test_a_record_that_lies_about_a_shape_is_found_out(start):
    first = start("la")
    forge(first.folder / checked.NAME, lambda content: [one.__setitem__(3, [3, 3, 3]) for one in content["files"]])
    with pytest.raises(UserError, match="has changed since the start: give the same command again"):
        read_of(start("la").given)


def test_the_first_process_decides_whose_record_counts(start, monkeypatch):
    first = start("la")
    monkeypatch.setattr(study, "first", lambda work: checked.Checked({}, {}))  # it found none
    assert start("la").count == first.count
    kept = (first.folder / checked.NAME).stat().st_mtime_ns
    monkeypatch.setattr(study, "is_first", lambda: False)
    start("la")
    assert (first.folder / checked.NAME).stat().st_mtime_ns == kept  # the others write none


def test_the_version_is_that_of_the_checks_own_text():
    assert all((ROOT / "dataloaders" / name).is_file() for name in checked.SOURCES)
    assert checked.version() == checked.version() and len(checked.version()) == 64


@pytest.mark.slow
def test_a_script_says_so_and_ends_the_same(la_phantom, tmp_path):
    where = ["--root_path", la_phantom, *VOLUMES, "--pre_iterations", 2, "--select", "last", "--exp", "x"]
    rows = []
    for models, forgets in (("a", False), ("b", True)):
        given = [*where, "--models_path", tmp_path / models]
        main("LA_train.py", *given, "--self_iterations", 1)
        run = tmp_path / models / "la_x_2_labeled"
        if forgets:
            (run / checked.NAME).unlink()
        said = main("LA_train.py", *given, "--self_iterations", 2)
        assert ("none changed since the last start" in said) != forgets
        rows.append((run / "self_train" / "metrics.csv").read_text())
    assert rows[0] == rows[1] and rows[0].count("\n") == 3


def test_arrays_kept_are_nobodys_to_change_and_a_case_is_its_readers(start):
    given = start("la").given
    case = given.validation_cases[0]
    case.image[...] = 0
    assert np.ptp(given.validation_cases[0].image) > 0
