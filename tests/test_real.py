"""On real data, where it lies beside the project; skipped elsewhere."""

import nibabel
import numpy as np
import pytest
from helpers import ROOT
from medpy.metric import binary

from dataloaders import acdc, la, slices
from dataloaders.cache import Decoding
from dataloaders.files import read_list, read_sample
from dataloaders.transforms import Augmentation
from sdcl.metrics import case_metrics

DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no real data beside the project")


def test_metrics_of_a_real_prediction_are_medpys():
    reference, prediction = (
        np.asarray(nibabel.load(DATA / "pancreas" / "metrics" / f"00_{kind}.nii.gz").dataobj) > 0
        for kind in ("gt", "pred")
    )
    metrics = case_metrics(prediction, reference)
    for name, function in (("dice", binary.dc), ("jaccard", binary.jc), ("hd95", binary.hd95), ("asd", binary.asd)):
        assert getattr(metrics, name) == pytest.approx(function(prediction, reference), abs=1e-9)


def test_real_acdc_reads_as_the_lists_say():
    names = read_list(DATA / "acdc" / "data_split" / "train_slices.list")
    labelled, unlabelled = slices.split_by_patients(names, 7, acdc.DATA_SET.patient_of)
    assert (len(labelled), len(unlabelled)) == (136, 1176)
    chosen = slices.Slices(DATA / "acdc", labelled, Decoding(4, True, 1), Augmentation((256, 256)))
    image, label = chosen.sample(0, np.random.default_rng(0))
    assert image.shape == (1, 256, 256) and label.shape == (256, 256) and 0 <= image.min() <= image.max() <= 1
    assert len(slices.read_volumes(DATA / "acdc", "val", acdc.DATA_SET)) == 20


def test_real_la_reads():
    name = read_list(DATA / "la" / "data_split" / "train_lab.txt")[0]
    sample = read_sample(la.path_of(DATA / "la", name), ndim=3, num_classes=2)
    assert sample.image.ndim == 3 and set(np.unique(sample.label)) == {0, 1}
