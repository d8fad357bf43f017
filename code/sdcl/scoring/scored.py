"""Cases that a test has scored, kept one file a case, so that a test that was stopped goes on."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sdcl.runs.atomic import replacing
from sdcl.runs.written_files import remove_written_folder
from sdcl.scoring.evaluation import Case, CaseRow


def key_of(networks: Iterable[nn.Module], facts: dict[str, Any]) -> str:
    """Return a checksum of all that a case's scores depend on beside the case: the weights and how they are used."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            total.update(name.encode())
            total.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return total.hexdigest()


class ScoredCases:
    """The scores and label maps of the cases that are done, in a folder of their own until the test is.

    Args:
        folder: made when the first case is kept.
        key: from key_of(); what was kept under another one does not count.
    """

    def __init__(self, folder: Path, key: str):
        self._folder, self._key = folder, key

    def load(self, case: Case) -> tuple[list[CaseRow], dict[str, np.ndarray]] | None:
        """Return a case's rows and its label maps (*S) by predictor; None where there are none, or of other data."""
        try:
            with np.load(self._path(case), allow_pickle=False) as kept:
                if str(kept["key"]) != self._key_of(case):
                    return None
                rows = [CaseRow(**row) for row in json.loads(str(kept["rows"]))]
                names = json.loads(str(kept["predictors"]))
                return rows, {name: kept[f"map{i}"] for i, name in enumerate(names)}
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            # Missing, or damaged: it is scored again.
            return None

    def save(self, case: Case, rows: Sequence[CaseRow], label_maps: dict[str, np.ndarray]) -> None:
        """Keep a case's rows and label maps."""
        arrays = {f"map{i}": label_map for i, label_map in enumerate(label_maps.values())}
        text = json.dumps([asdict(row) for row in rows])  # with nan, which json reads back
        with replacing(self._path(case), any_content=True) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file, key=self._key_of(case), rows=text, predictors=json.dumps(list(label_maps)), **arrays
            )

    def remove(self) -> None:
        """Remove what was kept, once the tables are written."""
        remove_written_folder(self._folder)

    def _path(self, case: Case) -> Path:
        return self._folder / f"{hashlib.sha256(case.name.encode()).hexdigest()[:16]}.npz"  # any name will do

    def _key_of(self, case: Case) -> str:
        total = hashlib.sha256(f"{self._key} {case.name} {case.spacing} {case.affine}".encode())
        for array in (case.image, case.label):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()
