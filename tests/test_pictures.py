"""Pictures: PNG, TIFF and JPEG with grey or palette masks, colours as channels, slices as 2D NIfTI; whole runs."""

import csv
import json
import struct
import zlib

import nibabel
import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image
from test_honest_runs import main
from test_import import TINY
from test_raw import run

from dataloaders.files import read_affine, read_sample, read_spacing
from dataloaders.import_nifti import Config
from dataloaders.import_nifti import main as import_nifti
from dataloaders.import_nnunet import Config as NnunetConfig
from dataloaders.import_nnunet import main as import_nnunet
from dataloaders.own import read_data_set
from dataloaders.scans.pictures import read_mask, read_picture
from dataloaders.scans.reading import find_scans, read_label, read_scan
from sdcl.runs.errors import UserError


def photo():
    """A real photograph, (600, 512, 3) uint8, which matplotlib ships."""
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def mask_of(picture):
    """What is bright in a picture, 1, and what is very bright, 2: a palette picture."""
    grey = picture.mean(axis=2)
    mask = Image.fromarray(((grey > 110).astype(np.uint8) + (grey > 190)).astype(np.uint8), "L")
    mask.putpalette([0, 0, 0, 220, 20, 60, 20, 90, 220])
    return mask


@pytest.fixture
def tiles(tmp_path):
    """Eight pieces of the photograph of unlike sizes; six of them with palette masks."""
    whole = photo()
    for k in range(8):
        tile = whole[60 * k : 60 * k + 60 + k, 150:250]
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(tile).save(tmp_path / "images" / f"t{k}.png")
        if k < 6:
            mask_of(tile).save(tmp_path / "masks" / f"t{k}.png")
    return tmp_path


def flags(tiles, **more):
    return Config(tiles / "mine", ("minmax",), tiles / "images", tiles / "masks", layout="slices", **more)


def test_colours_become_channels_and_palettes_classes(tiles, said):
    said()
    import_nifti(flags(tiles, class_names=("bright", "brighter")))
    assert "channel red is normalised by minmax" in said()
    data_set = read_data_set(tiles / "mine")
    assert data_set.channels == ("red", "green", "blue") and data_set.label_values == (1, 2)
    path = tiles / "mine" / "data" / "t3.h5"
    sample = read_sample(path, ndim=3, num_classes=3, channels=data_set.channels)
    tile, mask = (np.asarray(Image.open(tiles / folder / "t3.png")) for folder in ("images", "masks"))
    assert sample.image.shape == (3, 1, 63, 100)
    np.testing.assert_array_equal(sample.label[0], mask)
    red = tile[..., 0].astype(float)
    np.testing.assert_allclose(sample.image[0, 0], (red - red.min()) / np.ptp(red), atol=1e-6)
    assert read_spacing(path) is None and read_affine(path) is None  # pixels have no mm
    one = read_sample(tiles / "mine" / "data" / "slices" / "t3_slice_1.h5", ndim=2, num_classes=3,
                      channels=data_set.channels)  # fmt: skip
    np.testing.assert_array_equal(one.image, sample.image[:, 0])


@pytest.mark.slow
def test_from_pictures_to_masks(tiles):
    import_nifti(flags(tiles, class_names=("bright", "brighter"), label_values=(1, 2), val_fraction=0.2))
    root, models, out = tiles / "mine", tiles / "models", tiles / "out"
    where = ("--root_path", root, "--models_path", models, "--exp", "x", "--labelnum", 2)
    main("own_train.py", *where, *TINY, "--patch_size", 32, 32)
    main("test_own.py", *where)
    folder = models / "mine_x_2_labeled"
    page = next(folder.rglob("report.html")).read_text(encoding="utf-8")
    assert "Pictures show the channel red of red, green, blue." in page
    with open(next(folder.rglob("cases.csv")), encoding="utf-8", newline="") as file:
        assert {row["hd95_mm"] for row in csv.DictReader(file)} == {"nan"}
    said = main("predict.py", "--run", folder, "--input", tiles / "images", "--output", out)
    assert "t7: bright " in said and " pixels, brighter" in said
    predicted = Image.open(out / "t7_prediction.png")
    assert predicted.mode == "P" and predicted.size == (100, 67) and set(np.unique(predicted)) <= {0, 1, 2}
    with open(out / "volumes.csv", encoding="utf-8", newline="") as file:
        rows = {(row["scan"], row["structure"]): row for row in csv.DictReader(file)}
    assert rows["t7", "bright"]["volume_ml"] == ""
    assert int(rows["t7", "bright"]["voxels"]) == (np.asarray(predicted) == 1).sum()
    main("predict.py", "--run", folder, "--input", tiles / "images" / "t7.png", "--output", tiles / "one")
    np.testing.assert_array_equal(predicted, Image.open(tiles / "one" / "t7_prediction.png"))
    Image.fromarray(photo()[:50, :60, 0]).save(tiles / "grey.png")
    text = run("predict.py", "--run", folder, "--input", tiles / "grey.png", "--output", tiles / "no", fails=True)
    assert "grey.png has 1 channels where 3 are needed (red, green, blue)" in text


