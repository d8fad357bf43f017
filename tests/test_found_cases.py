"""Layouts that people bring: BIDS, patients by name, one file per class, 4D files, label maps next to scans."""

import json
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from test_joining import lists, save
from test_predict import make_run, predicted, rows
from test_scans import picture, write_dicom, write_nifti

from dataloaders.files import read_list, read_sample
from dataloaders.import_nifti import Config
from dataloaders.import_nifti import main as import_nifti
from dataloaders.import_nnunet import Config as NnunetConfig
from dataloaders.import_nnunet import main as import_nnunet
from dataloaders.own import read_data_set
from dataloaders.scans.joining import Cases, by_class, by_pattern, read_table
from dataloaders.scans.patients import with_patients
from dataloaders.scans.reading import few_whole_numbers, find_scans, read_label
from dataloaders.voxel_sides import SideRange, seen_sides
from sdcl.runs.errors import UserError

AFFINE = np.diag([-1.5, -1.5, 3, 1])


def save_array(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def sides_of(root):
    found = lists(root)
    return [set(found.get("train_lab", [])) | set(found.get("train_unlab", [])), set(found["test"])]


# --- patients ---


@pytest.fixture
def sessions(tmp_path):
    """Four BIDS subjects of two sessions each; labels have one more entity, and macOS has left its files."""
    for k in range(4):
        for session in (1, 2):
            folder, name = tmp_path / f"sub-0{k}" / f"ses-{session}", f"sub-0{k}_ses-{session}"
            save(folder / f"{name}_T1w.nii.gz", k)
            save(tmp_path / "derivatives" / name / f"{name}_space-orig_mask.nii.gz", k, label=True)
            (folder / f"._{name}_T1w.nii.gz").write_bytes(b"\0\5\26\7")
    return tmp_path


def test_sessions_of_a_bids_subject_are_on_one_side(sessions, said):
    given = {"image_pattern": "**/*_T1w.nii.gz", "label_pattern": "**/*_mask.nii.gz", "test_fraction": 0.25}
    said()
    import_nifti(Config(sessions / "mine", ("zscore",), images=sessions, labels=sessions, **given))
    text = said()
    assert "8 cases of 4 patients, by sub- in their names" in text and "sub-00_ses-1_space-orig belongs to" in text
    train, test = sides_of(sessions / "mine")
    assert len(test) == 2 and not {name[:6] for name in train} & {name[:6] for name in test}
    assert read_data_set(sessions / "mine").patient_of("sub-02_ses-1") == "sub-02"


def slices_of_patients(tmp_path, count=4):
    for k in range(count):
        for number in (1, 2, 3):
            save(tmp_path / "images" / f"p{k}_s{number}.nii.gz", k)
            save(tmp_path / "labels" / f"p{k}_s{number}.nii.gz", k, label=True)
    return {"images": tmp_path / "images", "labels": tmp_path / "labels"}


@pytest.mark.parametrize("pattern", [r"(p\d+)_s\d+", r"p\d+", "*_s*"])
def test_a_pattern_names_the_patient(tmp_path, pattern, said):
    where = slices_of_patients(tmp_path)
    import_nifti(Config(tmp_path / "mine", ("zscore",), patient_pattern=pattern, test_fraction=0.25, **where))
    train, test = sides_of(tmp_path / "mine")
    assert len(test) == 3 and not {name[:2] for name in train} & {name[:2] for name in test}
    with pytest.raises(UserError, match="does not fit the case p0_s1"):
        import_nifti(Config(tmp_path / "other", ("zscore",), patient_pattern="(q.)_", **where))
    with pytest.raises(UserError, match=r"--patient_pattern \(p is no regular expression"):
        import_nifti(Config(tmp_path / "other", ("zscore",), patient_pattern="(p", **where))


def test_names_that_suggest_patients_are_warned_of(tmp_path, said):
    where = slices_of_patients(tmp_path)
    said()
    import_nifti(Config(tmp_path / "mine", ("zscore",), **where))
    assert "p0_s1 and p0_s2 may be of one patient" in (text := said()) and '--patient_pattern, such as "*_*"' in text


@pytest.mark.parametrize(
    "ends", [("_pre", "_post"), ("-baseline", "-followup"), (".1", ".2"), (" (1)", " (2)"), ("L", "R")]
)
def test_many_ways_to_name_a_patients_cases_are_warned_of(ends, said):
    said()
    files = {f"p{k}{end}": ((Path(f"p{k}{end}.nii.gz"),), None) for k in range(3) for end in ends}
    with_patients(Cases(files), Config(Path("mine"), ("zscore",)))
    assert "may be of one patient" in said()


@pytest.mark.parametrize("names", [("case_01", "case_02", "case_03"), ("a", "b", "c"), ("c0", "c1", "c2")])
def test_plain_names_suggest_nothing(tmp_path, names, said):
    for name in names:
        save(tmp_path / "images" / f"{name}.nii.gz", 1)
        save(tmp_path / "labels" / f"{name}.nii.gz", 1, label=True)
    said()
    import_nifti(Config(tmp_path / "mine", ("zscore",), images=tmp_path / "images", labels=tmp_path / "labels"))
    assert "patient" not in said()


@pytest.mark.parametrize(("ids", "count"), [("AABC", 3), (["anonymous"] * 4, 4), ("ABCD", 4)])
def test_series_of_one_patient_id_belong_together(tmp_path, ids, count, said):
    for k, patient in enumerate(ids):
        folder = tmp_path / "images" / f"s{k}"
        write_dicom(folder, picture(seed=k), uid=f"1.2.{k + 1}")
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            header.PatientID = patient
            header.save_as(path)
    cases = Cases({name: ((path,), None) for name, path in find_scans(tmp_path / "images").items()})
    said()
    found = with_patients(cases, Config(tmp_path / "mine", ("zscore",), images=tmp_path / "images"))
    assert len({found.patients.get(name, name) for name in cases.files}) == count
    text = said()
    assert "anonymous" not in text and ("all 4 cases are of one" in text) == (len(set(ids)) == 1)
    assert set(found.patients.values()) <= set(cases.files)  # no PatientID goes into dataset.json


@pytest.mark.parametrize(("cases", "patients"), [(2, 4), (8, 32)])
def test_folders_of_few_cases_are_patients_and_others_sites(tmp_path, said, cases, patients):
    files = {f"{k}_{n}": ((tmp_path / f"f{k}" / f"{n}.nii.gz",), None) for k in range(4) for n in range(cases)}
    said()
    found = with_patients(Cases(files), Config(tmp_path / "mine", ("zscore",), images=tmp_path))
    assert len({found.patients.get(name, name) for name in files}) == patients
    assert ("If these are patients" in said()) == (patients == 32)


def test_views_of_one_patient_belong_together(tmp_path):
    names = {}
    for k, patient in enumerate(("A", "A", "B")):
        write_dicom(tmp_path / f"s{k}", picture((12, 11, 1), seed=k), uid=f"1.2.{k + 1}")
        (path,) = (tmp_path / f"s{k}").iterdir()
        header = pydicom.dcmread(path)
        header.PatientID = patient
        header.save_as(path)
        names[f"v{k}"] = ((path,), None)
    found = with_patients(Cases(names), Config(tmp_path / "mine", ("zscore",), images=tmp_path))
    assert found.patients == {"v0": "v0", "v1": "v0", "v2": "v2"}


def test_an_earlier_division_with_a_patient_on_both_sides_is_told(tmp_path, said):
    where = slices_of_patients(tmp_path)
    import_nifti(Config(tmp_path / "mine", ("zscore",), seed=3, **where))
    said()
    import_nifti(Config(tmp_path / "mine", ("zscore",), seed=3, patient_pattern="*_s*", **where))
    assert "cases of one patient are on several sides of the split" in said()


# --- labels ---


def test_healthy_cases_are_labelled_cases(tmp_path, said):
    for k in range(6):
        save(tmp_path / "images" / f"c{k}.nii.gz", k)
        save(tmp_path / "labels" / f"c{k}.nii.gz", k, label=True)
    for k in (1, 4):
        save_array(tmp_path / "labels" / f"c{k}.nii.gz", np.zeros((12, 11, 10), np.uint8))
    said()
    where = {"images": tmp_path / "images", "labels": tmp_path / "labels"}
    import_nifti(Config(tmp_path / "mine", ("zscore",), test_fraction=0.5, **where))
    text = said()
    assert "2 of 6 labels have no foreground (healthy cases)" in text and "labelled cases: c1, c4" in text
    train, test = sides_of(tmp_path / "mine")
    assert len(test & {"c1", "c4"}) == 1 and len(test) == 3 and len(train) == 3  # both kinds on both sides
    assert not read_sample(tmp_path / "mine" / "data" / "c1.h5", ndim=3, num_classes=2).label.any()
    for path in (tmp_path / "labels").iterdir():
        save_array(path, np.zeros((12, 11, 10), np.uint8))
    with pytest.raises(UserError, match="none of the 6 labels has any foreground"):
        import_nifti(Config(tmp_path / "other", ("zscore",), **where))


def organs(root, cases=5):
    """One mask file per class, as TotalSegmentator writes them; case s2 has no spleen."""
    for k in range(cases):
        save(root / f"s{k}" / "mr.nii.gz", k)
        for number, organ in enumerate(("spleen", "liver")):
            array = np.zeros((12, 11, 10), np.uint8)
            array[3 * number : 3 * number + 4, 2:6, 2:6] = 1  # they share one layer of voxels
            if (k, organ) != (2, "spleen"):
                save_array(root / f"s{k}" / "segmentations" / f"{organ}.nii.gz", array)
    return root


def test_one_file_per_class(tmp_path, said):
    root = organs(tmp_path / "raw")
    given = {"image_pattern": "*/mr.nii.gz", "label_pattern": "*/segmentations/{class}.nii.gz"}
    said()
    import_nifti(Config(tmp_path / "mine", ("zscore",), images=root, labels=root, **given))
    text = said()
    assert "one file per class: liver, spleen" in text and "no file of the class spleen" in text and "s2" in text
    assert "voxels lie in several classes' masks" in text
    assert read_data_set(tmp_path / "mine").class_names == ("liver", "spleen")
    label = read_sample(tmp_path / "mine" / "data" / "s0.h5", ndim=3, num_classes=3).label
    assert [(label == k).sum() for k in (1, 2)] == [3 * 16, 4 * 16]  # the last class counts where they overlap
    chosen = Config(tmp_path / "one", ("zscore",), images=root, labels=root, class_names=("spleen",), **given)
    import_nifti(chosen)
    assert read_data_set(tmp_path / "one").class_names == ("spleen",)
    assert "s2" in lists(tmp_path / "one")["train_unlab"]
    before = (tmp_path / "mine" / "data" / "s0.h5").stat().st_mtime_ns
    save_array(root / "s1" / "segmentations" / "liver.nii.gz", np.ones((12, 11, 10), np.uint8))
    said()
    import_nifti(Config(tmp_path / "mine", ("zscore",), images=root, labels=root, **given))
    assert "changed since the conversion of s1" in said()
    assert (tmp_path / "mine" / "data" / "s0.h5").stat().st_mtime_ns == before


def test_a_file_of_one_class_holds_one_value(tmp_path):
    root = organs(tmp_path, 1)
    save_array(root / "s0" / "segmentations" / "liver.nii.gz", picture((12, 11, 10)).astype(np.uint16))
    path = by_class(root, "*/segmentations/{class}.nii.gz", ("liver", "spleen"))["s0"]
    with pytest.raises(UserError, match=r"liver.nii.gz holds several labels"):
        read_label(path)


def test_numbers_of_instances_are_noted(tmp_path, said):
    for k, count in enumerate((1, 3, 5)):
        label = np.zeros((12, 11, 10), np.uint8)
        label[2 : 2 + count, 3, 3] = range(1, count + 1)
        save(tmp_path / "images" / f"c{k}.nii.gz", k)
        save_array(tmp_path / "labels" / f"c{k}.nii.gz", label)
    said()
    import_nifti(Config(tmp_path / "mine", ("zscore",), images=tmp_path / "images", labels=tmp_path / "labels"))
    assert "with N from 1 to 5 by case, as if they numbered instances" in said()


# --- names and tables ---


def test_names_of_macos_are_those_of_linux(tmp_path):
    apart, together = unicodedata.normalize("NFD", "müller"), unicodedata.normalize("NFC", "müller")
    for k, (image, label) in enumerate(((apart, together), ("b", "b"), ("c", "c"))):
        save(tmp_path / "images" / f"{image}.nii.gz", k)
        save(tmp_path / "labels" / f"{label}.nii.gz", k, label=True)
    (tmp_path / "test.txt").write_text(f"{apart}\n", encoding="utf-8")
    where = {"images": tmp_path / "images", "labels": tmp_path / "labels", "test_list": tmp_path / "test.txt"}
    import_nifti(Config(tmp_path / "mine", ("zscore",), **where))
    assert read_list(tmp_path / "mine" / "data_split" / "test.txt") == [together]
    assert list(by_pattern(tmp_path / "images", "m*.nii.gz")) == [together[1:]]


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_tables_of_other_languages(tmp_path, separator):
    save(tmp_path / "a.nii.gz")
    lines = ["case,image,patient", "x,a.nii.gz,p"]
    (tmp_path / "cases.csv").write_text("\n".join(lines).replace(",", separator), encoding="utf-8-sig")
    assert read_table(tmp_path / "cases.csv").patients == {"x": "p"}


# --- nnU-Net and the Medical Segmentation Decathlon ---


def nnunet(folder, cases=4, channels=1, number="_0000", **description):
    content = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "box": 1}, "file_ending": ".nii.gz"}
    for k in range(cases):
        array = picture((12, 11, 10), k).astype(np.float32)
        array = np.stack([array, -array], -1) if channels == 2 else array
        save_array(folder / "imagesTr" / f"c{k}{number}.nii.gz", array)
        save(folder / "labelsTr" / f"c{k}.nii.gz", k, label=True)
    (folder / "dataset.json").write_text(json.dumps(content | description), encoding="utf-8")
    return folder


