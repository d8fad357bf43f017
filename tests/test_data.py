"""Lists, files, slices, augmentation, streams."""

import h5py
import numpy as np
import pytest
import scipy
from helpers import ROOT, write_h5
from scipy import ndimage

from dataloaders.acdc import DATA_SET
from dataloaders.cache import Cache, Decoding
from dataloaders.files import read_list, read_sample, sample_rng
from dataloaders.slices import Slices, read_volumes, split_by_patients
from dataloaders.streams import Order, Streams
from dataloaders.transforms import Augmentation, _rotated, apply_index, augmentation_index
from sdcl.runs.errors import UserError

LISTS = ROOT / "Datasets"
IMAGE, LABEL = (
    np.random.default_rng(0).random((6, 8)).astype(np.float32),
    np.arange(48, dtype=np.uint8).reshape(6, 8) % 4,
)


def test_the_published_lists():
    counts = {"la": (80, 20), "pancreas": (62, 18)}
    for name, (train, test) in counts.items():
        split = {
            key: read_list(LISTS / name / "data_split" / f"{key}.txt")
            for key in ("train", "train_lab", "train_unlab", "test")
        }  # noqa: E501
        assert (len(split["train"]), len(split["test"])) == (train, test)
        assert split["train_lab"] + split["train_unlab"] == split["train"]
        assert not set(split["train"]) & set(split["test"])
    slices = read_list(LISTS / "acdc" / "data_split" / "train_slices.list")
    for patients, labelled in zip((1, 3, 7, 14, 21, 28, 35, 70), (32, 68, 136, 256, 396, 512, 664, 1312), strict=True):
        first, rest = split_by_patients(slices, patients, DATA_SET.patient_of)
        assert first == slices[:labelled] and rest == slices[labelled:]
    published = read_list(LISTS / "acdc" / "data_split" / "train_lab.list")
    assert split_by_patients(slices, 7, DATA_SET.patient_of)[0] == published


