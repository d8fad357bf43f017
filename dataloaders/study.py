"""A data set together with a script's header: what slices and volumes share of sdcl.runs.data.Data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataloaders.cache import Cache
from dataloaders.checked import Checked
from dataloaders.datasets import DataSet, Texts
from dataloaders.store import remove_files
from sdcl.runs.distribution import first, is_first, wait
from sdcl.runs.folder import LOGGER, run_folder


class StudyData:
    """A data set together with the header of a training or test script; see sdcl.runs.data.Data.

    Args:
        data_set: which.
        config: the header.
    """

    def __init__(self, data_set: DataSet, config: Any):
        self.name, self._data_set, self._config = data_set.name, data_set, config

    def check_root(self) -> None:
        """Refuse a folder that does not hold the data set."""
        self._data_set.check_root(self._config.root_path)

    def read_checked(self) -> Checked:
        """Return what an earlier start of this run found of its files: the first process's, for all of them."""
        config, data_set = self._config, self._data_set
        folder = run_folder(config.models_path, self.name, config.exp, config.labelnum)
        settings = {
            "name": data_set.name, "class_names": data_set.class_names, "is_organ_ct": data_set.is_organ_ct,
            "preprocessing": data_set.preprocessing.to_json(), "cache_dtype": getattr(config, "cache_dtype", "float32"),
        }  # fmt: skip
        checked = first(lambda: Checked.read(folder, settings))
        if checked.reason:
            LOGGER.info("all files are read again: %s", checked.reason)
        return checked

    def keep(self, folder: Path, checked: Checked, caches: Sequence[Cache]) -> None:
        """Do what Training.keep() says."""
        if is_first():
            remove_files(folder)
            checked.write(folder)
        wait()  # so that nobody's file is removed
        for cache in caches:
            cache.open_file(folder)


def texts_in(*caches: Cache) -> Mapping[Path, Texts]:
    """Return what DataSet.facts() needs of the files of caches."""
    return {path: facts.texts for cache in caches for path, facts in zip(cache.paths, cache.facts, strict=True)}
