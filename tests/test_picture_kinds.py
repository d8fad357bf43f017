"""Kinds of pictures: inverting tables, grey stored as RGB, GIF, TIFF volumes, 2D DICOM; import and prediction."""

import json
import struct

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import uid as uids
from test_dicom import dataset, save
from test_predict import make_run, predicted

from dataloaders.files import read_sample
from dataloaders.import_nifti import Config
from dataloaders.import_nifti import main as import_nifti
from dataloaders.own import read_data_set
from dataloaders.scans.pictures import _tell_sides, check_palettes, read_mask, read_picture
from dataloaders.scans.reading import find_scans, read_label, read_scan
from sdcl.runs.errors import UserError

CR, DX, MG, US, CAPTURE = (
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("1", "1.1", "1.2", "6.1", "7")
)  # fmt: skip


def mask(shape=(36, 40), value=1):
    array = np.zeros(shape, np.uint8)
    array[8:20, 10:22] = value
    return array


def image(seed=0, shape=(36, 40)):
    return (np.random.default_rng(seed).integers(40, 90, shape) + 100 * mask(shape)).astype(np.uint8)


def write_tiff(path, array, bits, photometric, order="<"):
    """Write stored numbers as an uncompressed TIFF, byte by byte: Pillow turns them round when it writes some kinds."""
    rows = (array[..., None] >> np.arange(bits)[::-1]) & 1
    packed = np.packbits(rows.reshape(len(array), -1).astype(np.uint8), axis=1).tobytes()
    packed = array.astype(f"{order}u2").tobytes() if bits == 16 else packed
    rows, columns = array.shape
    tags = [(256, columns), (257, rows), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 9 * 12 + 4), (277, 1),
            (278, rows), (279, len(packed))]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    path.write_bytes(head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + packed)
    return path


def write_set(folder, images, masks):
    """Write images and masks by writers (path without suffix, number) in two folders."""
    for k in range(5):
        for name, write in (("images", images), ("labels", masks)):
            (folder / name).mkdir(exist_ok=True)
            write(folder / name / f"c{k}", k)
    return Config(folder / "out", ("minmax",), folder / "images", folder / "labels", layout="slices")


def as_png(array_of):
    return lambda path, k: Image.fromarray(array_of(k)).save(f"{path}.png")


def imported(folder, name="c0"):
    channels = read_data_set(folder / "out").channels
    return read_sample(folder / "out" / "data" / f"{name}.h5", ndim=3, num_classes=2, channels=channels)


# --- inverting tables ---


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(
    "bits, values", [(1, (0, 1)), (2, (0, 1, 3)), (4, (0, 3, 15)), (8, (0, 1, 255)), (16, (0, 1, 700))]
)
def test_stored_numbers_of_tiff_masks_count(tmp_path, bits, values, photometric, order):
    if (bits, photometric, order) == (16, 0, ">"):
        pytest.skip("Pillow does not read these")
    stored = np.array(values)[np.arange(6 * 16).reshape(6, 16) % len(values)]
    path = write_tiff(tmp_path / "m.tif", stored, bits, photometric, order)
    np.testing.assert_array_equal(read_mask(path)[:, :, 0].T, stored)


@pytest.mark.parametrize("bits, value", [(1, 1), (8, 255), (8, 1)])
def test_an_inverting_table_does_not_make_the_background_a_class(tmp_path, said, bits, value):
    masks = lambda path, k: write_tiff(path.with_suffix(".tif"), mask(value=value), bits, 0)  # noqa: E731
    import_nifti(write_set(tmp_path, as_png(image), masks))
    assert "5 masks are stored with an inverting table, 0 as white" in said()
    np.testing.assert_array_equal(imported(tmp_path).label[0], mask())


def test_masks_of_both_polarities_are_refused(tmp_path):
    masks = lambda path, k: write_tiff(path.with_suffix(".tif"), mask(value=255), 8, k % 2)  # noqa: E731
    config = write_set(tmp_path, as_png(image), masks)
    with pytest.raises(UserError, match=r"0 is white in .*c0.tif and black in .*c1.tif .* save all masks alike"):
        import_nifti(config)


