"""DICOM files before a library reads them: which they are, and whether their parts fit into them."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from sdcl.errors import UserError

LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
IMPLICIT, BIG_ENDIAN, DEFLATED = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"
TRANSFER_SYNTAX, PIXELS = (0x0002, 0x0010), (0x7FE0, 0x0010)
META, ITEM = 0x0002, 0xFFFE  # groups: the file's own header, always explicit; parts of sequences, without a VR
UNDEFINED = 0xFFFFFFFF  # length of what ends at a delimiter


def is_dicom(path: Path) -> bool:
    """Tell whether a file begins as DICOM files do."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_files(folder: Path) -> Iterator[Path]:
    """Yield the DICOM files of a folder and its subfolders, by name."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name != "DICOMDIR" and is_dicom(Path(parent) / name):
                yield Path(parent) / name


def check_lengths(path: Path) -> None:
    """Refuse a file one of whose elements says that it is longer than the file: a reader would ask for that memory.

    Args:
        path: a DICOM file. Big-endian and deflated ones, which are hardly found any more, are left to the reader.

    Raises:
        UserError: names the file and the element.

    Source: DICOM PS3.5 chapter 7 (elements, sequences) and annex A (transfer syntaxes), PS3.10 chapter 7.
    """
    size, syntax = path.stat().st_size, b""
    in_pixels = False
    with open(path, "rb") as file:
        file.seek(132)
        while len(head := file.read(8)) == 8:
            tag, vr = struct.unpack("<HH", head[:4]), head[4:6]
            if tag[0] > META and syntax in (BIG_ENDIAN, DEFLATED):
                return
            if tag[0] == ITEM or (tag[0] > META and syntax == IMPLICIT):
                (length,) = struct.unpack("<I", head[4:])
            elif vr in LONG_VRS:
                (length,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
            else:
                (length,) = struct.unpack("<H", head[6:])
            is_container = length == UNDEFINED or (tag[0] == ITEM and not in_pixels)  # walked into, not over
            if length == UNDEFINED and vr == b"UN" and syntax != IMPLICIT and tag[0] != ITEM:
                return  # its contents are written by other rules
            if not is_container and length > size - file.tell():
                raise UserError(
                    f"{path} is damaged: its element ({tag[0]:04x},{tag[1]:04x}) says it has {length} bytes, more "
                    "than are left of the file; copy it again."
                )
            in_pixels = tag == PIXELS or (in_pixels and tag[0] == ITEM)
            if tag == TRANSFER_SYNTAX:
                syntax = file.read(length).strip(b"\0 ")
            elif not is_container:
                file.seek(length, os.SEEK_CUR)
