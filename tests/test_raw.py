"""From raw scans to HDF5 and back onto the scan: preprocessing, alignment, prediction, own data."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from helpers import ROOT, in_slabs, segment
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_3d import load
from test_scans import ORIENTATIONS, affine_of, write_dicom, write_nifti

from dataloaders.files import read_affine, read_list
from dataloaders.phantom import write_nifti as write_nifti_phantom
from dataloaders.scans.alignment import FLIPS, border_contrast, check_alignment, measure_alignment
from dataloaders.scans.joining import join
from dataloaders.scans.prediction import box_on_grid, check_roi, planes_on_scan
from dataloaders.scans.preprocessing import (
    Prepared,
    Preprocessing,
    at_least,
    label_box,
    prepare,
    prepare_label,
    with_margins,
)
from dataloaders.scans.reading import Scan
from sdcl.runs.config import parse
from sdcl.runs.errors import UserError

CT = Preprocessing("ct", spacing_mm=(1.0, 1.0, 1.0))


def run(script, *arguments, fails=False):
    """Run a script's main in this process and return what it says, its refusal last."""
    module, said = load(script), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            module.main(parse(module.Config, [str(a) for a in arguments]))
    except UserError as error:
        assert fails, error
        return f"{said.getvalue()}{error}"
    assert not fails, said.getvalue()
    return said.getvalue()


def smooth(shape, seed=0, sigma=2.0):
    """A smooth random picture in [0, 1]."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma, mode="wrap")
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


def abdomen(shape=(64, 60, 40), seed=0):
    """A CT in HU with one organ off its middle on a background of fat, and its label."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(0, 1, side) for side in shape], indexing="ij")
    organ = ((x - 0.35) / 0.16) ** 2 + ((y - 0.6) / 0.12) ** 2 + ((z - 0.42) / 0.2) ** 2 < 1
    image = np.where(organ, 80, -90) + rng.normal(0, 10, shape)
    image[:4] = -1000  # air
    image[-6:, :5] = 600  # bone
    return image.astype(np.float32), organ.astype(np.uint8)


# --- geometry ---


def test_resampling_to_one_millimetre_keeps_the_scans_centre():
    scan = Scan(None, smooth((20, 24, 10)), affine_of("LPS", spacing=(0.5, 0.5, 3.0)))
    done = prepare(scan, Preprocessing("minmax", spacing_mm=(1.0, 1.0, 1.0)))
    assert done.array.shape == (10, 12, 30)
    np.testing.assert_allclose(np.linalg.norm(done.affine[:3, :3], axis=0), 1)
    centres = [
        a @ np.append((np.array(s) - 1) / 2, 1)
        for a, s in ((scan.affine, scan.array.shape), (done.affine, (10, 12, 30)))
    ]
    np.testing.assert_allclose(*centres, atol=1e-9)


def test_the_published_spacing_takes_the_pixels_for_the_slices():
    scan = Scan(None, smooth((20, 24, 10)), affine_of("LPS", spacing=(0.5, 0.5, 3.0)))
    how = Preprocessing("minmax", spacing_mm=(1.0, 1.0, 1.0), trust_slice_spacing=False)
    assert prepare(scan, how).array.shape == (10, 12, 5)
    thin = Scan(None, smooth((20, 24, 10)), affine_of("LPS", spacing=(0.8, 0.8, 0.5)))
    assert prepare(thin, how).array.shape == (16, 19, 8)


def test_slices_lie_across_the_longest_side():
    how = Preprocessing("minmax", orientation=None, layout="slices")
    assert prepare(Scan(None, smooth((5, 7, 3)), affine_of(spacing=(1, 1, 8))), how).array.shape == (3, 7, 5)
    assert prepare(Scan(None, smooth((3, 7, 5)), affine_of(spacing=(8, 1, 1))), how).array.shape == (3, 5, 7)
    assert prepare(Scan(None, smooth((5, 6, 7)), affine_of(spacing=(1, 1, 1))), how).array.shape == (7, 6, 5)


