"""ACDC: slices for training, volumes for validation and test."""

from dataloaders.datasets import DataSet, Duplicate, find_file
from dataloaders.scans.preprocessing import Preprocessing

TWICE = Duplicate(
    ("patient074", "patient076"),
    "the same images, labelled twice: two readings of one heart, whose Dice (RV 0.97, Myo 0.95, LV 0.97) shows how far "
    "readers agree; count them as one patient",
)


DATA_SET = DataSet(
    name="acdc",
    files="acdc",
    class_names=("RV", "Myo", "LV"),  # right ventricle, myocardium, left ventricle: classes 1, 2, 3
    preprocessing=Preprocessing("minmax", "LPS", layout="slices", slice_axis="z"),  # as the challenge's files lie
    path_of=find_file,
    patient_of=lambda name: name.split("_")[0],  # <patient>_<frame>_slice_<k>
    duplicates=(TWICE,),
)