@pytest.mark.parametrize("value, palette", [(255, range(255, -1, -1)), (1, (255, 0))])
def test_an_inverting_palette_is_another_polarity(tmp_path, value, palette):
    turned = Image.fromarray(mask(value=value))
    turned.putpalette([colour for k in palette for colour in (k, k, k)])
    turned.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png")[:, :, 0].T, mask(value=value))
    Image.fromarray(mask(value=255)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="0 is white in .*a.png and black in .*b.png"):
        check_palettes([tmp_path / "a.png", tmp_path / "b.png"])


# --- grey stored as RGB ---


def rgb(array):
    return np.stack([array] * 3, axis=-1)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".jpg"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_grey_picture_stored_as_colours_is_grey(tmp_path, suffix, mode):
    if (suffix, mode) == (".jpg", "RGBA"):
        pytest.skip("JPEG has no transparency")
    Image.fromarray(rgb(image())).convert(mode).save(tmp_path / f"a{suffix}", quality=100)
    (channel,) = read_picture(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(channel[:, :, 0].T, image(), atol=12 if suffix == ".jpg" else 0)
    assert len(read_picture(tmp_path / f"a{suffix}", 3)) == 3
    assert read_scan(tmp_path / f"a{suffix}").array.shape == (40, 36, 1)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_a_mask_stored_as_colours_is_a_mask(tmp_path, suffix):
    Image.fromarray(rgb(mask(value=255))).save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_label(tmp_path / f"a{suffix}").array[:, :, 0].T, mask(value=255))
    coloured = rgb(mask(value=255))
    coloured[0, 0] = 255, 0, 0
    Image.fromarray(coloured).save(tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match="holds colours .RGB., and a mask's pixels are numbers"):
        read_mask(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [75, 95])
def test_a_jpeg_mask_of_black_and_white_is_a_mask(tmp_path, mode, quality):
    Image.fromarray(mask(value=255)).convert(mode).save(tmp_path / "m.jpg", quality=quality)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg")[:, :, 0].T, mask(value=255))
    Image.fromarray(mask(value=2)).convert(mode).save(tmp_path / "m.jpg", quality=quality)
    with pytest.raises(UserError, match="is JPEG, which changes a mask's numbers"):
        read_mask(tmp_path / "m.jpg")


def test_a_data_set_of_grey_pictures_stored_as_colours(tmp_path, said):
    """Some stored as RGB and some as grey, masks of 0 and 255 stored as RGB: one channel and one class."""
    images = lambda k: rgb(image(k)) if k % 2 else image(k)  # noqa: E731
    import_nifti(write_set(tmp_path, as_png(images), as_png(lambda k: rgb(mask(value=255)))))
    assert "2 pictures are stored in colours and are grey" in said()
    assert read_data_set(tmp_path / "out").channels == ()
    np.testing.assert_array_equal(imported(tmp_path, "c1").label[0], mask())


def test_pictures_that_are_only_sometimes_grey_are_colours(tmp_path):
    images = lambda k: rgb(image(k)) if k % 2 else np.stack([image(k), image(k), mask()], axis=-1)  # noqa: E731
    import_nifti(write_set(tmp_path, as_png(images), as_png(lambda k: mask())))
    assert read_data_set(tmp_path / "out").channels == ("red", "green", "blue")
    assert imported(tmp_path, "c1").image.shape == (3, 1, 36, 40)


def test_grey_beside_colours_is_refused(tmp_path):
    images = lambda k: image(k) if k % 2 else np.stack([image(k), image(k), mask()], axis=-1)  # noqa: E731
    with pytest.raises(UserError, match="c0.png holds colours and .*c1.png is grey: convert all alike"):
        import_nifti(write_set(tmp_path, as_png(images), as_png(lambda k: mask())))


# --- GIF ---


@pytest.mark.parametrize("values", [(0, 255), (0, 1, 2), (255, 0)])
@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_gif_masks_are_their_grey_values(tmp_path, values, mode):
    if mode == "1" and 255 not in values:
        pytest.skip("two values")
    array = np.array(values, np.uint8)[np.arange(96).reshape(8, 12) % len(values)]
    Image.fromarray(array).convert(mode).save(tmp_path / "m.gif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.gif")[:, :, 0].T, array)


def test_a_gif_with_a_coloured_palette_is_its_numbers(tmp_path):
    picture = Image.fromarray((np.arange(96) % 4).astype(np.uint8).reshape(8, 12))
    picture.putpalette([0, 0, 0, 220, 20, 60, 20, 90, 220, 9, 200, 9])
    picture.save(tmp_path / "m.gif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.gif")[:, :, 0].T, np.asarray(picture))