def test_ranges():
    scan = Scan(None, np.linspace(-1000, 1000, 60).reshape(3, 4, 5).astype(np.float32), affine_of())
    zscore, minmax, ct = (prepare(scan, Preprocessing(how)).array for how in ("zscore", "minmax", "ct"))
    assert abs(zscore.mean()) < 1e-6 and abs(zscore.std() - 1) < 1e-6
    assert (minmax.min(), minmax.max()) == (0, 1)
    hu = scan.oriented("LPS").array
    np.testing.assert_allclose(ct, (np.clip(hu, -125, 275) + 125) / 400, atol=1e-6)
    with pytest.raises(UserError, match="is no CT in HU: it reaches from 0 to"):
        prepare(Scan("mri.nii", scan.array - scan.array.min(), affine_of()), Preprocessing("ct"))


def test_boxes_by_hand():
    label = np.zeros((20, 20, 20), np.uint8)
    label[5:8, 17:20, 9] = 1
    box = label_box(label)
    assert box == ((5, 8), (17, 20), (9, 10))
    assert with_margins(box, [(2, 3), (1, 4), (0, 0)], label.shape) == ((3, 11), (16, 20), (9, 10))
    assert at_least(box, (4, 8, 30), label.shape) == ((5, 9), (12, 20), (0, 20))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ORIENTATIONS), st.sampled_from(["LPS", "RAS", None]),
       st.tuples(*[st.floats(0.6, 2.5)] * 3), st.sampled_from([None, (1.0, 1.0, 1.0), (1.3, 0.9, 2.0)]),
       st.floats(-0.4, 0.4), st.sampled_from(["volume", "slices"]))  # fmt: skip
def test_a_prediction_lies_on_its_scan(codes, training, spacing, resampled, turn, layout):
    """A network that thresholds voxels gives the scan's own thresholded voxels, to within the resampling."""
    scan = Scan(None, smooth((22, 26, 18), sigma=4), affine_of(codes, spacing, turn=turn))
    how = Preprocessing("minmax", training, resampled, layout=layout)

    def infer(networks, volume):
        p = 1 / (1 + np.exp(-40 * (volume - 0.5)))
        return [np.stack([1 - p, p]).astype(np.float32)]

    probabilities = segment([scan], how, in_slabs(infer), [])
    assert probabilities.shape == (2, *scan.array.shape)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    found = probabilities[1] > 0.5
    if resampled is None:
        np.testing.assert_array_equal(found, scan.array > 0.5)
    else:
        inner = (slice(3, -3),) * 3  # beyond the grid's rim there is nothing to interpolate
        clear = np.abs(scan.array - 0.5)[inner] > 0.12
        assert clear.mean() > 0.3
        np.testing.assert_array_equal(found[inner][clear], (scan.array > 0.5)[inner][clear])


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_roi_is_background_outside(codes):
    scan = Scan("scan.nii", smooth((22, 26, 18)), affine_of(codes, (1.0, 1.5, 2.0)))
    how = Preprocessing("zscore", "LPS", (1.0, 1.0, 1.0))
    seen = []

    def infer(networks, volume):
        seen.append(volume.shape)
        return [np.stack([np.zeros_like(volume), np.ones_like(volume)])]

    box = check_roi((4, 12, 6, 18, 2, 16), scan)
    found = segment([scan], how, in_slabs(infer), [], box)[1] > 0.5
    expected = np.zeros(scan.array.shape, bool)
    expected[4:12, 6:18, 2:16] = True
    assert found[expected].all() and not found[~ndimage.binary_dilation(expected, iterations=2)].any()
    assert sorted(seen[0]) == sorted((8, 18, 28))
    assert box_on_grid(box, scan, scan.affine, scan.array.shape) == box
    with pytest.raises(UserError, match="--roi 4 12 5 17 2 19 does not lie in scan.nii"):
        check_roi((4, 12, 5, 17, 2, 19), scan)


# --- alignment ---


@pytest.mark.parametrize("flip", FLIPS[1:])
def test_a_flipped_label_is_refused_with_the_flip_that_fits(flip):
    image, label = abdomen()
    assert not measure_alignment(image, label).is_suspect
    names = ", ".join("xyz"[axis] for axis in flip)
    with pytest.raises(UserError, match=f"label.nii does not seem to lie on its image.* along {names} it would fit"):
        check_alignment("label.nii", image, np.flip(label, flip), is_organ_ct=True, way_out="say so")


def test_a_label_in_fat_is_refused():
    image, label = abdomen()
    lung = np.where(label, image - 190, image)  # a structure of fat
    with pytest.raises(UserError, match="does not lie on soft tissue"):
        check_alignment("label.nii", lung, label, is_organ_ct=True, way_out="say so")


