"""DICOM segmentations as labels: each frame in its place, names, refusals; contours are refused as what they are."""

import json

import h5py
import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless
from test_dicom import AXES, STRUCTURES, change, dataset, group, save
from test_import import IMPORT
from test_predict import TILTED
from test_raw import run
from test_scans import picture, write_dicom

from dataloaders.scans.joining import join
from dataloaders.scans.reading import aligned_label, read_label, read_scan
from sdcl.runs.errors import UserError

SEG, LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"
SHAPE = (12, 10, 6)


def labels(shape=SHAPE, first=1, last=4, classes=2):
    """Two structures in the slices from first to last, none beside them."""
    array = np.zeros(shape, np.uint8)
    array[2:6, 3:8, first:last] = 1
    array[6:9, 3:8, first + 1 : last] = min(2, classes)
    return array


def seg(path, frames, *, names=("heart", "liver"), kind="BINARY", spacing=(0.8, 0.8), axes=AXES):
    """Write a segmentation as any program does: frames are (segment, position, picture (X, Y))."""
    pictures = np.stack([np.asarray(frame[2]).T for frame in frames])  # (count, rows, columns)
    data = dataset(LABEL_MAP if kind == "LABELMAP" else SEG, uid="1.5")
    data.Modality, data.SegmentationType = "SEG", kind
    data.NumberOfFrames, data.Rows, data.Columns = pictures.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    bits = 1 if kind == "BINARY" else 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    if kind == "FRACTIONAL":
        data.SegmentationFractionalType, data.MaximumFractionalValue = "PROBABILITY", 200
    data.SegmentSequence = [described(number, name) for number, name in enumerate(names, start=1)]
    data.SharedFunctionalGroupsSequence = [
        group(
            PlaneOrientationSequence={"ImageOrientationPatient": list(axes)},
            PixelMeasuresSequence={"PixelSpacing": list(spacing[::-1])},
        )
    ]
    data.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence={"ImagePositionPatient": list(map(float, position))},
            SegmentIdentificationSequence={"ReferencedSegmentNumber": number},
        )
        for number, position, _ in frames
    ]
    flat = pictures.astype(np.uint8).ravel()
    data.PixelData = pydicom.pixels.pack_bits(flat) if bits == 1 else flat.tobytes() + b"\0" * (flat.size % 2)
    data["PixelData"].VR = "OB"
    return save(data, path)


def described(number, name):
    segment = pydicom.Dataset()
    segment.SegmentNumber, segment.SegmentLabel, segment.SegmentAlgorithmType = number, name, "MANUAL"
    return segment


def frames_of(array, first=0, step=2.0, values=(1, 2)):
    """Frames of an array's structures, as write_dicom() places its slices; of slices without them there are none."""
    return [
        (value, (-50, -40, first + k * step), array[:, :, k] == value)
        for value in values
        for k in range(array.shape[2])
        if (array[:, :, k] == value).any()
    ]


# --- segmentations as labels ---


@pytest.mark.parametrize("order", ["as it is", "mixed"])
def test_a_binary_segmentation_lies_where_its_frames_say(tmp_path, order):
    image = read_scan(write_dicom(tmp_path / "ct", picture()))
    frames = frames_of(labels())
    frames = frames if order == "as it is" else [frames[k] for k in np.random.default_rng(0).permutation(len(frames))]
    label = read_label(seg(tmp_path / "seg.dcm", frames), onto=image)
    np.testing.assert_array_equal(aligned_label(image, label), labels())
    np.testing.assert_array_equal(read_label(tmp_path / "seg.dcm").array, labels()[:, :, 1:4])  # its own slices alone


def test_slices_apart_and_a_single_slice_have_their_places(tmp_path):
    image = read_scan(write_dicom(tmp_path / "ct", picture()))
    wanted = labels()
    for kept in ((1, 3), (2,)):
        label = np.where(np.isin(np.arange(6), kept), wanted, 0)
        read = read_label(seg(tmp_path / "seg.dcm", frames_of(label)), onto=image)
        np.testing.assert_array_equal(aligned_label(image, read), label)