def test_pictures_and_masks_of_gif_are_imported(tmp_path):
    images = lambda path, k: Image.fromarray(image(k)).save(f"{path}.gif")  # noqa: E731
    masks = lambda path, k: Image.fromarray(mask(value=255)).save(f"{path}.gif")  # noqa: E731
    import_nifti(write_set(tmp_path, images, masks))
    sample = imported(tmp_path)
    np.testing.assert_array_equal(sample.label[0], mask())
    assert sample.image.shape == (1, 36, 40)


# --- TIFF volumes ---


def write_stack(path, array):
    """Write (X, Y, Z) as pages."""
    pages = [Image.fromarray(np.ascontiguousarray(array[:, :, k].T)) for k in range(array.shape[2])]
    path.parent.mkdir(exist_ok=True)
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def volume(dtype=np.uint16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (12, 10, 5)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("name, content", [("a", {"spacing": [3, 0.7, 0.5]}), ("a", {"spacing_mm": [0.5, 0.7, 3]})])
def test_a_tiff_volume_has_the_sides_beside_it(tmp_path, said, dtype, name, content):
    _tell_sides.cache_clear()  # tests use a folder's name again
    path = write_stack(tmp_path / "a.tif", volume(dtype))
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    said()
    assert list(find_scans(tmp_path)) == ["a"] and "left out" not in said()
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array, volume(dtype))
    np.testing.assert_allclose(scan.spacing_mm, (0.5, 0.7, 3))
    assert "0.5×0.7×3 mm along x (columns), y (rows) and z (pages)" in said()


def test_tiff_volumes_are_imported_as_volumes_with_nnunets_names(tmp_path):
    for k in range(4):
        label = (volume(seed=k) > 150).astype(np.uint8)
        write_stack(tmp_path / "images" / f"c{k}_0000.tiff", volume(seed=k))
        write_stack(tmp_path / "labels" / f"c{k}.tiff", label)
        for folder in ("images", "labels"):
            (tmp_path / folder / f"c{k}.json").write_text(json.dumps({"spacing": [3, 0.7, 0.5]}))
    import_nifti(Config(tmp_path / "out", ("zscore",), tmp_path / "images", tmp_path / "labels"))
    with h5py.File(tmp_path / "out" / "data" / "c2.h5") as file:
        np.testing.assert_allclose(file.attrs["spacing"], (0.5, 0.7, 3))
        np.testing.assert_array_equal(file["label"][:], volume(seed=2) > 150)


@pytest.mark.parametrize(
    "content", ['{"spacing": [1, 2]}', '{"other": 1}', "no json", '{"spacing": [1, 2, 0]}', "[1, 2, 3]"]
)
def test_sides_that_are_none_are_refused(tmp_path, content):
    path = write_stack(tmp_path / "a.tif", volume())
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match='a.json does not give the voxel sides of a.tif .*"spacing": .z, y, x.'):
        read_scan(path)


def test_a_tiff_volume_without_sides_is_told_what_to_write(tmp_path):
    with pytest.raises(
        UserError, match=r"a.tif holds 5 pages: save each .* or put its voxel sides beside it as a.json"
    ):
        read_scan(write_stack(tmp_path / "a.tif", volume()))


# --- 2D DICOM ---


def still(path, array, kind=CR, *, modality="CR", syntax=uids.ExplicitVRLittleEndian, compress=None, **attributes):
    """Write a DICOM picture, (rows, columns) or (rows, columns, 3), without a place in space."""
    data = dataset(kind, "1.9", abs(hash(path.name)) % 10**6)
    data.file_meta.TransferSyntaxUID = syntax
    data.Modality, data.PatientID = modality, path.stem
    data.Rows, data.Columns = array.shape[:2]
    data.SamplesPerPixel = 1 if array.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if array.ndim == 2 else "RGB"
    if array.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * array.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(array.dtype.kind == "i")
    order = ">" if syntax == uids.ExplicitVRBigEndian else "<"
    data.PixelData = array.astype(array.dtype.newbyteorder(order)).tobytes()
    data["PixelData"].VR = "OW"
    for name, value in attributes.items():
        setattr(data, name, value)
    if compress:
        data.compress(compress, generate_instance_uid=False)
    return save(data, path)


