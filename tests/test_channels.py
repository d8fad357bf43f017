"""Images of several channels: from raw files over both layouts to predictions; what is missing or askew is refused."""

import json
import shutil
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from test_honest_runs import main
from test_import import TINY
from test_joining import lists, save
from test_raw import run
from torch import nn

from dataloaders.cache import Decoding
from dataloaders.files import read_sample, sample_rng
from dataloaders.import_nifti import Config
from dataloaders.import_nifti import main as import_nifti
from dataloaders.import_nnunet import Config as NnunetConfig
from dataloaders.import_nnunet import main as import_nnunet
from dataloaders.own import read_data_set
from dataloaders.scans.channels import group, numbers_of, read_channels
from dataloaders.scans.joining import read_table
from dataloaders.scans.preprocessing import Preprocessing, prepare, prepare_channels
from dataloaders.scans.reading import read_scan
from dataloaders.slices import Slices
from dataloaders.transforms import Augmentation, Cropping, crop_corner, cropped
from dataloaders.volumes import CroppedVolumes
from sdcl.inference import slice_wise, sliding_window
from sdcl.runs.errors import UserError

AFFINE = np.diag([-1.5, -1.5, 3, 1])


class Difference(nn.Module):
    """Logits (0, the first channel less the last), so that probabilities are known voxel by voxel."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, image):
        difference = (image[:, :1] - image[:, -1:]) * self.one
        return torch.cat([torch.zeros_like(difference), difference], 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- what sees channels ---


def test_windows_and_slices_hold_every_channel_of_their_place():
    volume = np.random.default_rng(0).normal(size=(3, 9, 20, 18)).astype(np.float32)
    expected = sigmoid(volume[0] - volume[2])
    windows = sliding_window([Difference()], volume, (8, 16, 16), (4, 8, 8), 2)[0]
    np.testing.assert_allclose(windows[1], expected, atol=1e-6)
    slices = slice_wise([Difference()], volume, (20, 18), 2, batch_size=4)[0]
    np.testing.assert_allclose(slices[1], expected, atol=1e-6)
    # One channel, with and without its axis.
    one, other = (sliding_window([Difference()], v, (8, 16, 16), (4, 8, 8), 2)[0] for v in (volume[0], volume[:1]))
    np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="need three sides each"):
        sliding_window([Difference()], volume[0, 0], (8, 16, 16), (4, 8, 8), 2)


def write(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
    return path


def test_crops_and_augmentations_take_the_same_place_of_every_channel_and_the_label(tmp_path):
    label = (np.arange(9 * 10 * 11).reshape(9, 10, 11) % 3 == 0).astype(np.uint8)
    image = np.stack([label * 1.0, label + 5.0]).astype(np.float32)
    volumes = CroppedVolumes(
        {"a": write(tmp_path / "a.h5", image=image, label=label)},
        Decoding(2, True, 1, channels=("t1", "t2")), Cropping((6, 6, 6)),
    )  # fmt: skip
    where = crop_corner((9, 10, 11), (6, 6, 6), sample_rng(4))
    crop, target = volumes.sample(0, sample_rng(4))
    assert crop.shape == (2, 6, 6, 6) and crop.dtype == np.float32
    np.testing.assert_array_equal(target, cropped(label, *where, (6, 6, 6)))
    np.testing.assert_array_equal(crop, np.stack([target, target + 5]))
    write(tmp_path / "data" / "c_slice_1.h5", image=image[:, 4], label=label[4])
    slices = Slices(tmp_path, ["c_slice_1"], Decoding(2, True, 1, channels=("t1", "t2")), Augmentation((16, 16)))
    for k in range(8):
        picture, target = slices.sample(0, sample_rng(k))
        assert picture.shape == (2, 16, 16)
        inside = picture[1] > 0  # beyond a rotated slice everything is 0
        np.testing.assert_array_equal(picture[0], target)
        np.testing.assert_array_equal(picture[1][inside], target[inside] + 5)


def test_files_must_have_the_channels_that_the_data_set_has(tmp_path):
    path = write(tmp_path / "a.h5", image=np.random.default_rng(0).random((2, 4, 5, 6)), label=np.zeros((4, 5, 6)))
    sample = read_sample(path, ndim=3, num_classes=2, channels=("t1", "t2"))
    assert sample.image.shape == (2, 4, 5, 6) and sample.shape == sample.label.shape == (4, 5, 6)
    with pytest.raises(UserError, match=r"\(2, 4, 5, 6\), it needs 3 channels \(t1, t2, flair\) before 3 dimensions"):
        read_sample(path, ndim=3, num_classes=2, channels=("t1", "t2", "flair"))
    with pytest.raises(UserError, match="it needs 3 dimensions"):
        read_sample(path, ndim=3, num_classes=2)
    one = write(tmp_path / "b.h5", image=np.random.default_rng(0).random((1, 4, 5, 6)), label=np.zeros((4, 5, 6)))
    assert read_sample(one, ndim=3, num_classes=2).image.shape == (4, 5, 6)
    flat = write(tmp_path / "c.h5", image=np.ones((2, 4, 5, 6)), label=np.zeros((4, 5, 6)))
    with pytest.raises(UserError, match="`image` is 1 everywhere"):
        read_sample(flat, ndim=3, num_classes=2, channels=("t1", "t2"))


# --- preprocessing ---


def test_one_channel_is_said_as_ever_and_several_keep_their_rules():
    text = (
        '{"normalise": "zscore", "orientation": "LPS", "spacing_mm": null, "trust_slice_spacing": true, '
        '"layout": "volume", "slice_axis": null}'
    )
    assert Preprocessing("zscore").to_json() == text and Preprocessing("zscore").rules == ("zscore",)
    for several in (
        Preprocessing("zscore", channels=("t1", "t2")),
        Preprocessing(("ct", "minmax"), channels=("CT", "PET")),
    ):
        assert Preprocessing.from_dict(json.loads(several.to_json())) == several
    assert several.rules == ("ct", "minmax") and several.of_channel(1) == Preprocessing("minmax")
    for wrong in (
        {"normalise": ["ct"]}, {"normalise": []}, {"normalise": ["ct", "zscore"], "channels": ["a"]},
        {"normalise": "ct", "channels": ["a"]}, {"normalise": "ct", "channels": ["a", "a"]},
        {"normalise": ["ct", "none"], "channels": ["a", "b"]}, {"normalise": "ct", "channels": ["a", 2]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="normalise|channels|minmax"):
            Preprocessing.from_dict(wrong)


def test_each_channel_goes_through_its_own_rule(tmp_path):
    paths = [save(tmp_path / f"p_{k}.nii.gz", k) for k in range(2)]
    how = Preprocessing(("zscore", "minmax"), spacing_mm=(2.0, 2.0, 2.0), channels=("a", "b"))
    both = prepare_channels(read_channels(paths), how)
    assert both.array.shape == (2, *both.shape)
    for k, rule in enumerate(("zscore", "minmax")):
        alone = prepare(read_scan(paths[k]), Preprocessing(rule, spacing_mm=(2.0, 2.0, 2.0)))
        np.testing.assert_array_equal(both.array[k], alone.array)
    box = ((1, 5), (0, 4), (2, 6))
    np.testing.assert_array_equal(both.cropped(box).array, both.array[:, 1:5, :4, 2:6])
    with pytest.raises(UserError, match=r"has 1 channels where 2 are needed \(a, b\)"):
        prepare_channels(read_channels(paths[:1]), how)


def test_channels_lie_on_the_first_ones_voxels(tmp_path):
    one, two = save(tmp_path / "p_t1.nii.gz", 1), save(tmp_path / "p_t2.nii.gz", 2)
    turned = nibabel.load(two).as_reoriented([[2, -1], [0, 1], [1, -1]])
    nibabel.save(turned, tmp_path / "q_t2.nii.gz")
    first, second = read_channels([one, two]), read_channels([one, tmp_path / "q_t2.nii.gz"])
    np.testing.assert_array_equal(first[1].array, second[1].array)
    save(tmp_path / "r_t2.nii.gz", 2, affine=AFFINE + np.eye(4, k=3) * 9)
    with pytest.raises(UserError, match=r"r_t2.nii.gz lies up to 9 mm beside .*p_t1.nii.gz"):
        read_channels([one, tmp_path / "r_t2.nii.gz"])


# --- which files make a case ---


def named(*names):
    return {name: Path(name) for name in names}


@pytest.mark.parametrize(
    ("names", "channels", "cases"),
    [
        (("a_t1", "a_t1ce", "b-t1", "b-t1ce"), ("t1", "t1ce"), {"a": ("a_t1", "a_t1ce"), "b": ("b-t1", "b-t1ce")}),
        (("a_t2", "a_t1"), ("t1", "t2"), {"a": ("a_t1", "a_t2")}),
        (("a_0000", "a_0001"), ("t1", "t2"), {"a": ("a_0000", "a_0001")}),  # nnU-Net's files of named channels
        (("x", "y_t1"), (), {"x": ("x",), "y_t1": ("y_t1",)}),
    ],
)
def test_files_are_put_together_by_their_endings(names, channels, cases):
    assert {case: tuple(map(str, files)) for case, files in group(named(*names), channels).items()} == cases


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a_t1", "a_t2", "b_t1"), "the case b has no channel t2, only b_t1: put its file there"),
        (("a", "b"), r"a has no channel in its name: names end with _t1, _t2 \(capitals count\) or _0000, _0001"),
        (("a_t1", "a-t1", "a_t2"), "a_t1 and a-t1 are the same channel of one case: rename one"),
    ],
)
def test_a_missing_channel_is_refused_by_name(names, message):
    with pytest.raises(UserError, match=message):
        group(named(*names), ("t1", "t2"))


def test_files_of_no_channel_are_told(said):
    said()
    assert list(group(named("a_t1", "a_t2", "a_seg"), ("t1", "t2"))) == ["a"]
    assert "left out, since their names end with no channel's: 1 files, a_seg" in said()


@pytest.mark.parametrize(
    ("found", "masks", "numbers"),
    [
        (("a_0000", "a_0001", "a_0002"), ("a",), 3),
        (("a_0000",), ("a",), 0),
        (("s_0000", "s_0001"), ("s_0000", "s_0001"), 0),  # numbers of cases
        (("a_0000", "scan_2019", "scan_2020"), ("a",), 0),  # years of scans without a label
        (("a_0000", "p_0001", "p_0002", "p_0003"), ("a",), 0),  # numbers of cases without a label
        (("a", "p_0000", "p_0001"), ("a",), 0),
        (("a_0000", "a_0001", "b_0000", "b_0001"), ("a",), 2),
    ],
)
def test_numbers_are_channels_where_labels_have_none(found, masks, numbers):
    assert len(numbers_of(named(*found), named(*masks))) == numbers


def brats_in(tmp_path):
    """Six cases of one channel, imported for 3D networks."""
    for k in range(1, 7):
        save(tmp_path / "images" / f"p{k}.nii.gz", k)
        save(tmp_path / "labels" / f"p{k}.nii.gz", k, label=True)
    import_nifti(Config(tmp_path / "mine", ("zscore",), tmp_path / "images", tmp_path / "labels"))
    return tmp_path / "mine"


@pytest.fixture
def brats(tmp_path):
    """A folder a patient: t1, t2 and seg; the last patient has no seg."""
    root = tmp_path / "brats"
    for k in range(1, 7):
        for number, channel in enumerate(("t1", "t2")):
            save(root / f"p{k}" / f"p{k}_{channel}.nii.gz", 10 * number + k)
        if k < 6:
            save(root / f"p{k}" / f"p{k}_seg.nii.gz", k, label=True)
    return root


PATTERNS = {"image_pattern": "*/*_{channel}.nii.gz", "label_pattern": "*/*_seg.nii.gz"}


def test_a_pattern_stands_for_each_channel(brats, tmp_path):
    import_nifti(Config(tmp_path / "mine", ("zscore",), brats, brats, channels=("t1", "t2"), **PATTERNS))
    assert lists(tmp_path / "mine")["train_unlab"] == ["p6"]
    sample = read_sample(tmp_path / "mine" / "data" / "p1.h5", ndim=3, num_classes=2, channels=("t1", "t2"))
    for k, channel in enumerate(("t1", "t2")):
        alone = prepare(read_scan(brats / "p1" / f"p1_{channel}.nii.gz"), Preprocessing("zscore"))
        np.testing.assert_array_equal(sample.image[k], alone.array)
    for more in ({"channels": ()}, {"channels": ("t1", "t2"), "image_pattern": "*/*_t1.nii.gz"}):
        with pytest.raises(UserError, match="--image_pattern .* and --channels belong together"):
            import_nifti(Config(tmp_path / "b", ("zscore",), brats, brats, **(PATTERNS | more)))
    with pytest.raises(UserError, match="--channels t1 must be several different names"):
        import_nifti(Config(tmp_path / "b", ("zscore",), brats, brats, channels=("t1",), **PATTERNS))
    with pytest.raises(UserError, match="--normalise gives 3 rules for 2 channels"):
        import_nifti(Config(tmp_path / "b", ("ct",) * 3, brats, brats, channels=("t1", "t2"), **PATTERNS))
    with pytest.raises(UserError, match="dataset.json is of an import with other preprocessing"):
        import_nifti(Config(tmp_path / "mine", ("zscore",), brats, brats, **(PATTERNS | {
            "image_pattern": "*/*_t1.nii.gz"})))  # fmt: skip
    (brats / "p3" / "p3_t2.nii.gz").unlink()
    with pytest.raises(UserError, match="the case p3 has no channel t2, which .*{channel}.nii.gz would name"):
        import_nifti(Config(tmp_path / "b", ("zscore",), brats, brats, channels=("t1", "t2"), **PATTERNS))


def test_a_table_has_a_column_a_channel(brats):
    table = brats / "cases.csv"
    table.write_text("case,t1,t2,label\na,p1/p1_t1.nii.gz,p1/p1_t2.nii.gz,p1/p1_seg.nii.gz\n", encoding="utf-8")
    (paths, label), = read_table(table, ("t1", "t2")).files.values()  # fmt: skip
    assert [path.name for path in (*paths, label)] == ["p1_t1.nii.gz", "p1_t2.nii.gz", "p1_seg.nii.gz"]
    with pytest.raises(UserError, match="has the columns case, t1, t2, label: it needs case, t1, t2 and flair"):
        read_table(table, ("t1", "t2", "flair"))
    with pytest.raises(UserError, match="it needs case and image"):
        read_table(table)


def test_a_change_of_any_channel_is_seen(brats, tmp_path, said):
    config = Config(tmp_path / "mine", ("zscore",), brats, brats, channels=("t1", "t2"), **PATTERNS)
    import_nifti(config)
    save(brats / "p2" / "p2_t2.nii.gz", 99)
    said()
    import_nifti(config)
    assert "the image changed since the conversion of p2: made again" in said()


# --- whole runs ---


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["volume", "slices"])
def test_from_raw_channels_to_predictions(brats, tmp_path, layout):
    size = (32, 16, 16) if layout == "volume" else (32, 32)
    root, models = tmp_path / "mine", tmp_path / "models"
    import_nifti(
        Config(
            root, ("minmax", "zscore"), brats, brats, channels=("t1", "t2"), layout=layout, val_fraction=0.2, **PATTERNS
        )
    )
    assert read_data_set(root).channels == ("t1", "t2")
    figure = tmp_path / "check.png"
    assert "nothing is wrong" in run(
        "../dataloaders/check.py", "--dataset", "own", "--root_path", root, "--figure", figure
    )
    where = ("--root_path", root, "--models_path", models, "--exp", "x", "--labelnum", 2)
    main("own_train.py", *where, *TINY, "--patch_size", *size)
    main("test_own.py", *where, "--save_nifti")
    folder = models / "mine_x_2_labeled"
    assert (folder / "test").is_dir()
    shapes = {nibabel.load(path).shape for path in folder.rglob("*_image.nii.gz")}
    assert shapes == {(12, 11, 10, 2) if layout == "volume" else (10, 11, 12, 2)}
    scans = tmp_path / "scans"
    for k in (1, 2):
        for channel in ("t1", "t2"):
            scans.mkdir(exist_ok=True)
            shutil.copy(brats / f"p{k}" / f"p{k}_{channel}.nii.gz", scans)
    main("predict.py", "--run", folder, "--input", scans, "--output", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").glob("*.nii.gz")} == {"p1_prediction.nii.gz", "p2_prediction.nii.gz"}
    one = tmp_path / "one"
    main("predict.py", "--run", folder, "--input", scans / "p2_t2.nii.gz", "--output", one, "--save_probability")
    predicted, again = (nibabel.load(f / "p2_prediction.nii.gz").get_fdata() for f in (tmp_path / "out", one))
    np.testing.assert_array_equal(predicted, again)
    (scans / "p1_t2.nii.gz").unlink()
    text = run("predict.py", "--run", folder, "--input", scans, "--output", tmp_path / "no", fails=True)
    assert "the case p1 has no channel t2" in text and "1 of 2 scans were refused" in text
    assert (tmp_path / "no" / "p2_prediction.nii.gz").exists()  # the others are predicted
    main("predict.py", "--run", folder, "--input", scans / "p2_t1.nii.gz", "--output", tmp_path / "two")
    patient = tmp_path / "p9"
    for channel in ("t1", "t2"):
        patient.mkdir(exist_ok=True)
        shutil.copy(brats / "p2" / f"p2_{channel}.nii.gz", patient / f"{channel}.nii.gz")
    main("predict.py", "--run", folder, "--input", patient, "--output", tmp_path / "nine")
    for name in ("two/p2", "nine/p9"):
        again = nibabel.load(tmp_path / f"{name}_prediction.nii.gz").get_fdata()
        np.testing.assert_array_equal(again, predicted)


def test_nnunets_data_sets_of_several_channels(tmp_path, said):
    raw = tmp_path / "Dataset001_Two"
    content = {"channel_names": {"0": "T1", "1": "CT"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    for k in range(4):
        for number in range(2):
            save(raw / "imagesTr" / f"h{k}_000{number}.nii.gz", 5 * number + k)
        save(raw / "labelsTr" / f"h{k}.nii.gz", k, label=True)
    (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    import_nnunet(NnunetConfig(raw, tmp_path / "two", trust_hu=True, trust=("all",)))
    said()
    assert read_data_set(tmp_path / "two").preprocessing.rules == ("zscore", "ct")
    assert read_data_set(tmp_path / "two").channels == ("T1", "CT")
    (raw / "imagesTr" / "h2_0001.nii.gz").unlink()
    with pytest.raises(UserError, match="the case h2 has no channel 0001"):
        import_nnunet(NnunetConfig(raw, tmp_path / "again"))
    content["channel_names"] = {"0": "T1", "1": "T1"}
    (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="channels must be numbered 0, 1, ... and have different names"):
        import_nnunet(NnunetConfig(raw, tmp_path / "again"))
