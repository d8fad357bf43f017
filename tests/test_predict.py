"""Prediction of whole folders: nothing ends a batch, one geometry for every reader, rows that stay, label numbers."""

import csv
import dataclasses
import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from test_dicom import change
from test_raw import run
from test_scans import affine_of, picture, write_dicom, write_nifti

from dataloaders.scans.preprocessing import Preprocessing
from dataloaders.scans.reading import Scan, read_scan
from dataloaders.scans.results import is_sheared, nifti_like, read_volumes, upright, write_volumes
from sdcl.networks import build_network
from sdcl.runs.errors import UserError

TILTED = (1, 0, 0, 0, 0.965926, 0.258819)  # a gantry's, by 15 degrees


def make_run(folder, normalise="zscore", **task):
    """Write a run of untrained 2D networks, two structures."""
    how = Preprocessing(normalise, layout="slices")
    content = {
        "config": {
            "student_a": "unet", "student_b": "resunet", "select": "last", "labelnum": 1, "patch_size": [32, 32],
        },
        "task": {
            "name": "mine", "class_names": ["heart", "liver, left"], "decision_rule": "argmax",
            "preprocessing": dataclasses.asdict(how), "trained_on_crops": False,
        } | task,
    }  # fmt: skip
    torch.manual_seed(0)
    networks = {f"student_{k}": build_network(name, 3).state_dict() for k, name in (("a", "unet"), ("b", "resunet"))}
    (folder / "self_train").mkdir(parents=True)
    torch.save({"networks": networks}, folder / "self_train" / "last.pth")
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def trained(scratch):
    return make_run(scratch / "run")


def predicted(trained, scans, out, *flags, fails=False):
    return run("predict.py", "--run", trained, "--input", scans, "--output", out, *flags, fails=fails)


def rows(out):
    with open(out / "volumes.csv", newline="") as file:
        return list(csv.DictReader(file))


def places(path):
    """Return where nibabel and SimpleITK see an image's corners and a voxel inside, in mm, RAS+."""
    image, itk = nibabel.load(path), sitk.ReadImage(str(path))
    last = [side - 1 for side in image.shape[:3]]
    voxels = [(0, 0, 0), (last[0], 0, 0), (0, last[1], 0), (0, 0, last[2]), tuple(last), (3, 2, 1)]
    ours = nibabel.affines.apply_affine(image.affine, voxels)
    theirs = np.array([itk.TransformIndexToPhysicalPoint([int(v) for v in voxel]) for voxel in voxels]) * (-1, -1, 1)
    return ours, theirs


def test_no_failure_ends_a_batch(trained, tmp_path, monkeypatch):
    for name in ("a", "b", "c", "d"):
        write_dicom(tmp_path / "scans" / name, picture())
    for path in (tmp_path / "scans" / "b").iterdir():
        change(path, SamplesPerPixel=3, PhotometricInterpretation="RGB")
    import dataloaders.scans.prediction as prediction

    prepare = prediction.prepare_channels

    def failing(channels, *rest, **named):
        if channels[0].path.name == "c":
            raise RuntimeError("a library's own\nreason")
        return prepare(channels, *rest, **named)

    monkeypatch.setattr(prediction, "prepare_channels", failing)
    text = predicted(trained, tmp_path / "scans", tmp_path / "out", fails=True)
    assert "b/000.dcm holds colours" in text and "c: RuntimeError: a library's own" in text
    assert text.endswith("give the series that it was made from.") and "2 of 4 scans were refused, the first:" in text
    assert [row["scan"] for row in rows(tmp_path / "out")] == ["a", "a", "d", "d"]
    monkeypatch.setattr(prediction, "prepare_channels", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        predicted(trained, tmp_path / "scans", tmp_path / "out")


def test_a_tilted_gantry_has_one_geometry(trained, tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (12, 40, 20)).astype(np.int16)
    write_dicom(tmp_path / "ct", array, direction=TILTED)
    assert "resampled onto an upright grid" in predicted(trained, tmp_path / "ct", tmp_path / "out")
    ours, theirs = places(tmp_path / "out" / "ct_prediction.nii.gz")
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert abs(ours[3][1] - 40) < 1e-3  # the last slice's first voxel
    image = nibabel.load(tmp_path / "out" / "ct_prediction.nii.gz")
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)