def test_a_segmentation_stored_along_other_axes_is_turned(tmp_path):
    image = read_scan(write_dicom(tmp_path / "ct", picture()))
    label = labels()
    frames = [  # columns to the right, rows to the back, from the other corner
        (value, (-50 + 11 * 0.8, -40, 2 * k), np.flip(label[:, :, k] == value, 0))
        for value in (1, 2)
        for k in (1, 2, 3)
    ]
    path = seg(tmp_path / "seg.dcm", frames, axes=[-1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(aligned_label(image, read_label(path, onto=image)), label)


def test_a_tilted_gantry_has_its_segmentation(tmp_path):
    image = read_scan(write_dicom(tmp_path / "ct", picture(), direction=TILTED))
    path = seg(tmp_path / "seg.dcm", frames_of(labels()), axes=TILTED)
    np.testing.assert_array_equal(aligned_label(image, read_label(path, onto=image)), labels())


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
def test_label_maps_and_fractions_are_read(tmp_path, kind, said):
    image = read_scan(write_dicom(tmp_path / "ct", picture()))
    label = labels()
    frames = [(1, (-50, -40, 2 * k), label[:, :, k]) for k in range(6)]
    if kind == "FRACTIONAL":
        frames = [(n, p, np.where(m, 100, 99)) for n, p, m in frames_of(label)]  # of 200
    read = read_label(seg(tmp_path / "seg.dcm", frames, kind=kind), onto=image)
    np.testing.assert_array_equal(aligned_label(image, read), label)
    assert ("is fractional: a segment is where it reaches one half" in said()) == (kind == "FRACTIONAL")


def test_a_compressed_segmentation_is_read(tmp_path):
    image = read_scan(write_dicom(tmp_path / "ct", picture()))
    frames = [(1, (-50, -40, 2 * k), labels()[:, :, k]) for k in range(6)]
    data = pydicom.dcmread(seg(tmp_path / "seg.dcm", frames, kind="LABELMAP"))
    data.compress(RLELossless, generate_instance_uid=False)
    data.save_as(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read_label(tmp_path / "seg.dcm", onto=image).array, labels())
    data.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2K
    data.save_as(tmp_path / "seg.dcm")
    with pytest.raises(UserError, match="seg.dcm: its pixels, stored as High-Throughput JPEG 2000.*cannot be decoded"):
        read_label(tmp_path / "seg.dcm")


def overlapping(frames):
    number, position, mask = frames[0]
    return [*frames, (2, position, np.roll(mask, 1, 0))]


@pytest.mark.parametrize(
    "changed, given, message",
    [
        (overlapping, {}, r"segments 1 \(heart\) and 2 \(liver\) overlap, and a voxel has one label: export them"),
        (lambda f: [(n, (x + 0.3, y, z), m) for n, (x, y, z), m in f], {}, "lies beside the voxels of .*ct, by up to"),
        (lambda f: f, {"spacing": (0.4, 0.4)}, "lies beside the voxels of .*ct, by up to"),
        (lambda f: f, {"axes": TILTED}, "lies beside the voxels of .*ct, by up to"),
        (lambda f: [(n, (x, y, z + 6), m) for n, (x, y, z), m in f], {}, "has segments beyond .*ct: give the"),
        (lambda f: [(n, p, m & False) for n, p, m in f], {}, "is empty, all background"),
    ],
)
def test_segmentations_that_fit_no_scan_are_refused(tmp_path, changed, given, message):
    image = read_scan(write_dicom(tmp_path / "ct", picture()))
    path = seg(tmp_path / "seg.dcm", changed(frames_of(labels())), **given)
    with pytest.raises(UserError, match=f"seg.dcm.*{message}"):
        read_label(path, onto=image)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"SegmentationType": "SURFACE"}, "is a segmentation of the type SURFACE, which is not read here"),
        ({"PerFrameFunctionalGroupsSequence": None}, "does not say where its .* frames lie"),
        ({"SharedFunctionalGroupsSequence": None}, "does not say where its .* frames lie"),
        ({"NumberOfFrames": 3}, "cannot be read .* groups for 3 frames"),
    ],
)
def test_a_segmentation_that_lacks_something_is_refused(tmp_path, values, message):
    path = seg(tmp_path / "seg.dcm", frames_of(labels()))
    change(path, **values)
    with pytest.raises(UserError, match=f"seg.dcm {message}"):
        read_label(path)