def test_contrast_by_hand():
    image = np.zeros((1, 1, 6))
    image[0, 0] = [0, 0, 10, 12, 0, 0]
    mask = np.zeros((1, 1, 6), bool)
    mask[0, 0, 2:4] = True
    assert border_contrast(image, mask) == pytest.approx(11 / 2)  # (10 + 12) / 2 across, 2 within


# --- the scripts ---


def attributes(path):
    with h5py.File(path, "r") as file:
        return dict(file.attrs), file["image"][()], file["label"][()]


def test_pancreas_from_dicom(tmp_path):
    image, label = abdomen()
    for number in (1, 3, 25):
        folder = write_dicom(
            tmp_path / "ct" / f"PANCREAS_{number:04d}" / "study", image.round(), spacing=(1.0, 1.0, 2.0)
        )
    affine = affine_of("LPS", (1.0, 1.0, 2.0), (50, 40, 0))
    for number in (1, 3, 25):  # the label's axes point elsewhere, as the collection's do
        turned = Scan(None, label if number != 3 else np.flip(label, 1), affine).oriented("LAS")
        write_nifti(tmp_path / "labels" / f"label{number:04d}", turned.array, turned.affine)
    flags = ("--images", tmp_path / "ct", "--labels", tmp_path / "labels", "--root_path", tmp_path / "out")
    text = run("../dataloaders/preprocess_pancreas.py", *flags, fails=True)
    assert "left out PANCREAS_0025: duplicates" in text and "1 of 2 cases were refused" in text
    assert (
        "label0003.nii.gz does not seem to lie" in text
        and "along y it would fit" in text
        and "--trust data0003" in text
    )
    assert sorted(p.name for p in (tmp_path / "out" / "data").glob("*.*[5v]")) == ["cases.csv", "data0001.h5"]
    assert "data0001,PANCREAS_0001,label0001.nii.gz" in (tmp_path / "out" / "data" / "cases.csv").read_text()
    facts, array, mask = attributes(tmp_path / "out" / "data" / "data0001.h5")
    assert array.shape == mask.shape == (64, 60, 80) and facts["rule"] == "header" and facts["alignment"] == "checked"
    np.testing.assert_allclose(facts["spacing"], 1)
    assert abs(facts["label_mean_hu"] - 80) < 3 and abs((array[mask > 0].mean() * 400 - 125) - 80) < 8
    before = (tmp_path / "out" / "data" / "data0001.h5").stat().st_mtime_ns
    text = run("../dataloaders/preprocess_pancreas.py", *flags, "--trust", "data0003")
    assert "1 of 2 cases are there already" in text and (tmp_path / "out" / "data" / "data0003.h5").exists()
    assert (tmp_path / "out" / "data" / "data0001.h5").stat().st_mtime_ns == before
    published = ("--rule", "published", "--overwrite", "--trust", "all")
    run("../dataloaders/preprocess_pancreas.py", *flags, *published)
    facts, array, _ = attributes(tmp_path / "out" / "data" / "data0001.h5")
    assert facts["rule"] == "published" and array.shape[2] == 40 and facts["alignment"] == "trusted"
    one = (
        "--images",
        folder.parent.parent / "one",
        "--labels",
        tmp_path / "labels",
        "--root_path",
        tmp_path / "single",
    )
    shutil.copytree(tmp_path / "ct" / "PANCREAS_0001", tmp_path / "ct" / "one" / "PANCREAS_0001")
    assert "1 cases converted" in run("../dataloaders/preprocess_pancreas.py", *one)