@pytest.mark.parametrize("stored", [
    {}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True, "fletcher32": True, "chunks": (4, 5)},
    {"chunks": True, "maxshape": (None, None)},
])  # fmt: skip
@pytest.mark.parametrize("types", [("f4", "u1"), (">f8", "?"), ("<f2", ">i4"), (">u2", "<f4"), ("i1", "i8")])
def test_however_an_array_is_stored_its_numbers_are_read(types, stored, tmp_path):
    """Byte order, width and kind of the numbers, filters and chunks, as h5py writes them."""
    image = np.arange(48).reshape(6, 8) % 7 + 0.5 * (np.dtype(types[0]).kind == "f")
    label = (image > 3).astype(np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array, kind in zip(("image", "label"), (image, label), types, strict=True):
            file.create_dataset(name, data=array.astype(kind), **stored)
    sample = read_sample(tmp_path / "a.h5", ndim=2, num_classes=2)
    assert (sample.image.dtype, sample.label.dtype) == (np.float32, np.uint8)
    assert sample.image.dtype.isnative and sample.image.flags.c_contiguous
    assert np.array_equal(sample.image, image) and np.array_equal(sample.label, label)


@pytest.mark.parametrize("chunks", [None, (4, 5)])
def test_what_was_never_written_is_what_the_file_says(chunks, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        image = file.create_dataset("image", (6, 8), "f4", fillvalue=2.5, chunks=chunks)
        image[:2] = IMAGE[:2]
        file.create_dataset("label", (6, 8), "u1", fillvalue=1, chunks=chunks)
        expected = image[()]
    sample = read_sample(tmp_path / "a.h5", ndim=2, num_classes=2)
    assert np.array_equal(sample.image, expected) and (sample.image[2:] == 2.5).all() and (sample.label == 1).all()


def test_a_file_is_read_that_is_open_and_left_closed(tmp_path):
    """Beside h5py's own reading in the same process; a file that was refused can be written again."""
    path = write_h5(tmp_path / "a.h5", image=IMAGE, label=LABEL)
    with h5py.File(path) as file:
        assert np.array_equal(read_sample(path, ndim=2, num_classes=4).image, file["image"][()])
    for refused in ({"ndim": 3}, {"num_classes": 2}, {"channels": ("a", "b")}):
        with pytest.raises(UserError):
            read_sample(path, **{"ndim": 2, "num_classes": 4, **refused})
    with h5py.File(path, "r+") as file:
        file["image"][0, 0] = 7
    assert read_sample(path, ndim=2, num_classes=4).image[0, 0] == 7


@pytest.mark.parametrize("labelnum", [0, -1, 71])
def test_labelnum_that_no_list_has(labelnum):
    slices = read_list(LISTS / "acdc" / "data_split" / "train_slices.list")
    with pytest.raises(UserError, match=f"--labelnum is {labelnum}: choose 1 to 70"):
        split_by_patients(slices, labelnum, DATA_SET.patient_of)


def test_lists_from_other_systems(tmp_path):
    (tmp_path / "a.list").write_bytes("\ufeffone\r\n\r\n  two \nthree".encode())
    assert read_list(tmp_path / "a.list") == ["one", "two", "three"]
    (tmp_path / "b.list").write_text("\n \n")
    with pytest.raises(UserError, match="b.list is empty"):
        read_list(tmp_path / "b.list")
    (tmp_path / "c.list").write_text("one\ntwo\none\n")
    with pytest.raises(UserError, match="c.list names one twice"):
        read_list(tmp_path / "c.list")
    (tmp_path / "d.list").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="d.list cannot be read"):
        read_list(tmp_path / "d.list")
    with pytest.raises(UserError, match="e.list does not exist"):
        read_list(tmp_path / "e.list")


def test_a_good_file(tmp_path):
    path = write_h5(tmp_path / "a.h5", image=IMAGE.astype(np.float64), label=LABEL.astype(np.int64))
    sample = read_sample(path, ndim=2, num_classes=4)
    assert sample.image.dtype == np.float32 and sample.label.dtype == np.uint8
    np.testing.assert_array_equal(sample.image, IMAGE)
    np.testing.assert_array_equal(sample.label, LABEL)
    unlabelled = write_h5(tmp_path / "b.h5", image=IMAGE)
    assert read_sample(unlabelled, ndim=2, num_classes=4, needs_label=False).label is None


BAD_FILES = {
    "no image": ({"label": LABEL}, r"has no `image` \(it holds label\)"),
    "no label": ({"image": IMAGE}, r"has no `label` \(it holds image\)"),
    "nothing": ({}, r"has no `image` \(it holds nothing\)"),
    "shapes differ": ({"image": IMAGE, "label": LABEL[:5]}, r"`label` \(5, 8\) and `image` \(6, 8\) differ"),
    "one dimension more": ({"image": IMAGE[None], "label": LABEL[None]}, r"shape \(1, 6, 8\), it needs 2 dimensions"),
    "no pixels": ({"image": IMAGE[:0], "label": LABEL[:0]}, "it needs 2 dimensions"),
    "class beyond": ({"image": IMAGE, "label": LABEL + 1}, "`label` holds 4, outside the classes 0 to 3"),
    "negative class": ({"image": IMAGE, "label": LABEL.astype(np.int8) - 1}, "`label` holds -1, outside"),
    "fractional class": ({"image": IMAGE, "label": LABEL / 2}, "`label` holds 0.5, outside"),
    "nan": ({"image": np.where(IMAGE > 0.5, np.nan, IMAGE), "label": LABEL}, "nan or infinite"),
    "infinite": ({"image": np.where(IMAGE > 0.5, np.inf, IMAGE), "label": LABEL}, "nan or infinite"),
    "text image": ({"image": np.full((6, 8), b"x"), "label": LABEL}, "has the type"),
    "text label": ({"image": IMAGE, "label": np.full((6, 8), b"x")}, "has the type"),
    "scalar": ({"image": 3.0, "label": LABEL}, "it needs 2 dimensions"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path, kind):
    datasets, message = BAD_FILES[kind]
    path = write_h5(tmp_path / "bad.h5", **datasets)
    with pytest.raises(UserError, match=message) as error:
        read_sample(path, ndim=2, num_classes=4)
    assert str(path) in str(error.value)


def test_files_that_are_not_hdf5(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    whole = write_h5(tmp_path / "whole.h5", image=np.random.default_rng(0).random((64, 64)), label=np.zeros((64, 64)))
    (tmp_path / "cut.h5").write_bytes(whole.read_bytes()[:5000])
    write_h5(tmp_path / "group.h5", **{"image/nested": IMAGE, "label": LABEL})
    for name in ("text", "cut", "group"):
        with pytest.raises(UserError, match=f"{name}.h5 is not a readable HDF5 file"):
            read_sample(tmp_path / f"{name}.h5", ndim=2, num_classes=4)
    with pytest.raises(UserError, match="absent.h5 does not exist: restore it, or take its name out"):
        read_sample(tmp_path / "absent.h5", ndim=2, num_classes=4)


def test_the_cache_keeps_to_its_bound_and_reads_the_same(tmp_path):
    paths = [write_h5(tmp_path / f"{k}.h5", image=IMAGE + k, label=LABEL) for k in range(4)]
    one = (IMAGE.nbytes + LABEL.nbytes) / 2**30
    everything, half = (Cache(paths, "slices", 2, Decoding(4, True, gib)) for gib in (1, 2.5 * one))
    for path in paths[2:]:
        write_h5(path, image=IMAGE - 5, label=LABEL)
    assert [float(half[k].image[0, 0] - IMAGE[0, 0]) for k in range(4)] == pytest.approx([0, 1, -5, -5])
    assert [float(everything[k].image[0, 0] - IMAGE[0, 0]) for k in range(4)] == pytest.approx([0, 1, 2, 3])


def test_slices_are_found_in_either_place(acdc_phantom, tmp_path):
    names = read_list(acdc_phantom / "data_split" / "train_lab.list")
    how = (Decoding(4, True, 1), Augmentation((32, 32)))
    nested = Slices(acdc_phantom, names, *how)
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / f"{name}.h5").write_bytes((acdc_phantom / "data" / "slices" / f"{name}.h5").read_bytes())
    flat = Slices(tmp_path, names, *how)
    for k in range(len(names)):
        for one, two in zip(nested.sample(k, sample_rng(k)), flat.sample(k, sample_rng(k)), strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_missing_data_set_says_where_and_what(tmp_path):
    with pytest.raises(UserError) as error:
        DATA_SET.check_root(tmp_path / "none")
    for part in (str(tmp_path / "none"), "--root_path", "data/slices/", "docs/data.md", "phantom.py"):
        assert part in str(error.value)


def test_volumes(acdc_phantom):
    cases = read_volumes(acdc_phantom, "val", DATA_SET)
    assert [case.name for case in cases] == ["patient005_frame01", "patient005_frame02"]
    assert all(case.image.ndim == 3 and case.label.max() == 3 for case in cases)


class Script:
    """A generator whose draws are written down beforehand."""

    def __init__(self, random, integers):
        self._random, self._integers, self.bounds = iter(random), iter(integers), []

    def random(self):
        return next(self._random)

    def integers(self, *bounds):
        self.bounds.append(bounds)
        return next(self._integers)


@pytest.mark.parametrize("shape", [(40, 31), (64, 64), (33, 50)])
@pytest.mark.parametrize("kind", ["none", *[("rot", k, axis) for k in range(4) for axis in (0, 1)], *range(-20, 20, 3)])
def test_augmentation_shows_the_pixels_of_scipy(shape, kind):
    image = np.random.default_rng(3).random(shape).astype(np.float32) + 0.5
    if kind == "none":
        rng, expected = Script([0.9, 0.9], []), image
    elif isinstance(kind, tuple):
        rng, expected = Script([0.1], kind[1:]), np.flip(np.rot90(image, kind[1]), kind[2])
    else:
        rng, expected = Script([0.9, 0.1], [kind]), ndimage.rotate(image, kind, order=0, reshape=False)
    expected = ndimage.zoom(expected, (24 / expected.shape[0], 48 / expected.shape[1]), order=0)
    np.testing.assert_array_equal(apply_index(image, augmentation_index(shape, Augmentation((24, 48)), rng)), expected)
    assert rng.bounds == ([] if kind == "none" else [(4,), (2,)] if isinstance(kind, tuple) else [(-20, 20)])


@pytest.mark.parametrize("shape", [(37, 50), (64, 64)])
def test_rotations_by_any_angle_show_the_pixels_of_scipy(shape):
    """Also those by 45 degrees, where many coordinates lie halfway between two pixels; scipy 1.15 rounds these else."""
    has_other_ties = tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 16)
    numbered = np.arange(1, shape[0] * shape[1] + 1, dtype=np.int32).reshape(shape)
    for angle in range(-180, 180):
        if has_other_ties and angle % 15 == 0 and abs(angle) > 15:  # no whole angle in [-20, 20) has ties
            continue
        expected = ndimage.rotate(numbered, angle, order=0, reshape=False)
        shown = apply_index(numbered, _rotated(shape, angle, np.arange(shape[0]), np.arange(shape[1])))
        np.testing.assert_array_equal(shown, expected)


def test_kinds_of_augmentation_come_as_often_as_published():
    square = np.arange(20 * 20).reshape(20, 20)
    flips = {np.flip(np.rot90(square, k), axis).tobytes() for k in range(4) for axis in (0, 1)}
    counts = {"flipped": 0, "still": 0, "rotated": 0}
    for k in range(2000):
        shown = apply_index(square, augmentation_index((20, 20), Augmentation((20, 20)), sample_rng(k)))
        kind = "flipped" if shown.tobytes() in flips else "still" if np.array_equal(shown, square) else "rotated"
        counts[kind] += 1
    # A rotation by 0 degrees, and by 1 of so small an image, changes nothing: 2 of 40 angles or so.
    assert 900 < counts["flipped"] < 1100 and 400 < counts["rotated"] < 540 and 460 < counts["still"] < 620


class Numbers:
    """Cases that show their index and one random number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def name(self, index):
        return f"case{index}"

    def sample(self, index, rng):
        return np.full((1, 2, 2), index + rng.random() / 2, np.float32), np.full((2, 2), index, np.uint8)


def order(batches, key):
    return [int(v) for batch in batches for v in batch[key].flatten(1)[:, 0]]


def test_streams_read_forwards_and_backwards_and_start_again_each_epoch():
    streams = Streams(Numbers(5), Numbers(7), Order(2, 2, 1))
    assert streams.iterations_per_epoch == 3  # 7 // 2, the shorter
    batches = list(streams.batches(0, 4))
    assert order(batches[:3], "y_a") == [0, 1, 2, 3, 4, 0]
    assert order(batches[:3], "y_b") == [4, 3, 2, 1, 0, 4]
    assert order(batches[:3], "u_a") == [0, 1, 2, 3, 4, 5]
    assert order(batches[:3], "u_b") == [6, 5, 4, 3, 2, 1]
    assert order(batches[3:], "y_a") == [0, 1] and order(batches[3:], "u_b") == [6, 5]
    assert batches[0]["x_a"].shape == (2, 1, 2, 2) and batches[0]["y_a"].shape == (2, 2, 2)


def test_published_iterations_an_epoch():
    def iterations(labelled, unlabelled, repeat, unlabelled_repeat, batch_size):
        order = Order(batch_size, repeat, unlabelled_repeat)
        return Streams(Numbers(labelled), Numbers(unlabelled) if unlabelled else None, order).iterations_per_epoch

    assert iterations(136, 1176, 10, 10, 12) == 113
    assert iterations(8, 72, 10, 10, 2) == 40
    assert iterations(12, None, 5, 1, 2) == 30 and iterations(12, 50, 5, 1, 2) == 25


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_depends_on_its_number_alone(shuffle):
    def streams():
        return Streams(Numbers(6), Numbers(9), Order(2, 3, 2, seed=4, shuffle=shuffle))

    whole = list(streams().batches(0, 20))
    resumed = list(streams().batches(13, 20))
    for first, second in zip(whole[13:], resumed, strict=True):
        assert all((first[key] == second[key]).all() for key in first)
    assert order(whole[:9], "y_a").count(2) == 3  # each case as often as the list is repeated
    shuffled = order(whole[:9], "y_a") != order(whole[9:18], "y_a")
    assert shuffled == shuffle
    assert not np.array_equal(whole[0]["x_a"][0], whole[9]["x_a"][0])  # new augmentation in each epoch


@pytest.mark.parametrize("stage", ["pre_train", "self_train"])
def test_draws_follow_from_seed_stage_stream_iteration_and_place(stage):
    """So that a resumed run draws the same, and each stage and stream its own."""
    order = Order(2, 3, 3, seed=4)
    streams = Streams(Numbers(4), Numbers(4) if stage == "self_train" else None, order)
    batch, names = streams.batch(7), streams.names(7)
    expected = {"x_a", "x_b"} | ({"u_a", "u_b"} if stage == "self_train" else set())
    assert set(names) == expected and set(batch) == expected | {"y_a", "y_b"}
    for stream in expected:
        for place, image in enumerate(batch[stream][:, 0]):
            case = int(names[stream][place].removeprefix("case"))
            drawn = sample_rng(4, stage, stream.replace("_", ""), 7, place).random()
            assert image[0, 0].item() == pytest.approx(case + drawn / 2, abs=1e-6)
    assert names["x_a"] == ["case2", "case3"] and names["x_b"] == [
        "case1",
        "case0",
    ]  # the second batch of an epoch of 6


def test_shuffled_orders_follow_from_seed_stage_stream_and_epoch():
    streams = Streams(Numbers(4), None, Order(2, 3, seed=4, shuffle=True))
    for epoch in range(2):
        for stream in ("x_a", "x_b"):
            read = [name for k in range(6) for name in streams.names(6 * epoch + k)[stream]]
            expected = sample_rng(4, "pre_train", stream.replace("_", ""), epoch).permutation(12) % 4
            assert read == [f"case{k}" for k in expected]


def test_too_few_cases_for_a_batch():
    with pytest.raises(UserError, match="--batch_size 7 is more than the 3 labelled cases repeated 2 times"):
        Streams(Numbers(3), None, Order(7, 2))
    with pytest.raises(UserError, match="4 unlabelled cases repeated 1 times: lower it or raise --unlabelled_repeat"):
        Streams(Numbers(3), Numbers(4), Order(5, 2))