@pytest.mark.parametrize(
    "kind, modality, dtype, more",
    [
        (CR, "CR", np.uint16, {"ImagerPixelSpacing": [0.1, 0.1]}), (DX, "DX", np.uint16, {"PixelSpacing": [0.2, 0.2]}),
        (MG, "MG", np.int16, {}), (US, "US", np.uint8, {}), (CAPTURE, "CR", np.uint8, {}),
        (CAPTURE, "OT", np.uint8, {}), (CR, "CR", np.uint16, {"syntax": uids.ImplicitVRLittleEndian}),
        (CR, "CR", np.uint16, {"syntax": uids.ExplicitVRBigEndian}),
        (CR, "CR", np.uint16, {"compress": uids.RLELossless}),
    ],
)  # fmt: skip
def test_two_dimensional_dicom_is_a_picture(tmp_path, kind, modality, dtype, more):
    path = still(tmp_path / "a.dcm", image().astype(dtype), kind, modality=modality, **more)
    assert find_scans(tmp_path) == {"a": path}
    np.testing.assert_array_equal(read_scan(path).array[:, :, 0].T, image())


def test_an_x_ray_with_low_values_white_is_turned_round(tmp_path, said):
    array = image().astype(np.uint16)
    upright = read_scan(still(tmp_path / "a.dcm", array)).array
    path = still(tmp_path / "b.dcm", 4095 - array, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    turned = read_scan(path).array
    np.testing.assert_allclose(turned - turned.min(), upright - upright.min())
    assert "b.dcm: low values are white (MONOCHROME1); it is turned round" in said()


def test_padding_of_an_x_ray_is_its_least_value(tmp_path):
    array = image().astype(np.uint16)
    array[:4] = 65535
    scan = read_scan(still(tmp_path / "a.dcm", array, MG, PixelPaddingValue=65535))
    assert (scan.array[:, :4] == image()[4:].min()).all()


def test_ultrasound_in_colours_is_grey_where_it_is(tmp_path):
    grey = still(tmp_path / "a.dcm", rgb(image()), US, modality="US")
    (channel,) = read_picture(grey)
    np.testing.assert_array_equal(channel[:, :, 0].T, image())
    ybr = np.full((*image().shape, 3), 128, np.uint8)
    ybr[..., 0] = image()
    (channel,) = read_picture(still(tmp_path / "b.dcm", ybr, US, modality="US", PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_array_equal(channel[:, :, 0].T, image())
    coloured = rgb(image())
    coloured[0, :5] = 255, 200, 0
    assert len(read_picture(still(tmp_path / "c.dcm", coloured, US, modality="US"))) == 3


@pytest.mark.parametrize("name", ["", ".dcm"])
def test_x_rays_are_imported_and_predicted(tmp_path, name):
    images = lambda path, k: still(path.with_name(path.name + name), image(k).astype(np.uint16))  # noqa: E731
    config = write_set(tmp_path, images, as_png(lambda k: mask(value=255)))
    import_nifti(config)
    np.testing.assert_array_equal(imported(tmp_path).label[0], mask())
    if name:
        trained = make_run(tmp_path / "run", "minmax")
        predicted(trained, tmp_path / "images", tmp_path / "pred", "--no-save-figure")
        predicted(trained, tmp_path / "images" / "c1.dcm", tmp_path / "one", "--no-save-figure")
        whole, one = (Image.open(tmp_path / folder / "c1_prediction.png") for folder in ("pred", "one"))
        assert whole.size == (40, 36)
        np.testing.assert_array_equal(whole, one)
        text = predicted(trained, tmp_path / "images", tmp_path / "no", "--dicom_seg", fails=True)
        assert "is no DICOM series" in text


def test_a_picture_beside_a_scan_is_left_out_by_name(tmp_path, said):
    still(tmp_path / "chest.dcm", image())
    nibabel.save(nibabel.Nifti1Image(volume(np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    assert list(find_scans(tmp_path)) == ["a"]
    assert "1 file that is a picture beside scans left out: chest.dcm" in said()


def test_a_picture_whose_pixels_are_not_read_is_refused_by_name(tmp_path):
    path = still(tmp_path / "a.dcm", image().astype(np.uint16), BitsStored=12, HighBit=3)
    with pytest.raises(UserError, match="a.dcm has the HighBit 3"):
        read_scan(path)
    path = still(tmp_path / "b.dcm", rgb(image().astype(np.uint16)), US, modality="US")
    with pytest.raises(UserError, match="b.dcm holds colours of 16 bits"):
        read_picture(path)
