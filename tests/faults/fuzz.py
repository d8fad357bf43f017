"""Random damage to valid files, for each reader: a value or a clean sentence, or else a failure."""

import io
import json
import multiprocessing
import random
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk
import torch

from dataloaders.files import read_list, read_sample, read_spacing
from dataloaders.scans.reading import read_label, read_scan
from sdcl import checkpoints
from sdcl.runs.errors import UserError
from sdcl.runs.folder import read_config

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the tests' folder, for children too
from test_scans import write_dicom  # noqa: E402

FEW, MANY = 100, 2000  # inputs a reader, in `make test` and in `make faults`
TOKENS = (
    b"\0" * 8,
    b"\xff" * 8,
    b"../",
    b"\r\n",
    b"NaN",
    b"1e999",
    b"\x7f\xff\xff\xff",
    b"\x80",
    b"PK\x01\x02",
    b"{",
    b"[",
)
Readable = tuple[list[bytes], Callable[[Path], object], str]  # valid contents, what reads a file, the file's name
PICKLES = "checkpoints, inside their checksums (load_weights)"
DEADLINE_S = 60  # for one input


@dataclass
class Result:
    """What came of one reader.

    Attributes:
        reader: its name.
        tried: inputs.
        accepted: those that gave a value.
        refused: those that gave a clean sentence.
        failures: what else happened.
    """

    reader: str
    tried: int
    accepted: int
    refused: int
    failures: list[str]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Damage a file's content in up to four ways."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(result) + 1), rng.choice((1, 1, 2, 4, 8, 64, 500))
        kind = rng.randrange(6)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            result[place:place] = rng.choice(TOKENS)
        elif kind == 3:
            result[place:place] = result[place : place + length]
        elif kind == 4:
            result[place : place + 8] = rng.choice(TOKENS)
        elif rng.random() < 0.3:
            del result[place:]
        else:
            del result[place : place + length]
    return bytes(result)


def damaged_pickle(content: bytes, rng: random.Random) -> bytes:
    """Damage the pickle inside a checkpoint's archive, and make the archive's checksums right again."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            record = old.read(name)
            new.writestr(name, damaged(record, rng) if name.endswith("data.pkl") else record)
    return result.getvalue()


def seeds(folder: Path) -> dict[str, Readable]:
    """Return what to read by each reader."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "valid"
    rng = np.random.default_rng(0)
    image, label = rng.random((12, 10)).astype(np.float32), (rng.random((12, 10)) * 4).astype(np.uint8)
    hdf5 = []
    for how in ({}, {"compression": "gzip"}, {"chunks": (4, 5), "shuffle": True, "fletcher32": True}):
        with h5py.File(path, "w") as file:
            file.create_dataset("image", data=image, **how)
            file.create_dataset("label", data=label, **how)
            file.attrs["spacing"] = (1.0, 1.5)
        hdf5.append(path.read_bytes())
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    adam = torch.optim.Adam(network.parameters())
    own = {"networks": {"student_a": network.state_dict()}, "optimisers": {"student_a": adam.state_dict()}}
    saved = []
    for payload in (network.state_dict(), own | {"best": {}, "iteration": 3, "stage": "pre_train", "config": {}}):
        torch.save(payload, path)
        saved.append(path.read_bytes())
    config = {"labelnum": 2, "patch_size": [32, 32], "select": "val", "student_a": "unet", "student_b": "resunet"}
    lists = ["patient001_frame01\npatient001_frame02\r\n\n  patient002\n".encode("utf-8-sig"), b"one\ntwo\nthree\n"]

    def read_hdf5(path: Path) -> None:
        read_sample(path, ndim=2, num_classes=4)
        read_spacing(path)

    def load_weights(path: Path) -> None:
        checkpoints.load_weights(network, path)

    scans = raw_scans(folder)
    return {
        "NIfTI (read_scan, read_label)": (scans["nii"], read_both, "a.nii"),
        "compressed NIfTI (read_scan, read_label)": (scans["nii.gz"], read_both, "a.nii.gz"),
        "NRRD (read_scan, read_label)": (scans["nrrd"], read_both, "a.nrrd"),
        "MetaImage (read_scan, read_label)": (scans["mha"], read_both, "a.mha"),
        "DICOM, one slice of a series (read_scan)": (scans["dcm"], lambda path: read_scan(path.parent), "ct/1.dcm"),
        "lists (read_list)": (lists, read_list, "a.list"),
        "HDF5 (read_sample, read_spacing)": (hdf5, read_hdf5, "a.h5"),
        "checkpoints (load)": (saved, checkpoints.load, "a.pth"),
        "checkpoints (load_weights)": (saved, load_weights, "a.pth"),
        PICKLES: (saved, load_weights, "a.pth"),
        "config.json (read_config)": (
            [json.dumps({"config": config, "lists": {"a": "0"}, "resumed": []}, indent=2).encode()],
            lambda path: read_config(path.parent), "config.json",
        ),
    }  # fmt: skip