def test_numbers_written_as_text_are_numbers(tmp_path):
    raw = nnunet(tmp_path / "Dataset001_A", labels={"background": "0", "box": "1"})
    import_nnunet(NnunetConfig(raw, tmp_path / "mine"))
    assert read_data_set(tmp_path / "mine").label_values == (1,)


def test_a_value_that_the_description_lacks_is_an_error_of_the_description(tmp_path):
    raw = nnunet(tmp_path / "Dataset001_A")
    save_array(raw / "labelsTr" / "c1.nii.gz", np.full((12, 11, 10), 3, np.uint8))
    with pytest.raises(UserError, match=r"c1.nii.gz holds the label 3, which .*dataset.json does not name") as error:
        import_nnunet(NnunetConfig(raw, tmp_path / "mine"))
    assert "--" not in str(error.value)


def test_files_of_another_ending_are_named(tmp_path, said):
    raw = nnunet(tmp_path / "Dataset001_A")
    (raw / "imagesTr" / "readme.txt").write_text("hello")
    said()
    import_nnunet(NnunetConfig(raw, tmp_path / "mine"))
    assert "left out, since they do not end with .nii.gz: readme.txt" in said()


def test_the_decathlons_layout_is_read(tmp_path, said):
    old = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "box"}, "channel_names": None}
    raw = nnunet(tmp_path / "Task05_Prostate", channels=2, number="", **old)
    content = json.loads((raw / "dataset.json").read_text())
    del content["channel_names"]
    (raw / "dataset.json").write_text(json.dumps(content))
    said()
    import_nnunet(NnunetConfig(raw, tmp_path / "mine"))
    assert "named as in the Medical Segmentation Decathlon" in said()
    sample = read_sample(tmp_path / "mine" / "data" / "c0.h5", ndim=3, num_classes=2, channels=("T2", "ADC"))
    np.testing.assert_allclose(sample.image[0], -sample.image[1], atol=1e-5)


