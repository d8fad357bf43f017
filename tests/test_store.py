"""Decoded files stay within --cache_gb; beyond it they are decoded once into a file that ends with the run."""

import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write_h5

from dataloaders import cache, store
from dataloaders.cache import Cache, Decoding
from dataloaders.streams import Order, Streams
from dataloaders.transforms import Cropping
from dataloaders.volumes import CroppedVolumes

SHAPE = (20, 16, 12)
ENTRY = 4 * 20 * 16 * 12 + 20 * 16 * 12  # bytes of one image and label, a multiple of the alignment
COUNT = 6


@pytest.fixture
def paths(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    return [
        write_h5(folder / f"{k}.h5", image=rng.random(SHAPE, np.float32), label=rng.integers(2, size=SHAPE, dtype="u1"))
        for k in range(COUNT)
    ]


@pytest.fixture
def decoded(monkeypatch):
    """Count the decodings of each file."""
    counts, whole = Counter(), cache.read_sample
    monkeypatch.setattr(cache, "read_sample", lambda path, **how: counts.update([path.stem]) or whole(path, **how))
    return counts


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Use pieces of memory that hold two entries, and a disk that is small enough to be left enough of."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 2 * ENTRY + 100)
    monkeypatch.setattr(store, "SPARE_BYTES", 2**20)


def made(paths, entries, folder=None):
    """Return a cache that holds so many entries in memory, and the others in a file in a folder."""
    made = Cache(paths, "labelled volumes", 3, Decoding(2, True, entries * ENTRY / 2**30))
    if folder is not None:
        made.open_file(folder)
    return made


def read(one):
    return [(s.image.tobytes(), s.label.tobytes(), s.shape, s.image.dtype) for s in map(one.__getitem__, range(COUNT))]


def test_the_bound_is_that_of_what_is_held(paths):
    for entries in (0, 1, 2.5, 5, 100):
        one = made(paths, entries)
        kept = min(int(entries), COUNT)
        assert one._store.held == kept * ENTRY <= entries * ENTRY and one.waiting_bytes == 0
        pieces = {id(piece): len(piece) for piece, _ in one._store._places if piece is not None}
        assert sum(pieces.values()) <= (-(-kept // 2)) * (2 * ENTRY + 100)
        assert [one._store.get(k) is not None for k in range(COUNT)] == [k < kept for k in range(COUNT)]


def test_samples_are_the_same_whichever_way(paths, tmp_path):
    ways = [made(paths, 100), made(paths, 2), made(paths, 0), made(paths, 2, tmp_path), made(paths, 0, tmp_path)]
    first = read(ways[0])
    for way in ways:
        assert read(way) == first and read(way) == first
        for kept in filter(None, map(way._store.get, range(COUNT))):
            with pytest.raises(ValueError, match="read-only"):
                kept[0][...] = 0


def test_beyond_the_bound_a_file_is_decoded_once(paths, tmp_path, decoded, said):
    one = made(paths, 2, tmp_path)
    assert "labelled volumes beyond --cache_gb are decoded once, into a file on the disk of" in said()
    for _ in range(4):
        read(one)
    assert decoded == {str(k): 1 if k < 2 else 2 for k in range(COUNT)}  # once to be checked, once to be kept
    bare = made(paths, 2)
    read(bare)
    read(bare)
    assert decoded["5"] == 2 + 3  # without a file at each reading


def test_all_within_the_bound_need_no_file(paths, tmp_path, said):
    made(paths, 100, tmp_path)
    assert "beyond" not in said()


def test_a_full_disk_is_told_and_files_are_decoded_again(paths, tmp_path, decoded, said, monkeypatch):
    free = SimpleNamespace(free=store.SPARE_BYTES + 3 * ENTRY)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: free)
    one = made(paths, 2, tmp_path)
    assert said().count("their files are decoded at each reading") == 1
    first = read(one)
    assert read(one) == first and decoded["5"] == 3
    made(paths, 4, tmp_path)
    assert "decoded once" in said()  # two entries fit


def test_a_folder_that_cannot_be_written_is_told(paths, tmp_path, said):
    (tmp_path / "file").write_text("")
    one = made(paths, 2, tmp_path / "file" / "none")
    assert "cannot wait on the disk of" in said()
    assert read(one) == read(made(paths, 100))


def test_a_disk_that_fills_up_is_told_once(paths, tmp_path, said, monkeypatch):
    one, write, room = made(paths, 2, tmp_path), os.pwrite, [2 * ENTRY]

    def until_full(descriptor, data, offset):
        if room[0] < len(data):
            raise OSError(28, "No space left on device")
        room[0] -= len(data)
        return write(descriptor, data, offset)

    monkeypatch.setattr(store.os, "pwrite", until_full)
    said()
    assert read(one) == read(one) == read(made(paths, 100))
    assert said().count("no more decoded files are kept on disk") == 1
    assert [one._store.get(k) is not None for k in range(COUNT)] == [True] * 4 + [False] * 2


def test_short_writes_are_gone_on_with(paths, tmp_path, monkeypatch):
    one, write = made(paths, 0, tmp_path), os.pwrite
    monkeypatch.setattr(store.os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:1000], offset))
    assert read(one) == read(one) == read(made(paths, 100))


def test_the_file_has_no_name_and_what_a_kill_left_is_removed(paths, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{store.PREFIX}abc").write_bytes(b"")
    (folder / "config.json").write_text("{}")
    store.remove_files(folder)
    one = made(paths, 0, folder)
    read(one)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_file(tmp_path):
    code = (
        "import sys, pathlib; from dataloaders.store import Store\n"
        "import dataloaders.store as s; s.SPARE_BYTES = 0\n"
        "one = Store(1, 0); one.add(('float32', (1000, 1000))); one.open_file(pathlib.Path(sys.argv[1]), 'x')\n"
        "import numpy as np; assert one.put(0, [np.ones((1000, 1000), 'f')]); print(one.get(0)[0].sum(), flush=True)\n"
        "input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert float(process.stdout.readline()) == 1e6
    open_files = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
    assert any(str(tmp_path) in name and "deleted" in name for name in open_files)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.iterdir())


def test_no_memory_is_a_sentence(monkeypatch):
    one = store.Store(1, 2**20)

    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(store.mmap, "mmap", refuse)
    with pytest.raises(store.UserError, match="there is no memory for decoded files .*: lower --cache_gb"):
        one.add(("float32", (10,)))


def test_a_process_that_is_not_forked_begins_with_empty_places(paths):
    one = made(paths, 3)
    again = pickle.loads(pickle.dumps(one))
    assert again._store.held == one._store.held and again._store.get(0) is None
    assert read(again) == read(one)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked there alone")
def test_processes_that_prepare_batches_share_what_they_decode(paths, tmp_path):
    named = {path.stem: path for path in paths}

    def volumes(entries):
        return CroppedVolumes(named, Decoding(2, True, entries * ENTRY / 2**30), Cropping((8, 8, 8)))

    expected = list(Streams(volumes(100), None, Order(2, 4, seed=1)).batches(0, 12))
    shared = volumes(2)
    shared.cache.open_file(tmp_path)
    order = Order(2, 4, seed=1, workers=2, device="cpu")
    for one, other in zip(Streams(shared, None, order).batches(0, 12), expected, strict=True):
        assert all((one[key] == other[key]).all() for key in other)
    assert all(shared.cache._store.get(k) is not None for k in range(COUNT))  # this process has decoded none of these
