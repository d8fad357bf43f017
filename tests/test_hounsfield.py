"""Whether values are HU: offsets, scaled and z-scored values are refused, and every kind of real CT is taken."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import ROOT
from test_import import IMPORT
from test_raw import abdomen, run
from test_scans import write_nifti

from dataloaders.scans.hounsfield import hu_fault, prepared_fault
from dataloaders.scans.preprocessing import Preprocessing, prepare
from dataloaders.scans.reading import Scan, read_scan
from sdcl.runs.errors import UserError


def body(shape=(60, 56, 24), seed=0, fill=0.42, lung=True, bone=True):
    """A body in air, HU with noise: fat around muscle, lungs, a spine with a rim of all values."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij")
    radius = np.hypot(x, y) / (2 * fill)
    hu = np.where(radius < 0.85, 45.0, -100.0)
    hu[np.abs(radius - 0.5) < 0.04] = -95  # between muscles
    if lung:
        hu[np.hypot(x - 0.3, y) < 0.5 * fill] = -830
    if bone:
        hu = np.maximum(hu, 1300 - 4500 * np.hypot(x + 0.35 * fill, y))
    hu[radius > 1] = -1000
    return hu + rng.normal(0, 18, shape)


def padded(hu, value):
    hu = hu.copy()
    hu[:8, :8] = hu[-8:, :8] = hu[:8, -8:] = hu[-8:, -8:] = value
    return hu


def with_metal(hu):
    hu = hu.copy()
    hu[30:33, 28:31, 5:9] = 3071
    hu[30, 28, 5:9] = 25000
    return hu


NO_HU = {
    "plus 1024": lambda: body() + 1024,
    "plus 1024, without bone or lung": lambda: body(bone=False, lung=False) + 1024,
    "plus 1024, of a small body": lambda: body(fill=0.15) + 1024,
    "plus 1000": lambda: body() + 1000,
    "plus 1024, padded": lambda: padded(body() + 1024, -2000),
    "plus 1024, padded as low as air": lambda: padded(body() + 1024, -1000),
    "clipped at 0": lambda: np.clip(body() + 1024, 0, 4095),
    "plus 32768": lambda: body() + 32768,
    "scaled to [-1, 1]": lambda: np.clip(body() / 1000, -1, 1),
    "scaled to [0, 1]": lambda: np.clip((body() + 125) / 400, 0, 1),
    "scaled to bytes": lambda: np.clip((body() + 160) / 400, 0, 1) * 255,
    "z-scored": lambda: (body() - body().mean()) / body().std(),
    "MRI": lambda: np.abs(body() + 1000) / 3,
    "z-scored MRI": lambda: np.random.default_rng(0).normal(size=(30, 30, 10)),
    "padding that nobody declared": lambda: padded(body(), 62512),
}
HU = {
    "body": body,
    "body without lung and bone": lambda: body(lung=False, bone=False),
    "large body": lambda: body(fill=0.7),
    "small body": lambda: body(fill=0.2),
    "padded at -2000": lambda: padded(body(), -2000),
    "padded at -3024": lambda: padded(body(), -3024),
    "padded at -32768": lambda: padded(body(), -32768),
    "air at -1024": lambda: np.clip(body(), -1024, 3071),
    "metal": lambda: with_metal(body()),
    "fat and muscle without air": lambda: body()[6:26, 24:32],
    "clipped to a window": lambda: np.clip(body(), -125, 275),
    "spine without air": lambda: body(lung=False, fill=0.7)[10:44, 14:42],
    "phantom of an organ": lambda: abdomen()[0],
}


@pytest.mark.parametrize("name", NO_HU)
def test_what_is_no_hu_is_refused(name):
    array = NO_HU[name]().astype(np.float32)
    assert hu_fault(array)
    scan = Scan(Path("a.nii"), array, np.diag([-1.0, -1, 1, 1]))
    with pytest.raises(UserError, match="a.nii is no CT in HU: it reaches from .*--trust_hu"):
        prepare(scan, Preprocessing("ct"))
    assert prepare(scan, Preprocessing("ct"), trust_hu=True).array.shape == array.shape


@pytest.mark.parametrize("name", HU)
def test_what_is_hu_is_taken(name):
    assert hu_fault(HU[name]().astype(np.float32)) == ""


def test_a_real_ct_is_taken_and_not_with_an_offset():
    folder = ROOT.parent / "shared" / "data" / "pancreas" / "raw" / "Pancreas-CT" / "PANCREAS_0001"
    if not folder.exists():
        pytest.skip("the real CT is not here")
    array = read_scan(folder).array
    assert hu_fault(array) == "" and hu_fault(array[150:350, 150:350]) == ""
    for other in (array + 1024, array + 1000, np.clip(array / 1000, -1, 1), (array - array.mean()) / array.std()):
        assert hu_fault(other)


def test_the_doctor_names_data_that_were_no_hu(tmp_path):
    organ = np.zeros((40, 36, 12), np.uint8)
    organ[18:24, 20:26, 4:8] = 1
    for k in range(3):
        write_nifti(tmp_path / "images" / f"c{k}", (body((40, 36, 12), seed=k) + 1024).astype(np.float32))
        write_nifti(tmp_path / "labels" / f"c{k}", organ)
    flags = ("--images", tmp_path / "images", "--labels", tmp_path / "labels", "--output", tmp_path / "out")
    flags += ("--normalise", "ct", "--trust", "all")
    assert "c0.nii.gz is no CT in HU" in run(IMPORT, *flags, fails=True)
    run(IMPORT, *flags, "--trust_hu")
    check = ("../dataloaders/check.py", "--dataset", "own", "--root_path", tmp_path / "out")
    check += ("--figure", tmp_path / "a.png")
    text = run(*check)
    assert "nothing is wrong" in text and "3 cases do not look like HU and were imported with --trust_hu: c0" in text
    for path in (tmp_path / "out" / "data").glob("*.h5"):  # as imported before there was such a check
        with h5py.File(path, "a") as file:
            del file.attrs["hu"]
    text = run(*check, fails=True)
    assert "WRONG, 3 times: c" in text and "was not in HU when it was imported" in text and "--trust_hu" in text


@pytest.mark.parametrize("name", HU)
def test_the_doctor_takes_hu(name):
    image = (np.clip(HU[name](), -125, 275) + 125) / 400
    assert prepared_fault(image.astype(np.float32)) == ""


@pytest.mark.parametrize("name", ["plus 1024", "plus 1000", "scaled to [-1, 1]", "scaled to [0, 1]", "z-scored"])
def test_the_doctor_finds_no_hu(name):
    image = (np.clip(NO_HU[name](), -125, 275) + 125) / 400
    assert prepared_fault(image.astype(np.float32))