def test_4d_files_are_channels_where_these_are_named(tmp_path):
    raw = nnunet(tmp_path / "raw", channels=2, number="")
    where = {"images": raw / "imagesTr", "labels": raw / "labelsTr"}
    import_nifti(Config(tmp_path / "mine", ("zscore",), channels=("T2", "ADC"), **where))
    assert read_data_set(tmp_path / "mine").channels == ("T2", "ADC")
    with pytest.raises(UserError, match="holds 2 volumes: name them by --channels"):
        import_nifti(Config(tmp_path / "other", ("zscore",), **where))


# --- prediction ---


@pytest.fixture(scope="module")
def trained(scratch):
    return make_run(scratch / "run")


@pytest.fixture
def study(tmp_path):
    """Two cases as KiTS keeps them, a healthy one's label among them."""
    for k in range(2):
        write_nifti(tmp_path / "study" / f"case_{k}" / "imaging", picture(seed=k))
        write_nifti(tmp_path / "study" / f"case_{k}" / "segmentation", ((picture(seed=k) > 900) * k).astype(np.uint8))
    return tmp_path / "study"


def test_label_maps_next_to_scans_are_left_out(trained, study, tmp_path):
    text = predicted(trained, study, tmp_path / "out")
    assert {row["scan"] for row in rows(tmp_path / "out")} == {"case_0_imaging", "case_1_imaging"}
    assert "case_0/segmentation.nii.gz holds the value 0 only, like a label map without foreground" in text
    assert "case_1/segmentation.nii.gz holds only the numbers 0, 1, like a label map" in text
    assert "left out: 2 files that look like label maps" in text