def test_upright_keeps_every_structure_in_its_place(tmp_path):
    array = np.zeros((30, 40, 30), np.int16)
    array[10:20, 12:28, 8:20] = 100
    scan = read_scan(write_dicom(tmp_path / "ct", array, direction=TILTED))
    turned, inside = upright(scan)
    assert is_sheared(scan) and not is_sheared(turned) and inside.any() and not inside.all()
    centres = []
    for each in (scan, turned):
        weights = each.array - each.array.min()
        index = [
            np.average(np.arange(n), weights=weights.sum(tuple({0, 1, 2} - {k}))) for k, n in enumerate(weights.shape)
        ]
        centres.append(nibabel.affines.apply_affine(each.affine, index))
        volume = weights.sum() * abs(np.linalg.det(each.affine[:3, :3]))
        assert volume == pytest.approx(100 * 10 * 16 * 12 * 0.8 * 0.8 * 2 * 0.965926, rel=0.02)
    np.testing.assert_allclose(*centres, atol=0.1)


@pytest.mark.parametrize("qform, sform", [(1, 2), (2, 1), (1, 0), (0, 1), (0, 0)])
def test_what_is_written_has_one_geometry(tmp_path, qform, sform):
    image = nibabel.Nifti1Image(picture(), affine_of("LAS", turn=0.2))
    image.set_sform(affine_of("LAS", turn=0.2), sform)
    image.set_qform(affine_of("LAS", turn=0.3), qform)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    nibabel.save(nifti_like(scan, np.ones(scan.array.shape, np.uint8)), tmp_path / "out.nii.gz")
    ours, theirs = places(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    np.testing.assert_allclose(nibabel.load(tmp_path / "out.nii.gz").affine, scan.affine, atol=1e-5)


@pytest.mark.parametrize("shear, code", [(0.005, 2), (0.3, 0)])
def test_a_qform_says_no_shear(tmp_path, shear, code):
    affine = affine_of()
    affine[1, 2] += shear * 3
    scan = read_scan(write_nifti(tmp_path / "scan", picture(), affine))
    image = nifti_like(scan, np.ones(scan.array.shape, np.uint8))
    assert image.header["qform_code"] == code
    if code:
        nibabel.save(image, tmp_path / "out.nii.gz")
        ours, theirs = places(tmp_path / "out.nii.gz")
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    else:
        np.testing.assert_allclose(image.get_sform(), affine)


def test_what_is_written_is_in_millimetres(tmp_path):
    image = nibabel.Nifti1Image(picture(), affine_of(spacing=(25, 25, 25)))
    image.header.set_xyzt_units("micron", "sec")
    nibabel.save(image, tmp_path / "mouse.nii.gz")
    scan = read_scan(tmp_path / "mouse.nii.gz")
    out = nifti_like(scan, np.ones(scan.array.shape, np.uint8))
    assert out.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(out.header.get_zooms(), 0.025)
    np.testing.assert_allclose(out.affine, scan.affine, rtol=1e-5)


def test_rows_of_earlier_predictions_stay(trained, tmp_path):
    out = tmp_path / "out"
    for name in ("a", "b [1], x"):
        write_nifti(tmp_path / name / name, picture())
        text = predicted(trained, tmp_path / name / f"{name}.nii.gz", out)
    assert "2 rows of other scans stay in volumes.csv" in text
    assert [row["scan"] for row in rows(out)] == ["a", "a", "b [1], x", "b [1], x"]
    before = (out / "volumes.csv").read_text()
    assert "replaced" not in text
    again = predicted(trained, tmp_path / "a" / "a.nii.gz", out)
    assert "; a_prediction.nii.gz was there and is replaced" in again
    assert sorted((out / "volumes.csv").read_text().splitlines()) == sorted(before.splitlines())


def test_a_table_says_whose_the_volumes_are(trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "volumes.csv").write_text("scan,structure,volume_ml,voxels\nolder,heart,1,2\n")
    scan = write_nifti(tmp_path / "scans" / "a", picture())
    predicted(trained, scan, out)
    path = trained / "self_train" / "last.pth"
    assert [row["weights"] for row in rows(out)] == ["", *[f"mean of {path}"] * 2]
    predicted(trained, scan, out, "--predictor", "student_a")
    assert [row["weights"] for row in rows(out)] == ["", *[f"student_a of {path}"] * 2]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00", b'scan,structure,volume_ml,voxels\n"x,1', b""])
def test_a_foreign_table_is_refused(tmp_path, content):
    path = tmp_path / "volumes.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no table of volumes that predict.py wrote"):
        read_volumes(path)
    assert path.read_bytes() == content
    path.unlink()
    row = {"scan": 'say "x", 10:30 ', "structure": "a", "volume_ml": 1.25, "voxels": 3, "weights": "mean of a.pth"}
    assert write_volumes(path, [], [row]) == 0
    assert read_volumes(path) == [{key: str(value) for key, value in row.items()}]