def test_a_cut_segmentation_is_damaged(tmp_path):
    path = seg(tmp_path / "seg.dcm", frames_of(labels()))
    content = path.read_bytes()
    for length in (300, 1200, len(content) - 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="seg.dcm"):
            read_label(path)


def test_highdicoms_own_segmentation_reads_the_same(tmp_path):
    """Two readers, two ways: highdicom's volume of the file and this one's."""
    highdicom = pytest.importorskip("highdicom")
    image = read_scan(write_dicom(tmp_path / "ct", picture()))
    sources = [pydicom.dcmread(path) for path in sorted((tmp_path / "ct").iterdir())][::-1]  # from the other end
    for source in sources:
        source.FrameOfReferenceUID, source.SliceThickness, source.SpacingBetweenSlices = "1.2.9", 2, 2
        for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            setattr(source, name, "")
        source.StudyDate = source.StudyTime = ""
    code = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    segments = [highdicom.seg.SegmentDescription(k, name, code, code, "MANUAL") for k, name in ((1, "a"), (2, "b"))]
    written = highdicom.seg.Segmentation(
        sources, labels().transpose(2, 1, 0)[::-1], "BINARY", segments, highdicom.UID(), 1, highdicom.UID(), 1,
        "maker", "model", "1", "1",
    )  # fmt: skip
    written.save_as(tmp_path / "seg.dcm")
    label = read_label(tmp_path / "seg.dcm", onto=image)
    np.testing.assert_array_equal(label.array, labels())
    volume = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    there = read_label(tmp_path / "seg.dcm")
    assert volume.array.shape == there.array.T.shape
    np.testing.assert_array_equal(
        np.unique(volume.array, return_counts=True), np.unique(there.array, return_counts=True)
    )


def test_a_shipped_segmentation_is_read(tmp_path):
    shipped = pydicom.data.get_testdata_file("liver_1frame.dcm", download=False)
    if shipped is None:
        pytest.skip("pydicom does not ship it here")
    data = pydicom.dcmread(shipped)
    data.PerFrameFunctionalGroupsSequence = data.PerFrameFunctionalGroupsSequence[:1]  # it has those of three frames
    data.save_as(tmp_path / "seg.dcm")
    label = read_label(tmp_path / "seg.dcm")
    assert set(np.unique(label.array)) == {0, 1}
    np.testing.assert_array_equal(label.array[:, :, 0].T, data.pixel_array)
    place = data.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient
    np.testing.assert_allclose(label.affine[:3, 3], np.array(place) * (-1, -1, 1))


# --- how labels are found and imported ---


def patient(folder, name, number):
    array = picture((16, 14, 6), seed=number)
    array[4:9, 4:9, 1:4] += 500
    return write_dicom(folder / name, array, uid=f"1.7.{number}")


def structure(shape=(16, 14, 6)):
    array = np.zeros(shape, np.uint8)
    array[4:9, 4:9, 1:4] = 1
    return array


def test_labels_are_called_as_scans_are(tmp_path):
    for k, name in enumerate(("p1", "p2", "p3")):
        patient(tmp_path / "images", f"{name}/study/ct", k)
        where = {"p1": "p1.dcm", "p2": "p2/s/seg.dcm", "p3": "p3/x.dcm"}[name]
        seg(tmp_path / "labels" / where, frames_of(structure()))
    found = join(tmp_path / "images", tmp_path / "labels").files
    assert {name: label.name for name, (_, label) in found.items()} == {
        "p1": "p1.dcm", "p2": "seg.dcm", "p3": "x.dcm",
    }  # fmt: skip