def test_a_pattern_chooses_the_scans(trained, study, tmp_path):
    text = predicted(trained, study, tmp_path / "out", "--image_pattern", "*/imaging.nii.gz")
    assert {row["scan"] for row in rows(tmp_path / "out")} == {"case_0", "case_1"} and "LEFT OUT" not in text
    text = predicted(trained, study, tmp_path / "other", "--image_pattern", "*/segmentation.nii.gz", fails=True)
    assert "NOTE: " in text and "like a label map" in text  # it was asked for


def test_only_label_maps_are_no_scans(trained, study, tmp_path):
    for path in study.glob("*/imaging.nii.gz"):
        path.unlink()
    assert "holds label maps only, no scan" in predicted(trained, study, tmp_path / "out", fails=True)


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (np.tile([0, 1, 2], 1000), [0, 1, 2]),
        (np.tile([0, 255], 1000), [0, 255]),
        (np.tile([0.0, 0.5], 1000), []),
        (np.tile([-1, 0], 1000), []),
        (np.arange(2000) % 200, []),
        (np.repeat(np.arange(120), 500), list(range(120))),  # one label per organ
        (np.random.default_rng(0).integers(0, 31, 5000), []),  # a picture of few greys
    ],
)
def test_label_maps_are_known_by_few_whole_numbers(array, values):
    assert few_whole_numbers(array.astype(np.float32)) == values