@pytest.mark.parametrize(
    ("array", "name"),
    [
        ((np.arange(30) * 2000).astype(np.uint16), "a.png"), ((np.arange(30) * 2000).astype(np.uint16), "a.tif"),
        (np.arange(30).astype(np.float32) / 7 - 1, "a.tiff"), (np.arange(30).astype(np.uint8), "a.bmp"),
    ],
)  # fmt: skip
def test_grey_pictures_of_any_depth(tmp_path, array, name):
    array = array.reshape(5, 6)
    Image.fromarray(array).save(tmp_path / name)
    scan = read_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.array, array.T[:, :, None].astype(np.float32))
    assert scan.orientation == "LPS"


def test_masks_are_numbers(tmp_path):
    mask = np.array([[0, 1, 2], [7, 7, 0]], np.uint8)
    Image.fromarray(mask).save(tmp_path / "grey.png")
    Image.fromarray(mask > 0).save(tmp_path / "binary.png")
    Image.fromarray(mask.astype(np.uint16) * 100).save(tmp_path / "deep.tif")
    assert read_label(tmp_path / "grey.png").array[:, :, 0].T.tolist() == mask.tolist()
    assert read_mask(tmp_path / "binary.png")[:, :, 0].T.tolist() == (mask > 0).astype(int).tolist()
    assert read_label(tmp_path / "deep.tif").array.max() == 700


def coloured(tmp_path):
    Image.fromarray(photo()[:40, :50]).save(tmp_path / "rgb.png")
    Image.fromarray(photo()[:40, :50]).save(tmp_path / "photo.jpg")
    pages = [Image.fromarray(np.full((4, 5), k, np.uint8)) for k in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "broken.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:200])
    return tmp_path


@pytest.mark.parametrize(
    ("read", "name", "message"),
    [
        (read_mask, "rgb.png", "rgb.png holds colours .* save it as a grey or a palette picture"),
        (read_mask, "photo.jpg", "photo.jpg is JPEG, which changes a mask's numbers"),
        (read_picture, "pages.tif", "pages.tif holds 3 pages: save each as a picture, or the stack as NIfTI"),
        (read_picture, "broken.png", "broken.png cannot be read .*: it is damaged"),
        (read_scan, "rgb.png", "rgb.png holds colours, and one number a pixel is needed"),
    ],
)
def test_what_is_no_mask_or_picture_is_refused(tmp_path, read, name, message):
    with pytest.raises(UserError, match=message):
        read(coloured(tmp_path) / name)


def test_settings_that_pictures_do_not_have(tiles):
    for more, message in (
        ({"layout": "volume"}, "pictures are slices: give --layout slices"),
        ({"layout": "slices", "spacing_mm": (1.0, 1.0, 1.0)}, "pictures have no voxel sides in mm"),
    ):
        config = Config(tiles / "no", ("minmax",), tiles / "images", tiles / "masks", **more)
        with pytest.raises(UserError, match=message):
            import_nifti(config)
    Image.fromarray(photo()[:60, :60, 1]).save(tiles / "images" / "t7.png")
    with pytest.raises(UserError, match=r"t0.png holds colours and .*t7.png is grey: convert all alike"):
        import_nifti(flags(tiles))


def test_pictures_beside_scans_are_previews(tmp_path, said):
    said()
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((4, 5, 6)), np.eye(4)), tmp_path / "a.nii.gz")
    Image.fromarray(photo()[:20, :20]).save(tmp_path / "a.png")
    assert list(find_scans(tmp_path)) == ["a"] and "1 file that is a picture beside scans left out: a.png" in said()


