"""What a converted file was made of: the raw files' sizes and hashes, by which a change of theirs is seen."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataloaders.files import read_text_attributes
from dataloaders.scans.pictures import is_stack, spacing_file
from dataloaders.scans.preprocessing import Preprocessing
from sdcl.runs.errors import UserError

DETACHED = (".nhdr", ".mhd")  # headers whose voxels lie in a file beside them
BLOCK = 2**20  # bytes


def files_of(*paths: Path) -> list[Path]:
    """Return the files that a scan's channels or a label consist of, in an order that does not depend on the system."""
    return [file for path in paths for file in _files_of(path)]


def _files_of(path: Path) -> list[Path]:
    if files := getattr(path, "files", ()):  # of a DICOM series, which others may lie beside
        return sorted(files, key=lambda p: p.as_posix())
    if path.is_dir():
        return sorted((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix())
    if path.suffix.lower() in DETACHED:
        return sorted(p for p in path.parent.iterdir() if p.is_file() and p.name.split(".")[0] == path.stem)
    return [path, spacing_file(path)] if is_stack(path) else [path]


def size_of(*paths: Path) -> int:
    """Return the bytes that a scan's channels or a label take."""
    return sum(file.stat().st_size for file in files_of(*paths))


def hash_of(*paths: Path) -> str:
    """Return the SHA-256 of a scan's or label's content, of a folder file by file, of channels one after the other."""
    whole = hashlib.sha256()
    for file in files_of(*paths):
        with file.open("rb") as opened:
            while block := opened.read(BLOCK):
                whole.update(block)
    return whole.hexdigest()


def fingerprint(*paths: Path) -> str:
    """Return size and hash as one text, "" without a path, as a converted file's attributes keep it."""
    return f"{size_of(*paths)} bytes, sha256 {hash_of(*paths)}" if paths else ""


def is_same(paths: Sequence[Path], kept: str) -> bool:
    """Tell whether a scan or label is still the one of a fingerprint; a hash is only taken where the size agrees."""
    if not paths or not kept:
        return not paths and not kept
    try:
        return kept.startswith(f"{size_of(*paths)} bytes,") and kept == fingerprint(*paths)
    except OSError:  # its conversion will say what is the matter
        return False


def change_since(target: Path, images: Sequence[Path], label: Path | None, made_by: Mapping[str, Any]) -> str:
    """Say in what a converted file differs from what would be made now.

    Args:
        target: the converted file.
        images: its raw image, or its channels.
        label: its raw label.
        made_by: attributes that it would get, those that say how it is made.

    Returns:
        "" for none, "unknown" for a file that does not say what it was made of, else what is new.
    """
    names = ("source_fingerprint", "label_fingerprint", "label_source", *made_by)
    try:
        of_image, of_label, label_source, *made = read_text_attributes(target, *names)
    except UserError:
        return "the file, which cannot be read,"
    if label_source is not None and bool(label_source) != (label is not None):
        return "the label"
    for (name, wanted), there in zip(made_by.items(), made, strict=True):
        if there is not None and not _agree(name, there, wanted):
            return "the way of making it"
    if of_image is None or of_label is None:
        return "unknown"
    if not is_same(images, of_image):
        return "the image"
    return "" if is_same(() if label is None else (label,), of_label) else "the label"


def _agree(name: str, there: str, wanted: str) -> bool:
    """Compare attributes; the preprocessing by its fields, since more came to be."""
    if name != "preprocessing":
        return there == wanted
    try:
        return Preprocessing.from_dict(json.loads(there)).to_json() == wanted
    except (ValueError, TypeError):
        return False