def raw_scans(folder: Path) -> dict[str, list[bytes]]:
    """Return valid raw scans by format, and write a series' other slices into ct/."""
    array = np.random.default_rng(0).integers(0, 4, (9, 8, 5)).astype(np.int16)
    image, contents = sitk.GetImageFromArray(array.T), {}
    image.SetSpacing((1.0, 2.0, 3.0))
    for suffix in ("nii", "nii.gz", "nrrd", "mha"):
        sitk.WriteImage(image, str(folder / f"valid.{suffix}"), suffix == "nrrd")
        contents[suffix] = [(folder / f"valid.{suffix}").read_bytes()]
    write_dicom(folder / "ct", array, names=[f"{k}.dcm" for k in range(5)])
    return contents | {"dcm": [(folder / "ct" / "1.dcm").read_bytes()]}


def read_both(path: Path) -> None:
    """Read a file as an image and as a label."""
    read_scan(path)
    read_label(path)


def read_one(what: Readable, damage: Callable, rng: random.Random, folder: Path) -> str:
    """Read one damaged file and say what happened: "accepted", "refused", or what was wrong."""
    contents, read, name = what
    (folder / name).write_bytes(damage(rng.choice(contents), rng))
    try:
        read(folder / name)
    except UserError as error:
        is_clean = "\n" not in str(error) and Path(name).parts[0] in str(error)
        return "refused" if is_clean else f"the sentence {str(error)!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def read_from(folder: Path, count: int, first: int, tell: Callable[[str], None]) -> None:
    """Read damaged files from number `first` on, `count` for each reader, and tell of each what happened."""
    readers = list(seeds(folder).items())
    for number in range(first, count * len(readers)):
        reader, what = readers[number // count]
        damage = damaged_pickle if reader == PICKLES else damaged
        tell(read_one(what, damage, random.Random(f"{reader} {number % count}"), folder))


def try_all(folder: Path, count: int) -> list[Result]:
    """Try every reader with so many inputs, in another process; where that dies, count it and go on after the input."""
    results = [Result(reader, count, 0, 0, []) for reader in seeds(folder)]
    context, number = multiprocessing.get_context("spawn"), 0
    while number < count * len(results):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=read_from, args=(folder, count, number, send.send))
        process.start()
        send.close()
        while number < count * len(results):
            result = results[number // count]
            try:
                what = receive.recv() if receive.poll(DEADLINE_S) else f"no end within {DEADLINE_S} s"
            except EOFError:
                process.join()
                what = f"the process died ({process.exitcode})"
            if what in ("accepted", "refused"):
                setattr(result, what, getattr(result, what) + 1)
            else:
                result.failures.append(f"input {number % count}: {what}")
            number += 1
            if what.startswith(("no end", "the process died")):
                break
        process.kill()
        process.join()
    return results


def table(results: list[Result]) -> str:
    """Return the results as a table of Markdown."""
    lines = ["| reader | inputs | read | refused in a sentence | failures |", "|---|---|---|---|---|"]
    for result in results:
        failures = "; ".join(result.failures[:3]) or "none"
        lines.append(f"| {result.reader} | {result.tried} | {result.accepted} | {result.refused} | {failures} |")
    return "\n".join(lines)