def test_slices_as_two_dimensional_nifti(tmp_path):
    for k in range(4):
        array = photo()[50 * k : 50 * k + 40, 200:250, 0].T
        for folder, content in (("images", array.astype(np.float32)), ("labels", (array > 100).astype(np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            image = nibabel.Nifti1Image(content, np.diag([-0.5, -0.5, 1, 1]))
            assert image.shape == (50, 40)
            nibabel.save(image, tmp_path / folder / f"s{k}.nii.gz")
    import_nifti(Config(tmp_path / "o", ("zscore",), tmp_path / "images", tmp_path / "labels", layout="slices"))
    sample = read_sample(tmp_path / "o" / "data" / "s1.h5", ndim=3, num_classes=2)
    assert sample.image.shape == (1, 40, 50) and read_spacing(tmp_path / "o" / "data" / "s1.h5") == (1, 0.5, 0.5)
    np.testing.assert_array_equal(sample.label[0], photo()[50:90, 200:250, 0] > 100)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_numbers_of_few_bits_are_what_the_file_holds(tmp_path, bits):
    """A PNG written byte by byte: Pillow stretches grey of 2 and 4 bits to 255."""
    mask = np.arange(16).reshape(2, 8) % 2**bits
    rows = [
        np.packbits(((row[:, None] >> np.arange(bits)[::-1]) & 1).astype(np.uint8).ravel()).tobytes() for row in mask
    ]
    header = struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png")[:, :, 0].T, mask)


def test_colours_of_sixteen_bits_are_not_cut(tmp_path):
    rows = b"".join(b"\0" + np.full((6, 3), value, ">u2").tobytes() for value in (7, 4000))
    header = struct.pack(">IIBBBBB", 6, 2, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(UserError, match="deep.png holds 16 bits a colour, of which 8 would be read"):
        read_picture(tmp_path / "deep.png")


def test_a_picture_that_viewers_turn_is_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo()[:30, :40]).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(UserError, match=r"turned.jpg is to be shown turned \(EXIF orientation 6\)"):
        read_picture(tmp_path / "turned.jpg")


def test_palettes_that_contradict_each_other_are_refused(tiles):
    mask = Image.open(tiles / "masks" / "t2.png")
    mask.putpalette([0, 0, 0, 20, 90, 220, 220, 20, 60])
    mask.save(tiles / "masks" / "t2.png")
    with pytest.raises(UserError, match=r"the number 1 is the colour \(220, 20, 60\) in .*t0.png and .* in .*t2.png"):
        import_nifti(flags(tiles))


def test_an_empty_colour_becomes_zeros(tiles, said):
    for path in (tiles / "images").iterdir():
        picture = np.array(Image.open(path))
        picture[..., 2] = 0
        Image.fromarray(picture).save(path)
    said()
    import_nifti(flags(tiles))
    assert "its channel blue holds one value and becomes 0" in said()
    sample = read_sample(tiles / "mine" / "data" / "t3.h5", ndim=3, num_classes=3, channels=("red", "green", "blue"))
    assert not sample.image[2].any() and sample.image[0].any()


def test_nnunets_names_of_pictures(tiles):
    """One file a case, <case>_0000.png, holds all channels; the mask is not lost to the figure."""
    raw = tiles / "Dataset005_Tiles"
    for folder, to in (("images", "imagesTr"), ("masks", "labelsTr")):
        (raw / to).mkdir(parents=True)
        for path in (tiles / folder).iterdir():
            path.rename(raw / to / (f"{path.stem}_0000.png" if folder == "images" else path.name))
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "bright": 1, "brighter": 2},
        "file_ending": ".png",
    }  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    root, models = tiles / "mine", tiles / "models"
    import_nnunet(NnunetConfig(raw, root, layout="slices"))
    assert read_data_set(root).channels == ("R", "G", "B")
    where = ("--root_path", root, "--models_path", models, "--exp", "x", "--labelnum", 2)
    main("own_train.py", *where, *TINY, "--patch_size", 32, 32)
    given = ("--run", models / "mine_x_2_labeled", "--input", raw / "imagesTr", "--output", tiles / "out")
    main("predict.py", *given, "--nnunet_names")
    assert Image.open(tiles / "out" / "t7.png").mode == "P" and (tiles / "out" / "t7_figure.png").exists()


def test_a_run_on_scans_does_not_take_pictures(tmp_path):
    from test_channels import brats_in

    root, models = brats_in(tmp_path), tmp_path / "models"
    where = ("--root_path", root, "--models_path", models, "--exp", "x", "--labelnum", 2)
    main("own_train.py", *where, *TINY, "--patch_size", 32, 16, 16)
    Image.fromarray(photo()[:40, :40, 0]).save(tmp_path / "a.png")
    given = ("--run", models / "mine_x_2_labeled", "--input", tmp_path / "a.png", "--output", tmp_path / "out")
    assert "a.png is a picture without mm, and this run was trained on scans" in run("predict.py", *given, fails=True)
