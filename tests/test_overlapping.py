"""Scans are read, computed and written at the same time: what is logged keeps their order, errors are their own."""

import re
import threading

import numpy as np
import pytest
from helpers import in_slabs
from test_predict import make_run, predicted, rows
from test_scans import ORIENTATIONS, affine_of, picture, write_nifti

from dataloaders.scans import predicting
from dataloaders.scans.overlapping import InTurn, Later
from dataloaders.scans.prediction import planes_on_scan, prepared_for, segmented
from dataloaders.scans.preprocessing import Prepared, Preprocessing
from dataloaders.scans.reading import Scan
from sdcl.runs.folder import LOGGER

SECONDS = 60  # after which a test has failed, where things wait for each other


@pytest.fixture(scope="module")
def trained(scratch):
    return make_run(scratch / "run")


def test_what_is_logged_keeps_the_scans_order(said):
    def log(number, text):
        turn.of(number)
        LOGGER.info("%d %s", number, text)

    with InTurn() as turn:
        log(0, "read")
        Later(log, 2, "read").result()
        Later(log, 1, "read").result()
        Later(log, 1, "computed").result()
        assert said().split("\n")[:-1] == ["0 read"]
        turn.next()
        assert said().split("\n")[:-1] == ["1 read", "1 computed"]
        log(1, "written")
        assert said() == "1 written\n"
    assert said() == "2 read\n"  # what was still waiting when it ended


def test_what_a_thread_raises_is_raised_where_it_is_asked_for():
    def fail():
        raise KeyError("mine")

    later = Later(fail)
    with pytest.raises(KeyError, match="mine"):
        later.result()
    assert Later(lambda a, b: a + b, 1, 2).result() == 3


def test_the_next_scan_is_read_and_the_last_one_written_meanwhile(trained, tmp_path, monkeypatch):
    """The first is decided only when the second is read, and written only when the second is decided."""
    for name in "abc":
        write_nifti(tmp_path / "scans" / name, picture())
    events = {f"{what} {name}": threading.Event() for what in ("opened", "decided") for name in "abc"}
    order, real = [], {name: getattr(predicting, name) for name in ("opened", "decided", "written")}

    def opened(config, run, name, *rest):
        result = real["opened"](config, run, name, *rest)
        order.append(name)
        events[f"opened {name}"].set()
        return result

    def decided(parts, scan, *rest):
        name = scan.path.name[0]
        assert name != "a" or events["opened b"].wait(SECONDS)
        assert "c" not in order or name != "a"  # one scan ahead, no more
        result = real["decided"](parts, scan, *rest)
        events[f"decided {name}"].set()
        return result

    def written(config, run, of, *rest):
        assert of.name != "a" or events["decided b"].wait(SECONDS)
        return real["written"](config, run, of, *rest)

    for function in (opened, decided, written):
        monkeypatch.setattr(predicting, function.__name__, function)
    text = predicted(trained, tmp_path / "scans", tmp_path / "out")
    lines = [line[0] for line in text.splitlines() if line[1:3] == ": "]
    assert lines == sorted(lines) and set(lines) == set("abc")
    assert [row["scan"] for row in rows(tmp_path / "out")] == ["a", "a", "b", "b", "c", "c"]
    assert re.search(r"^a: \d+ slices, [0-9.e-]+ s$", text, re.M)


@pytest.mark.parametrize("function", ["opened", "decided", "written"])
def test_a_failing_scan_is_refused_alone(trained, tmp_path, monkeypatch, function):
    for name in "abc":
        write_nifti(tmp_path / "scans" / name, picture())
    real = getattr(predicting, function)

    def failing(*given):
        texts = [str(getattr(one, "name", getattr(getattr(one, "path", None), "name", one)))[:8] for one in given]
        if any(text in ("b", "b.nii.gz") for text in texts):
            raise MemoryError
        return real(*given)

    monkeypatch.setattr(predicting, function, failing)
    text = predicted(trained, tmp_path / "scans", tmp_path / "out", fails=True)
    assert "b: REFUSED: " in text and "the memory is full" in text and "1 of 3 scans were refused" in text
    assert [row["scan"] for row in rows(tmp_path / "out")] == ["a", "a", "c", "c"]
    assert text.index("a: heart") < text.index("b: REFUSED") < text.index("c: heart")


def test_ctrl_c_ends_what_is_computed_and_finishes_what_is_written(trained, tmp_path, monkeypatch):
    for name in "abc":
        write_nifti(tmp_path / "scans" / name, picture())
    real = predicting.decided

    def stopped(parts, scan, *rest):
        if scan.path.name.startswith("b"):
            raise KeyboardInterrupt
        return real(parts, scan, *rest)

    monkeypatch.setattr(predicting, "decided", stopped)
    with pytest.raises(KeyboardInterrupt):
        predicted(trained, tmp_path / "scans", tmp_path / "out")
    assert [row["scan"] for row in rows(tmp_path / "out")] == ["a", "a"]
    assert not list((tmp_path / "out").glob("~*"))


@pytest.mark.parametrize("box", [None, ((1, 5), (0, 4), (2, 7))])
@pytest.mark.parametrize("stored", ORIENTATIONS[:4])
def test_parts_placed_as_they_are_found_are_where_resampling_puts_them(stored, box):
    rng = np.random.default_rng(0)
    scan = Scan("scan", rng.random((5, 6, 7)).astype(np.float32), affine_of(stored))
    for layout, axis in (("volume", None), ("slices", "x"), ("slices", "z")):
        prepared = prepared_for([scan], Preprocessing("minmax", "LPS", layout=layout, slice_axis=axis), box)
        whole = rng.random((3, *prepared.shape)).astype(np.float32)
        result = np.zeros((3, 5, 6, 7), np.float32)
        result[0] = 1
        for where, part in segmented(prepared, scan, in_slabs(lambda *_, whole=whole: [whole.copy()]), []):
            result[(slice(None), *where)] = part
        (_, expected), *more = planes_on_scan(Prepared(whole, prepared.affine), scan)
        assert not more
        np.testing.assert_array_equal(result, expected)