def test_a_table_that_somebody_corrected_stays(trained, study, tmp_path):
    scan = study / "case_0" / "imaging.nii.gz"
    predicted(trained, scan, tmp_path / "out")
    table = tmp_path / "out" / "volumes.csv"
    table.write_text(table.read_text().replace("heart", "Herz"))
    kept = table.read_bytes()
    text = predicted(trained, scan, tmp_path / "out", fails=True)
    assert "volumes.csv has been changed since this project wrote it" in text and table.read_bytes() == kept


def test_frames_of_a_4d_file_are_predicted_one_by_one(trained, tmp_path):
    frames = [picture(seed=k) for k in range(3)]
    write_nifti(tmp_path / "cine", np.stack(frames, -1))
    write_nifti(tmp_path / "second", frames[1])
    said = predicted(trained, tmp_path / "cine.nii.gz", tmp_path / "no", fails=True)
    assert "holds 3 volumes, and this run takes one: give --frames" in said
    predicted(trained, tmp_path / "cine.nii.gz", tmp_path / "out", "--frames")
    predicted(trained, tmp_path / "second.nii.gz", tmp_path / "out", "--frames")
    one, other = (nibabel.load(tmp_path / "out" / f"{n}_prediction.nii.gz") for n in ("cine_frame02", "second"))
    np.testing.assert_array_equal(one.get_fdata(), other.get_fdata())
    assert one.shape == frames[0].shape and (tmp_path / "out" / "cine_frame03_prediction.nii.gz").exists()