def test_series_and_segmentations_in_one_tree_are_imported(tmp_path, said):
    for k in range(5):
        patient(tmp_path / "raw", f"p{k}/ct", k)
        if k < 4:
            seg(tmp_path / "raw" / f"p{k}" / "seg" / "1.dcm", frames_of(structure()), names=("left atrium",))
    flags = ("--images", tmp_path / "raw", "--labels", tmp_path / "raw", "--normalise", "zscore")
    text = run(IMPORT, *flags, "--output", tmp_path / "out")
    assert "30 files that are images beside segmentations left out" in text
    assert "the classes are called as the segmentations call them: left atrium" in text
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["class_names"] == ["left atrium"]
    with h5py.File(tmp_path / "out" / "data" / "p1.h5") as file:
        np.testing.assert_array_equal(file["label"][:], structure())
        assert file.attrs["label_source"] == "p1/seg/1.dcm"
    table = tmp_path / "raw" / "cases.csv"
    lines = [f"p{k},p{k}/ct,{f'p{k}/seg' if k % 2 else f'p{k}/seg/1.dcm'}" for k in range(4)]
    table.write_text("\n".join(["case,image,label", *lines]))
    run(IMPORT, "--table", table, "--normalise", "zscore", "--output", tmp_path / "other", "--class_names", "a")
    patterns = ("--image_pattern", "*/ct", "--label_pattern", "*/seg")
    run(IMPORT, *flags, *patterns, "--output", tmp_path / "third")
    for folder in ("other", "third"):
        with h5py.File(tmp_path / folder / "data" / "p1.h5") as file:
            np.testing.assert_array_equal(file["label"][:], structure())


def test_segments_of_one_number_have_one_name(tmp_path):
    for k in range(4):
        patient(tmp_path / "images", f"p{k}", k)
        seg(tmp_path / "labels" / f"p{k}.dcm", frames_of(structure()), names=("Spleen" if k == 2 else "liver",))
    flags = ("--images", tmp_path / "images", "--labels", tmp_path / "labels", "--normalise", "zscore")
    text = run(IMPORT, *flags, "--output", tmp_path / "out", fails=True)
    assert "the segment 1 is liver in " in text and "p0.dcm, Spleen in " in text and "give --class_names" in text
    text = run(IMPORT, *flags, "--output", tmp_path / "out", "--class_names", "organ")
    assert "--class_names says that they are the same structure" in text


def test_one_folder_of_images_alone_is_still_refused(tmp_path):
    patient(tmp_path, "p1", 1)
    with pytest.raises(UserError, match="give the folder of each, or patterns"):
        join(tmp_path, tmp_path)
    with pytest.raises(UserError, match="holds 2 segmentations .a.dcm, b.dcm.: leave one of them there"):
        for name in "ab":
            seg(tmp_path / "two" / f"{name}.dcm", frames_of(structure()))
        read_label(tmp_path / "two")


# --- contours ---


def test_contours_are_refused_as_what_they_are(tmp_path, said):
    message = r"contours .RTSTRUCT., no voxels: convert it to NIfTI or DICOM SEG, with plastimatch or 3D Slicer"
    patient(tmp_path / "images", "p1", 1)
    path = save(dataset(STRUCTURES), tmp_path / "labels" / "p1" / "rt.dcm")
    for where in (path, path.parent):
        with pytest.raises(UserError, match=f"rt.dcm holds {message}"):
            read_label(where)
    with pytest.raises(UserError, match=f"rt.dcm holds {message}"):
        join(tmp_path / "images", tmp_path / "labels")
    seg(tmp_path / "labels" / "p1" / "seg.dcm", frames_of(structure()))
    assert join(tmp_path / "images", tmp_path / "labels").files["p1"][1].name == "seg.dcm"
    assert "1 file that holds contours (RTSTRUCT) beside a label left out: p1/rt.dcm" in said()


def test_a_shipped_structure_set_is_refused(tmp_path):
    shipped = pydicom.data.get_testdata_file("rtstruct.dcm", download=False)
    if shipped is None:
        pytest.skip("pydicom does not ship it here")
    data = pydicom.dcmread(shipped, force=True)  # it lacks the first bytes by which a DICOM file is told
    data.file_meta = dataset(STRUCTURES).file_meta
    data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    save(data, tmp_path / "rt.dcm")
    with pytest.raises(UserError, match="rt.dcm holds contours"):
        read_label(tmp_path / "rt.dcm")
