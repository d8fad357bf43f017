"""Pictures as scans of one slice: PNG, TIFF and others, grey or RGB, and their masks, grey or palette."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataloaders.checks import check_declared
from dataloaders.scans.dicom import guarded
from sdcl.runs.atomic import replacing
from sdcl.runs.errors import UserError

PICTURES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
LOSSY = (".jpg", ".jpeg")
COLOURS = ("red", "green", "blue")  # the channels of a colour picture
GREY = {"1": "L", "L": "L", "LA": "L", "I;16": "I", "I;16B": "I", "I;16L": "I", "I": "I", "F": "F"}  # how each is read
COLOURED = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")
SCALED = {"L;2": 85, "L;4": 17}  # grey of 2 and 4 bits, which Pillow stretches to 255
ORIENTATION = 0x0112  # EXIF's: how a viewer turns the picture
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the left, rows to the back; there are no mm


def is_picture(path: Path) -> bool:
    """Tell whether a file's name is that of a picture, which has pixels but no mm."""
    return path.name.lower().endswith(PICTURES)


def read_picture(path: Path) -> list[np.ndarray]:
    """Read a picture as scans of one slice.

    Returns:
        float32 (W, H, 1), of a grey picture one, of a colour picture red, green and blue; transparency is left out.

    Raises:
        UserError: it cannot be read, or holds several pages.
    """

    def read(path: Path) -> list[np.ndarray]:
        with _opened(path) as picture:
            if _is_coloured(picture):
                array = np.asarray(picture.convert("RGB"))
                return [array[:, :, k].T[:, :, None].astype(np.float32) for k in range(3)]
            return [np.asarray(picture.convert(GREY[picture.mode])).T[:, :, None].astype(np.float32)]

    return guarded(path, read)


def read_mask(path: Path) -> np.ndarray:
    """Read a mask: the numbers of a grey picture's pixels, or of a palette's entries; (W, H, 1).

    Raises:
        UserError: it cannot be read, holds colours, or is of a format that changes numbers.
    """
    if path.name.lower().endswith(LOSSY):
        raise UserError(f"{path} is JPEG, which changes a mask's numbers: give masks as PNG or TIFF.")

    def read(path: Path) -> np.ndarray:
        with _opened(path) as picture:
            if picture.mode not in ("P", *GREY):
                raise UserError(
                    f"{path} holds colours ({picture.mode}), and a mask's pixels are numbers: save it as a grey or a "
                    "palette picture."
                )
            scale = 255 if picture.mode == "1" else SCALED.get(_raw_mode(picture), 1)
            array = np.asarray(picture if picture.mode in ("P", "F") else picture.convert(GREY[picture.mode]))
            return (array if scale == 1 else array // scale).T[:, :, None]

    return guarded(path, read)


def colours_of(paths: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the channels of a data set's pictures by their headers: red, green and blue, or none of their own.

    Args:
        paths: case to picture.

    Raises:
        UserError: some hold colours and some do not.
    """
    kinds: dict[bool, Path] = {}
    for path in paths.values():
        if is_picture(path):
            kinds.setdefault(guarded(path, _has_colours), path)
    if len(kinds) > 1:
        raise UserError(f"{kinds[True]} holds colours and {kinds[False]} is grey: convert all alike.")
    return COLOURS if True in kinds else ()


def check_palettes(paths: Iterable[Path]) -> None:
    """Refuse palette masks that do not mean the same colour by the same number: some programs number them anew.

    Raises:
        UserError: names two masks and the number.
    """
    colours: dict[int, tuple[tuple[int, ...], Path]] = {}
    for path in paths:
        if not is_picture(path):
            continue
        for number, colour in guarded(path, _used_colours).items():
            there, other = colours.setdefault(number, (colour, path))
            if there != colour:
                raise UserError(
                    f"the number {number} is the colour {there} in {other} and {colour} in {path}: save all masks with "
                    "one palette, or as grey pictures."
                )


def _used_colours(path: Path) -> dict[int, tuple[int, ...]]:
    """Return the colours (r, g, b) of the numbers that a palette mask holds; nothing of a grey one."""
    with _opened(path) as picture:
        if picture.mode != "P":
            return {}
        palette = np.reshape(picture.getpalette("RGB"), (-1, 3))
        return {int(number): tuple(map(int, palette[number])) for number in np.unique(np.asarray(picture))}


def save_mask(path: Path, label: np.ndarray, colours: Sequence[Sequence[int]]) -> None:
    """Write a mask as a PNG that shows its classes and holds their numbers.

    Args:
        path: the file.
        label: (W, H, 1), uint8 or larger.
        colours: (r, g, b) in [0, 255] of the numbers 0, 1, ...; without more than 256 of them a palette.
    """
    pixels = label[:, :, 0].T
    if pixels.max(initial=0) < 256 and len(colours) <= 256:
        picture = Image.fromarray(pixels.astype(np.uint8), "L")
        picture.putpalette([int(value) for colour in colours for value in colour])
    else:
        picture = Image.fromarray(pixels.astype(np.uint16))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _has_colours(path: Path) -> bool:
    with _opened(path) as picture:
        return _is_coloured(picture)


def _is_coloured(picture: Image.Image) -> bool:
    return picture.mode not in GREY


def _opened(path: Path) -> Image.Image:
    """Open a picture; nothing of it is decoded yet.

    Raises:
        UserError: it has several pages, another kind of pixels, or declares more than it can hold.
    """
    try:
        picture = Image.open(path)
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more pixels than are read at once: cut it into smaller pictures.") from None
    try:
        _check(path, picture)
    except BaseException:
        picture.close()
        raise
    return picture


def _raw_mode(picture: Image.Image) -> str:
    """Return how a picture's pixels are stored, such as "RGB;16B"; "" where its format does not say."""
    stored = picture.tile[0][3] if getattr(picture, "tile", None) else ""
    return str(stored[0] if isinstance(stored, tuple) and stored else stored)


def _check(path: Path, picture: Image.Image) -> None:
    """Refuse what cannot be read as it is meant; see _opened()."""
    if getattr(picture, "n_frames", 1) > 1:
        raise UserError(f"{path} holds {picture.n_frames} pages: save each as a picture, or the stack as NIfTI.")
    if picture.mode not in GREY and picture.mode not in COLOURED:
        raise UserError(f"{path} holds pixels of the kind {picture.mode}: save it as a grey or RGB picture.")
    if ";16" in _raw_mode(picture) and len(picture.getbands()) > 1:
        raise UserError(
            f"{path} holds 16 bits a colour, of which 8 would be read: save it with 8, or each channel as a grey one."
        )
    may_ask = picture.format != "PNG" or "exif" in picture.info  # a PNG would be decoded for it
    if may_ask and (turned := picture.getexif().get(ORIENTATION, 1)) not in (0, 1):
        raise UserError(
            f"{path} is to be shown turned (EXIF orientation {turned}), and its mask may be or not: save it turned, "
            "without that mark."
        )
    check_declared(path, "its header", (*picture.size, len(picture.getbands())), 1, path.stat().st_size)
