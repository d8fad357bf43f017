"""Scans without a label, cropped as training crops them: round the box that a locator finds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dataloaders.scans.convert import Origin, few, provenance, write_case
from dataloaders.scans.locating import Locator, tell
from dataloaders.scans.prediction import box_on_grid
from dataloaders.scans.preprocessing import Preprocessing, at_least, prepare
from dataloaders.scans.reading import Scan
from sdcl.runs.folder import LOGGER

WHOLE = 2**31  # voxels: a least side that no scan has


@dataclass(frozen=True)
class Cropping:
    """How scans without a label are cropped.

    Attributes:
        locator: finds the box, its margin included.
        least: sides that a crop has at least, in voxels, where the scan has them.
    """

    locator: Locator
    least: Sequence[int]

    @classmethod
    def of(cls, folder: Path, least: Sequence[int]) -> "Cropping":
        """Read a locator's folder; see Locator.read()."""
        return cls(Locator.read(folder, torch.device("cpu")), tuple(least))

    @property
    def rule(self) -> str:
        """Return what chooses the crops, as the files' attribute `crop` keeps it."""
        return json.dumps({"located_by": self.locator.digest, "least": list(self.least)})

    def convert(self, image: Scan, how: Preprocessing, origin: Origin, target: Path, trust_hu: bool = False) -> None:
        """Preprocess a scan, crop it round what the locator finds, and write it without a label.

        Raises:
            UserError: nothing is found, or the scan does not suit the preprocessing.
        """
        found = self.locator.locate(image, trust_hu)
        tell(origin.images[0], found, self.locator)
        prepared = prepare(image, how, trust_hu, tell=False)
        shape = prepared.shape
        box = at_least(box_on_grid(found.box, image, prepared.affine, shape), self.least, shape)
        case = prepared.cropped(box)
        attributes = provenance(case, how, origin, box) | {"crop": self.rule, "located": "; ".join(found.doubts)}
        write_case(target, case.array, None, attributes)


def tell_unlabelled(names: Sequence[str], root_path: Path) -> None:
    """Say which cases have no label, and how they come to train."""
    if names:
        LOGGER.info(
            "%d cases without a label, cropped by the locator: %s; to train on them add their names at the end of %s, "
            "no test can score them", len(names), few(names), root_path / "data_split" / "train.txt",
        )  # fmt: skip