@pytest.mark.parametrize("name", ["scan [1]", "a, b", 'say "x"', "10:30", "ends ", "$x_{$"])
def test_odd_names_are_predicted(trained, tmp_path, name):
    write_nifti(tmp_path / "scans" / name, picture())
    text = predicted(trained, tmp_path / "scans", tmp_path / "out")
    assert "could not be drawn" not in text and (tmp_path / "out" / f"{name}_figure.png").exists()
    assert (tmp_path / "out" / f"{name}_prediction.nii.gz").exists() and rows(tmp_path / "out")[0]["scan"] == name


@pytest.mark.parametrize("values, dtype", [([5, 7], np.uint8), ([5, 1042], np.uint16)])
def test_predictions_hold_the_label_files_numbers(tmp_path, values, dtype):
    trained = make_run(tmp_path / "run", label_values=values)
    write_nifti(tmp_path / "scans" / "a", picture((40, 40, 8)))
    predicted(trained, tmp_path / "scans", tmp_path / "out", "--no-save-figure")
    image = nibabel.load(tmp_path / "out" / "a_prediction.nii.gz")
    found, counts = np.unique(np.asarray(image.dataobj), return_counts=True)
    assert image.get_data_dtype() == dtype and set(found) <= {0, *values} and set(found) & set(values)
    expected = {int(row["voxels"]) for row in rows(tmp_path / "out")} - {0}
    assert expected == {int(n) for value, n in zip(found, counts, strict=True) if value}


@pytest.mark.parametrize("values", [[5], [5, 5], [0, 1], ["a", 2], 7])
def test_wrong_label_values_are_refused(tmp_path, values):
    trained = make_run(tmp_path / "run", label_values=values)
    write_nifti(tmp_path / "a", picture())
    assert "lacks what prediction needs" in predicted(trained, tmp_path / "a.nii.gz", tmp_path / "out", fails=True)


def test_soft_tissue_alone_is_trusted_when_told(tmp_path):
    trained = make_run(tmp_path / "run", "ct")
    write_nifti(tmp_path / "liver", (picture() % 120).astype(np.int16))
    text = predicted(trained, tmp_path / "liver.nii.gz", tmp_path / "out", fails=True)
    assert "is no CT in HU" in text and text.endswith("--trust_hu.")
    predicted(trained, tmp_path / "liver.nii.gz", tmp_path / "out", "--trust_hu")
    assert rows(tmp_path / "out")[0]["scan"] == "liver"


def test_pixel_spacing_from_the_command_line(trained, tmp_path):
    folder = write_dicom(tmp_path / "ct", picture())
    for path in folder.iterdir():
        change(path, PixelSpacing=None)
    text = predicted(trained, folder, tmp_path / "out", fails=True)
    assert "has no PixelSpacing" in text and "--pixel_spacing_mm" in text and not (tmp_path / "out").exists()
    predicted(trained, folder, tmp_path / "out", "--pixel_spacing_mm", 0.7, 0.6)
    image = nibabel.load(tmp_path / "out" / "ct_prediction.nii.gz")
    np.testing.assert_allclose(image.header.get_zooms(), (0.6, 0.7, 2), rtol=1e-5)


def test_a_run_says_what_it_does_not_fix(trained, tmp_path):
    write_nifti(tmp_path / "a", picture())
    how = dataclasses.asdict(Preprocessing("zscore", orientation=None, layout="slices"))
    other = make_run(tmp_path / "run", preprocessing=how)
    text = predicted(other, tmp_path / "a.nii.gz", tmp_path / "out")
    assert "NOTE: this run's files kept the axes" in text and "NOTE: this run fixes no slicing axis" in text
    assert "kept the axes" not in predicted(trained, tmp_path / "a.nii.gz", tmp_path / "out")


def test_scans_are_scans_of_their_own_grid():
    scan = Scan(None, picture(), affine_of("RAS"))
    assert not is_sheared(scan) and nifti_like(scan, picture().astype(np.uint8)).header["qform_code"] == 1
