"""What is checked of a checkpoint that may come from anywhere, before and after PyTorch reads it."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MAX_RECORDS = 20_000  # the largest run here has 1,700 tensors
FOLDER = 0x10  # in a record's attributes
MAX_PICKLE_BYTES = 2**26  # the names, shapes and numbers beside the tensors; below 1 MiB here
# What torch.save writes. An archive of TorchScript, which is a program, has other records.
RECORD = re.compile(
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|\.format_version|\.storage_\w+)"
)


class DamagedError(Exception):
    """A file is not an intact checkpoint; the text says why."""


def check_archive(path: Path) -> int:
    """Check a file of torch.save without reading it as one: its records, their sizes and every checksum (CRC-32).

    Args:
        path: the file.

    Returns:
        The bytes of all records together, which bound what its tensors can take.

    Raises:
        DamagedError: it is no such file, is damaged, or declares more than it holds.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            total = _check_records(archive.infolist(), path.stat().st_size)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError) as error:
        raise DamagedError(f"no intact zip archive of torch.save: {error}") from None
    if damaged:
        raise DamagedError(f"its record {damaged!r} fails its checksum")
    return total


def _check_records(records: list[zipfile.ZipInfo], file_bytes: int) -> int:
    if len(records) > MAX_RECORDS:
        raise DamagedError(f"{len(records)} records, more than {MAX_RECORDS}")
    names = [record.filename for record in records]
    foreign = [name for name in names if not RECORD.fullmatch(name)]
    if foreign or len(set(names)) < len(names):
        raise DamagedError(f"its record {foreign[0]!r} is none of torch.save" if foreign else "it has a record twice")
    if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
        raise DamagedError("its records are compressed or encrypted, which torch.save does not do")
    if any(record.external_attr & FOLDER for record in records):
        raise DamagedError("a record is marked as a folder, for which PyTorch would read nothing")
    total = sum(record.file_size for record in records)
    pickle_bytes = sum(record.file_size for record in records if record.filename.endswith("/data.pkl"))
    if total > file_bytes or pickle_bytes > MAX_PICKLE_BYTES:
        raise DamagedError(f"its records declare {total} bytes, {pickle_bytes} without tensors, in {file_bytes}")
    return total


def check_payload(payload: Any, archive_bytes: int) -> None:
    """Check what was read from a checkpoint: plain values and dense CPU tensors that the file really held.

    Args:
        payload: from torch.load.
        archive_bytes: from check_archive().

    Raises:
        DamagedError: a value of another kind, or tensors that declare more than the file held.
    """
    storages = {}
    for value in _values(payload):
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise DamagedError(f"a tensor that is {value.layout} on {value.device}, not dense on the CPU")
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if value.numel() * value.element_size() > storage.nbytes():
                raise DamagedError(f"a tensor of the shape {tuple(value.shape)} in {storage.nbytes()} bytes")
        elif not isinstance(value, (str, int, float, type(None))):
            raise DamagedError(f"a value of the type {type(value).__name__}")
    if sum(storages.values()) > archive_bytes:
        raise DamagedError(f"tensors of {sum(storages.values())} bytes in records of {archive_bytes}")


def _values(payload: Any) -> Iterator[Any]:
    """Yield every value in nested dicts, lists and tuples, each container once, however often it is referred to."""
    seen, waiting = set(), [payload]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list, tuple)):
            if id(value) not in seen:
                seen.add(id(value))
                waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        else:
            yield value