def test_la_from_nrrd(tmp_path):
    rng = np.random.default_rng(0)
    for name, side in (("CASE1", 150), ("CASE2", 90)):
        (tmp_path / "raw" / name).mkdir(parents=True)
        image, label = rng.integers(0, 255, (side, 140, 20)), np.zeros((side, 140, 20), np.uint8)
        label[40:60, 50:90, 5:15] = 255
        for file, array in (("lgemri", image), ("laendo", label)):
            itk = sitk.GetImageFromArray(array.astype(np.uint8).T)
            itk.SetSpacing((0.625, 0.625, 0.625))
            sitk.WriteImage(itk, str(tmp_path / "raw" / name / f"{file}.nrrd"), True)
    run("../dataloaders/preprocess_la.py", "--raw", tmp_path / "raw", "--root_path", tmp_path / "la")
    facts, array, mask = attributes(tmp_path / "la/data/2018LA_Seg_Training Set/CASE1/mri_norm2.h5")
    assert mask.sum() == 20 * 40 * 10 and mask.max() == 1
    x, y, z = facts["crop_box"].reshape(3, 2)
    assert tuple(z) == (0, 20) and 122 <= x[1] - x[0] <= 150 and 132 <= y[1] - y[0] <= 140
    raw = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "raw/CASE1/lgemri.nrrd"))).T.astype(float)
    expected = ((raw - raw.mean()) / raw.std())[x[0] : x[1], y[0] : y[1]]
    np.testing.assert_allclose(array, expected, atol=1e-5)
    affine = read_affine(tmp_path / "la/data/2018LA_Seg_Training Set/CASE1/mri_norm2.h5")
    np.testing.assert_allclose(affine[:3, 3], (-0.625 * x[0], -0.625 * y[0], 0), atol=1e-6)
    assert attributes(tmp_path / "la/data/2018LA_Seg_Training Set/CASE2/mri_norm2.h5")[1].shape[0] == 90
    shutil.copytree(tmp_path / "raw" / "CASE1", tmp_path / "raw" / "CASE3")
    (tmp_path / "raw" / "CASE3" / "lgemri.nrrd").unlink()
    (tmp_path / "raw" / "CASE2" / "laendo.nrrd").unlink()
    text = run(
        "../dataloaders/preprocess_la.py", "--raw", tmp_path / "raw", "--root_path", tmp_path / "new", fails=True
    )
    assert "laendo.nrrd does not exist" in text and "1 of 2 cases were refused" in text
    assert "labels without a scan (lgemri), left out: CASE3" in text