# --- voxel sides ---


def test_voxel_sides_are_compared_with_those_of_training(tmp_path):
    range_ = SideRange.of([(1.5, 1.5, 2.0), (1.4, 1.6, 3.0)])
    assert not range_.is_unlike((1.5, 1.5, 3.6)) and range_.is_unlike((1.5, 1.5, 3.9))
    assert not range_.is_unlike((1.15, 1.5, 2.0)) and range_.is_unlike((1.1, 1.5, 2.0))
    assert SideRange.from_dict({"low": [1], "high": [1, 2]}) is None and SideRange.from_dict(None) is None
    assert seen_sides((8, 200, 100), (10, 1.5, 1.2), (50, 50)) == pytest.approx((6.0, 2.4))  # slices are resized


@pytest.mark.parametrize("layout", ["volume", "slices"])
@pytest.mark.parametrize(("sides", "is_told"), [((1.5, 1.5), False), ((1.5, 1.6), False), ((1.5, 3.0), True)])
def test_an_import_of_unlike_cases_is_told(tmp_path, said, layout, sides, is_told):
    for k in range(4):
        affine = np.diag([-sides[k % 2], -1.5, 3, 1])
        save(tmp_path / "images" / f"c{k}.nii.gz", k, affine=affine)
        save(tmp_path / "labels" / f"c{k}.nii.gz", k, label=True, affine=affine)
    said()
    where = {"images": tmp_path / "images", "labels": tmp_path / "labels", "slice_axis": "z"} | (
        {"layout": "slices"} if layout == "slices" else {"slice_axis": None}
    )
    import_nifti(Config(tmp_path / "mine", ("zscore",), **where))
    text = {
        "volume": "voxel sides differ by case, from 1.5 mm",
        "slices": "the sizes of slices differ by case, from 18 mm",
    }
    assert (text[layout] in said()) == is_told


def test_a_scan_of_other_voxels_is_warned_of(tmp_path):
    sides = {"low": [1.0, 1.0], "high": [1.2, 1.2]}
    run = make_run(tmp_path / "run", voxel_sides_mm=sides)
    for name, side in (("alike", 0.5), ("coarse", 2.0)):  # 64 pixels become 32, of twice the side
        write_nifti(tmp_path / name, picture((64, 64, 4)), np.diag([-side, -side, 5.0, 1.0]))
    assert "WARNING" not in predicted(run, tmp_path / "alike.nii.gz", tmp_path / "out")
    text = predicted(run, tmp_path / "coarse.nii.gz", tmp_path / "out")
    assert "the networks see voxels of 4×4 mm, and were trained on 1-1.2×1-1.2 mm" in text