def test_acdc_from_nifti(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "raw" / "training" / "patient007"
    affine = affine_of("LPS", (1.5, 1.5, 10.0))  # as the challenge's files lie: nothing is turned
    images = {frame: rng.integers(0, 900, (24, 20, 4)).astype(np.int16) for frame in (11, 4)}
    for frame, image in images.items():
        label = np.digitize(smooth((24, 20, 4), frame), (0.4, 0.5, 0.6)).astype(np.uint8)
        write_nifti(folder / f"patient007_frame{frame:02d}", image, affine)
        write_nifti(folder / f"patient007_frame{frame:02d}_gt", label, affine)
    (folder / "Info.cfg").write_text("ED: 11\nES: 4\nGroup: DCM\n")  # the end-diastole comes second here
    systole = folder / next(path.name for path in folder.iterdir() if path.name.startswith("patient007_frame04.nii"))
    kept = systole.rename(tmp_path / systole.name)
    text = run(
        "../dataloaders/preprocess_acdc.py", "--raw", tmp_path / "raw", "--root_path", tmp_path / "x", fails=True
    )
    assert "lacks patient007_frame04, which its Info.cfg names: copy it" in text and not (tmp_path / "x").exists()
    kept.rename(systole)
    write_nifti(folder / "patient007_frame09_gt", label, affine)
    text = run("../dataloaders/preprocess_acdc.py", "--raw", tmp_path / "raw", "--root_path", tmp_path / "acdc")
    assert "labels without a frame, left out: patient007_frame09_gt.nii" in text and "no Info.cfg" not in text
    for name, frame in (("patient007_frame01", 11), ("patient007_frame02", 4)):
        facts, array, mask = attributes(tmp_path / "acdc" / "data" / f"{name}.h5")
        raw = images[frame].T.astype(float)
        np.testing.assert_allclose(array, (raw - raw.min()) / np.ptp(raw), atol=1e-6)
        np.testing.assert_allclose(facts["spacing"], (10, 1.5, 1.5))
        assert set(np.unique(mask)) == {0, 1, 2, 3}
        for k in range(4):
            _, picture, structures = attributes(tmp_path / "acdc" / "data" / "slices" / f"{name}_slice_{k + 1}.h5")
            np.testing.assert_array_equal(picture, array[k])
            np.testing.assert_array_equal(structures, mask[k])


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_conversion_leaves_nothing_half_written(tmp_path, kill):
    image, label = abdomen((96, 96, 60))
    for number in range(1, 9):
        write_nifti(tmp_path / "images" / f"c{number}", image)
        write_nifti(tmp_path / "labels" / f"c{number}", label)
    flags = ["--images", tmp_path / "images", "--labels", tmp_path / "labels", "--output", tmp_path / "out"]
    flags += ["--normalise", "ct", "--workers", "1"]
    command = [sys.executable, ROOT / "dataloaders/import_nifti.py", *flags]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    data = tmp_path / "out" / "data"
    deadline = time.time() + 120
    while not (data.exists() and any(data.glob("c*.h5"))) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(kill)
    assert process.wait(60) == (-kill if kill == signal.SIGKILL else 128 + kill)
    finished = sorted(data.glob("c*.h5"))
    assert 0 < len(finished) < 8
    for path in finished:
        assert attributes(path)[1].shape == (96, 96, 60)
    text = run("../dataloaders/import_nifti.py", *flags)
    assert f"{len(finished)} of 8 cases are there already" in text
    assert sorted(p.name for p in data.glob("*.h5")) == [f"c{k}.h5" for k in range(1, 9)]
    assert not list(data.glob("~*"))


# --- own data, from NIfTI to NIfTI ---


@pytest.fixture(scope="module")
def own(scratch):
    """A phantom set as NIfTI, its import in 3D and 2D."""
    folder = scratch
    write_nifti_phantom(folder / "raw", cases=7, labelled_cases=5, size=(40, 36, 32))
    flags = ("--images", folder / "raw" / "images", "--labels", folder / "raw" / "labels", "--class_names", "atrium")
    run("../dataloaders/import_nifti.py", *flags, "--output", folder / "mine", "--normalise", "zscore")
    slices = ("--layout", "slices", "--val_fraction", "0.2", "--spacing_mm", "1.5", "1.5", "3")
    run("../dataloaders/import_nifti.py", *flags, "--output", folder / "flat", "--normalise", "minmax", *slices)
    return folder


def test_import_writes_lists_and_classes(own):
    lists = own / "mine" / "data_split"
    train, labelled = read_list(lists / "train.txt"), read_list(lists / "train_lab.txt")
    assert train[: len(labelled)] == labelled and len(labelled) == 4 and train[4:] == ["case_06", "case_07"]
    assert read_list(lists / "test.txt") and not (lists / "val.txt").exists()
    assert json.loads((own / "mine" / "dataset.json").read_text())["class_names"] == ["atrium"]
    with h5py.File(own / "mine" / "data" / "case_07.h5", "r") as file:
        assert "label" not in file and file.attrs["rule"] == "import_nifti"
    assert len(read_list(own / "flat" / "data_split" / "val.list")) == 1
    assert all("_slice_" in name for name in read_list(own / "flat" / "data_split" / "train_slices.list"))


@pytest.mark.parametrize(
    "name, size, n",
    [
        pytest.param("mine", ("32", "16", "16"), 4, id="3D"),
        pytest.param("flat", ("32", "32"), 3, id="2D", marks=pytest.mark.slow),
    ],
)
def test_own_data_from_training_to_a_prediction_on_the_scan(own, tmp_path, name, size, n):
    where = ("--root_path", own / name, "--models_path", tmp_path / "models")
    tiny = (
        "--pre_iterations",
        2,
        "--self_iterations",
        2,
        "--batch_size",
        2,
        "--pre_val_every",
        0,
        "--self_val_every",
        0,
    )
    run("own_train.py", *where, *tiny, "--patch_size", *size)
    folder = tmp_path / "models" / f"{name}_SDCL_{n}_labeled"
    assert "atrium" in run("test_own.py", *where, "--save_nifti")
    if name == "flat":
        assert "flat is a 2D data set: --spacing" in run("test_own.py", *where, "--spacing", 1, 1, 1, fails=True)
    root = shutil.copytree(own / name, tmp_path / name)
    train, test = (next((root / "data_split").glob(f"{part}.*")) for part in ("train", "test"))
    test.write_text("\n".join(read_list(train)[:n]))
    assert f"the run was TRAINED on {n} of these cases" in run("test_own.py", *where[2:], "--root_path", root)
    exported = next((folder / "test" / "self_train_test" / "nifti").glob("*_image.nii.gz"))
    raw = nibabel.load(own / "raw" / "images" / exported.name.replace("_image", ""))
    if name == "mine":  # not resampled: the exported image lies on the raw scan, voxel on voxel
        there = nibabel.as_closest_canonical(nibabel.load(exported)), nibabel.as_closest_canonical(raw)
        np.testing.assert_allclose(there[0].affine, there[1].affine, atol=1e-4)
        assert np.corrcoef(there[0].get_fdata().ravel(), there[1].get_fdata().ravel())[0, 1] > 0.9999
    source = own / "raw" / "images" / "case_06.nii.gz"
    turned = Scan(None, nibabel.load(source).get_fdata().astype(np.int16), nibabel.load(source).affine).oriented("PSR")
    write_nifti(tmp_path / "scans" / "turned", turned.array[..., None] + 0, turned.affine)
    shutil.copy(source, tmp_path / "scans" / "plain.nii.gz")
    text = run("predict.py", "--run", folder, "--input", tmp_path / "scans", "--output", tmp_path / "out",
               "--save_probability")  # fmt: skip
    assert "plain: atrium" in text and "ml" in text
    found = {n: nibabel.load(tmp_path / "out" / f"{n}_prediction.nii.gz") for n in ("plain", "turned")}
    for n, image in found.items():
        scan = nibabel.load(tmp_path / "scans" / f"{n}.nii.gz")
        assert image.shape == scan.shape[:3] and image.get_data_dtype() == np.uint8
        np.testing.assert_allclose(image.affine, scan.affine)
        assert image.header["sform_code"] == scan.header["sform_code"]
        assert (tmp_path / "out" / f"{n}_figure.png").stat().st_size > 5000
    rows = (tmp_path / "out" / "volumes.csv").read_text().splitlines()
    assert rows[0] == "scan,structure,volume_ml,voxels,weights" and len(rows) == 3


def test_the_doctor_finds_nothing_wrong_and_then_everything(own, tmp_path):
    root = shutil.copytree(own / "mine", tmp_path / "mine")
    flags = ("--dataset", "own", "--root_path", root, "--figure", tmp_path / "look.png")
    text = run("../dataloaders/check.py", *flags)
    assert "nothing is wrong: 7 files" in text and (tmp_path / "look.png").stat().st_size > 5000
    labelled, test = (read_list(root / "data_split" / f"{n}.txt") for n in ("train_lab", "test"))
    shutil.copy(root / "data" / f"{test[0]}.h5", root / "data" / "case_06.h5")
    with h5py.File(root / "data" / f"{labelled[0]}.h5", "a") as file:
        file["label"][...] = 0
    with h5py.File(root / "data" / f"{labelled[1]}.h5", "a") as file:
        file["image"][0, 0, 0] = np.nan
    (root / "data" / f"{labelled[2]}.h5").unlink()
    text = run("../dataloaders/check.py", *flags, fails=True)
    for part in (
        f"1 labelled cases have no foreground (healthy) and count as such: {labelled[0]}",
        f"{labelled[1]}.h5: `image` holds nan",
        f"{labelled[2]}.h5 does not exist", "case_06 and", "hold the same image (train and test)", "3 things are wrong",
    ):  # fmt: skip
        assert part in text


def test_import_refusals(own, tmp_path):
    raw = shutil.copytree(own / "raw", tmp_path / "raw")
    flags = (
        "--images",
        raw / "images",
        "--labels",
        raw / "labels",
        "--output",
        tmp_path / "out",
        "--normalise",
        "zscore",
    )
    (raw / "labels" / "case_01.nii.gz").rename(raw / "labels" / "case01.nii.gz")
    text = run("../dataloaders/import_nifti.py", *flags, fails=True)
    assert "case01.nii.gz has no scan of the name case01" in text and "closest is case_01.nii.gz" in text
    (raw / "labels" / "case01.nii.gz").rename(raw / "labels" / "case_01.nii.gz")
    label = nibabel.load(raw / "labels" / "case_02.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image((label.get_fdata() * 4).astype(np.uint8), label.affine), raw / "labels/case_02.nii.gz"
    )
    text = run("../dataloaders/import_nifti.py", *flags, fails=True)
    assert "the labels hold the values [1, 4]" in text and "--label_values 1 4" in text
    assert not (tmp_path / "out").exists()


def test_files_preprocessed_differently_are_refused(own, tmp_path):
    root = shutil.copytree(own / "mine", tmp_path / "mine")
    with h5py.File(root / "data" / "case_06.h5", "a") as file:
        file.attrs["preprocessing"] = Preprocessing("minmax").to_json()
    text = run("own_train.py", "--root_path", root, "--models_path", tmp_path / "models", fails=True)
    assert "were preprocessed differently" in text and not (tmp_path / "models").exists()


def test_prediction_refusals(own, tmp_path):
    scan = own / "raw" / "images" / "case_01.nii.gz"
    text = run("predict.py", "--run", tmp_path, "--input", scan, "--output", tmp_path / "out", fails=True)
    assert "config.json does not exist" in text and not (tmp_path / "out").exists()


def test_labels_follow_their_images():
    image, label = abdomen()
    scan = Scan(None, image, affine_of("RAS", (0.8, 0.8, 2.0)))
    done, mask = prepare(scan, CT), prepare_label(label, scan, CT)
    assert mask.shape == done.array.shape and mask.dtype == np.uint8
    assert abs(done.array[mask > 0].mean() * 400 - 125 - 80) < 12


@pytest.mark.parametrize(
    "changed, words",
    [
        (("--normalise", "minmax"), "is of an import with other preprocessing: give --overwrite"),
        (("--class_names", "heart"), "is of an import with other class_names: give --overwrite"),
        (("--label_values", "0"), "--label_values 0 must be different numbers from 1 to 65535"),
        (("--test_fraction", "0"), "no case of the 5 labelled ones is left for the test: raise --test_fraction"),
        (("--workers", "0"), "--workers is 0: it must be above 0"),
    ],
)
def test_a_second_import_in_another_way_is_refused(own, changed, words):
    before = (own / "mine" / "dataset.json").read_text()
    flags = ("--images", own / "raw" / "images", "--labels", own / "raw" / "labels", "--class_names", "atrium")
    text = run(
        "../dataloaders/import_nifti.py",
        *flags,
        "--output",
        own / "mine",
        "--normalise",
        "zscore",
        *changed,
        fails=True,
    )
    assert words in text and (own / "mine" / "dataset.json").read_text() == before


def test_numbers_are_channels_or_names(own, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        shutil.copy(own / "raw" / folder / "case_01.nii.gz", tmp_path / folder / "case_0000.nii.gz")
        shutil.copy(own / "raw" / folder / "case_02.nii.gz", tmp_path / folder / "case_0001.nii.gz")
    assert set(join(tmp_path / "images", tmp_path / "labels").files) == {"case_0000", "case_0001"}
    (tmp_path / "labels" / "case_0000.nii.gz").rename(tmp_path / "labels" / "case.nii.gz")
    (tmp_path / "labels" / "case_0001.nii.gz").unlink()
    joined = join(tmp_path / "images", tmp_path / "labels")
    assert joined.channels == ("0000", "0001")
    assert [path.name for path in joined.files["case"][0]] == ["case_0000.nii.gz", "case_0001.nii.gz"]
    with pytest.raises(UserError, match="--images and --labels are both"):
        join(tmp_path / "images", tmp_path / "images")


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--patch_size", "32", "32"), "--patch_size has 2 sides, these images are 3D: give 3"),
        (("--student_a", "unet"), "--student_a unet is not for 3D images: choose vnet, resvnet, vnet_lowres"),
    ],
)
def test_a_patch_or_network_of_another_dimension_is_refused(own, tmp_path, flags, words):
    text = run("own_train.py", "--root_path", own / "mine", "--models_path", tmp_path / "m", *flags, fails=True)
    assert words in text and not (tmp_path / "m").exists()


def test_predictions_do_not_go_where_scans_are_read(own, tmp_path):
    scans = own / "raw" / "images"
    text = run("predict.py", "--run", tmp_path, "--input", scans, "--output", scans / "out", fails=True)
    assert "lies in --input, where predictions pass for scans: move it" in text
    assert not (scans / "out").exists()


def test_a_structure_cut_by_the_scans_border_is_not_faded():
    scan = Scan(None, np.zeros((13, 12, 12), np.int16), affine_of("LPS", (1.0, 1.0, 1.0)))
    grid = np.diag([-3.0, -3.0, 3.0, 1.0])
    grid[:3, 3] = (scan.affine @ [1, 1, 1, 1])[:3]  # its first voxel covers the scan's first three
    values = np.full((2, 4, 4, 4), 0.2, np.float32)
    values[1] = 0.8
    found = np.concatenate([placed for _, placed in planes_on_scan(Prepared(values, grid), scan)], axis=1)[1]
    np.testing.assert_allclose(found[:12], 0.8, rtol=1e-6)
    assert (found[12] == 0).all()  # beyond the grid
