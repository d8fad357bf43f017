"""Pictures as scans of one slice: PNG, TIFF, 2D DICOM and others, grey or RGB, and their masks, grey or palette."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dataloaders.checks import check_declared
from dataloaders.scans.dicom import guarded
from dataloaders.scans.stills import has_samples, is_still, read_still
from sdcl.runs.atomic import replacing
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

PICTURES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")
STACKS = (".tif", ".tiff")  # which may hold a volume, a page a slice
LOSSY = (".jpg", ".jpeg")
COLOURS = ("red", "green", "blue")  # the channels of a colour picture
GREY = {"1": "L", "L": "L", "LA": "L", "I;16": "I", "I;16B": "I", "I;16L": "I", "I": "I", "F": "F"}  # how each is read
COLOURED = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")
SCALED = {"L;2": 85, "L;4": 17}  # grey of 2 and 4 bits, which Pillow stretches to 255
BLACK = 64  # how far the numbers of a JPEG mask may lie from 0 and 255
NEARLY = 4  # the most that red, green and blue of a grey JPEG differ by
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # TIFF's tag and its value for pictures in which 0 is white
CHANNEL = re.compile(r".+_\d{4}")  # the end of nnU-Net's image names
SIDECAR = ".json"  # the file with the voxel sides of a TIFF volume
ORIENTATION = 0x0112  # EXIF's: how a viewer turns the picture
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # columns to the left, rows to the back; there are no mm


def is_picture(path: Path) -> bool:
    """Tell whether a file is a picture, which has pixels but no mm: by its name, or a DICOM file by its content."""
    if path.name.lower().endswith(PICTURES):
        return not is_stack(path)
    return is_still(path)


def is_stack(path: Path) -> bool:
    """Tell whether a file is a TIFF volume: several pages, and their voxel sides in a file beside it."""
    if not path.name.lower().endswith(STACKS) or spacing_file(path) is None:
        return False
    try:
        with Image.open(path) as picture:
            return getattr(picture, "n_frames", 1) > 1
    except (OSError, ValueError, Image.DecompressionBombError):  # read_picture() says what is the matter
        return False


def spacing_file(path: Path) -> Path | None:
    """Return the file with a TIFF volume's voxel sides: NAME.json, or CASE.json beside CASE_0000.tif (nnU-Net's)."""
    stem = path.name[: path.name.lower().rindex(".tif")]
    names = [stem, stem[:-5]] if CHANNEL.fullmatch(stem) else [stem]
    return next((file for name in names if (file := path.with_name(name + SIDECAR)).is_file()), None)


def read_stack(path: Path, is_label: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read a TIFF volume.

    Args:
        path: of the file; its pages lie one above the other.
        is_label: the numbers of a mask count as read_mask() has them.

    Returns:
        (X, Y, Z) and the affine (4, 4): columns to the left, rows to the back, pages up.

    Raises:
        UserError: the voxel sides are not there or no lengths, or a page is coloured or of another size.
    """
    sides = _sides(path)

    def read(path: Path) -> np.ndarray:
        with _opened(path, pages=True) as picture:
            pages = []
            for number in range(picture.n_frames):
                picture.seek(number)
                _check(path, picture, pages=True)
                if is_label:
                    pages.append(_numbers(path, picture))
                elif _is_coloured(picture):
                    raise UserError(f"{path} holds colours, and one number a voxel is needed here: save it as grey.")
                else:
                    pages.append(np.asarray(picture.convert(GREY[picture.mode])).astype(np.float32))
                if pages[-1].shape != pages[0].shape:
                    raise UserError(f"{path}: its page {number + 1} has another size than the first: save them alike.")
            return np.stack(pages).T

    _tell_sides(path.parent, sides)
    return guarded(path, read), AFFINE @ np.diag([*sides, 1.0])


@lru_cache
def _tell_sides(folder: Path, sides: tuple[float, ...]) -> None:
    """Log the sides that the files of a folder give, each once."""
    shown = "×".join(f"{side:g}" for side in sides)
    LOGGER.info("%s: TIFF volumes with voxels of %s mm along x (columns), y (rows) and z (pages)", folder, shown)


def _sides(path: Path) -> tuple[float, float, float]:
    """Return a TIFF volume's voxel sides along x, y and z, from {"spacing": [z, y, x]} or {"spacing_mm": [x, y, z]}."""
    file = spacing_file(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        given = content["spacing_mm"] if "spacing_mm" in content else content["spacing"][::-1]
        sides = tuple(float(side) for side in given)
        if len(sides) != 3 or not all(0 < side < np.inf for side in sides):
            raise ValueError(f"it holds {given}")
        return sides
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{file} does not give the voxel sides of {path.name} ({error}): write {{"spacing": [z, y, x]}} in mm, as '
            'nnU-Net does, or {"spacing_mm": [x, y, z]}.'
        ) from None


def read_picture(path: Path, count: int | None = None) -> list[np.ndarray]:
    """Read a picture as scans of one slice.

    Args:
        path: the file.
        count: channels that are wanted; None: one of a picture whose red, green and blue are the same, else three.

    Returns:
        float32 (W, H, 1), of a grey picture one, of a colour picture red, green and blue; transparency is left out.

    Raises:
        UserError: it cannot be read, or holds several pages.
    """
    array, is_lossy = guarded(path, _array)
    if array.ndim == 3 and count != len(COLOURS) and (grey := _as_grey(array, is_lossy)) is not None:
        array = grey
    channels = [array] if array.ndim == 2 else [array[:, :, k] for k in range(3)]
    return [channel.T[:, :, None].astype(np.float32) for channel in channels]


def _array(path: Path) -> tuple[np.ndarray, bool]:
    """Return a picture, (rows, columns) or, where it is stored in colours, (rows, columns, 3); and if it is lossy."""
    if is_still(path):
        return read_still(path)
    with _opened(path) as picture:
        array = np.asarray(picture.convert("RGB" if _is_coloured(picture) else GREY[picture.mode]))
        return array, picture.format == "JPEG"


def _as_grey(array: np.ndarray, is_lossy: bool) -> np.ndarray | None:
    """Return a picture in colours as a grey one, if red, green and blue are the same; else None."""
    if np.ptp(array.astype(np.int16), axis=2).max(initial=0) > (NEARLY if is_lossy else 0):
        return None
    return np.rint(array.mean(axis=2)) if is_lossy else array[:, :, 0]


def read_mask(path: Path) -> np.ndarray:
    """Read a mask: the numbers of a grey picture's pixels, or of a palette's entries; (W, H, 1).

    The stored numbers count, also where 0 is white. A picture in colours counts as grey where it is grey throughout.
    The numbers of a JPEG mask count only where all lie near 0 and 255, which they then are.

    Raises:
        UserError: it cannot be read, holds colours, or is of a format that changes numbers.
    """

    def read(path: Path) -> np.ndarray:
        if is_still(path):
            array, is_lossy = read_still(path)
            grey = array if array.ndim == 2 else None if is_lossy else _as_grey(array, False)
            if grey is None:
                raise UserError(f"{path} holds colours, and a mask's pixels are numbers: export it as a grey picture.")
            return grey.T[:, :, None]
        with _opened(path) as picture:
            if picture.format == "JPEG":
                return _black_and_white(path, picture).T[:, :, None]
            return _numbers(path, picture).T[:, :, None]

    return guarded(path, read)


def _black_and_white(path: Path, picture: Image.Image) -> np.ndarray:
    """Return the numbers 0 and 255 of a JPEG mask (rows, columns), whose compression changed them a little.

    Raises:
        UserError: other numbers are there, too.
    """
    array = np.asarray(picture.convert("RGB"))
    grey = _as_grey(array, is_lossy=True)
    if grey is None or ((grey > BLACK) & (grey < 255 - BLACK)).any() or grey.max() <= BLACK:
        raise UserError(f"{path} is JPEG, which changes a mask's numbers: give masks as PNG or TIFF.")
    return np.where(grey > 127, 255, 0).astype(np.uint8)


def _numbers(path: Path, picture: Image.Image) -> np.ndarray:
    """Return a mask's numbers (rows, columns)."""
    if picture.mode in ("LA", "RGBA") and len(set(picture.getchannel("A").getextrema())) > 1:
        raise UserError(f"{path} has transparent pixels, which may be the mask: save the mask as grey numbers.")
    if picture.mode not in ("P", *GREY):
        grey = _as_grey(np.asarray(picture.convert("RGB")), False)
        if grey is None:
            raise UserError(
                f"{path} holds colours ({picture.mode}), and a mask's pixels are numbers: save it as a grey or a "
                "palette picture."
            )
        return grey
    if picture.mode == "P" and picture.format == "GIF" and not _is_inverted(picture):
        grey = _as_grey(np.asarray(picture.convert("RGB")), False)  # GIF writers number a palette's entries anew
        if grey is not None:
            return grey
    raw = _raw_mode(picture)
    is_turned = _is_inverted(picture) and ";" in raw and "I" in raw.split(";")[-1] and picture.mode in ("1", "L")
    scale = 255 if picture.mode == "1" else SCALED.get(raw[:3], 1)
    array = np.asarray(picture if picture.mode in ("P", "F") else picture.convert(GREY[picture.mode]))
    array = 255 - array if is_turned else array  # back to what is stored
    return array if scale == 1 else array // scale


def _is_inverted(picture: Image.Image) -> bool:
    """Tell whether a grey picture is stored with 0 as white, by TIFF's photometric interpretation or a palette."""
    if picture.format == "TIFF" and picture.mode in GREY:
        return picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if picture.mode != "P":
        return False
    palette = np.reshape(picture.getpalette("RGB"), (-1, 3))
    if picture.format == "GIF":  # whose writers put colours into any order
        return len(palette) == 256 and bool((palette == 255 - np.arange(256)[:, None]).all())
    return bool((np.ptp(palette, axis=1) == 0).all() and palette[0, 0] > 127)


def colours_of(paths: Mapping[str, Path], tell: bool = True) -> tuple[str, ...]:
    """Return the channels of a data set's pictures: red, green and blue, or none of their own.

    Pictures that are stored in colours and grey throughout are grey, unless others of the data set have colours.

    Args:
        paths: case to picture.
        tell: log that pictures stored in colours are grey.

    Raises:
        UserError: some hold colours and some are stored as grey.
    """
    kinds: dict[bool, list[Path]] = {}
    for path in paths.values():
        if is_picture(path):
            kinds.setdefault(guarded(path, _has_colours), []).append(path)
    stored = kinds.get(True, [])
    coloured = next((path for path in stored if len(read_picture(path)) > 1), None)
    if coloured is None:
        if stored and tell:
            LOGGER.info(
                "NOTE: %d pictures are stored in colours and are grey (red = green = blue), such as %s: each is one "
                "grey channel", len(stored), stored[0],
            )  # fmt: skip
        return ()
    if False in kinds:
        raise UserError(f"{coloured} holds colours and {kinds[False][0]} is grey: convert all alike.")
    return COLOURS


def check_palettes(paths: Iterable[Path]) -> None:
    """Refuse masks that do not mean the same colour by the same number, such as 0 by white in some and black in others.

    Raises:
        UserError: names two masks.
    """
    colours: dict[int, tuple[tuple[int, ...], Path]] = {}
    polarities: dict[bool, list[Path]] = {}
    paths = list(paths)
    lossy = [path for path in paths if path.name.lower().endswith(LOSSY)]
    if lossy:
        LOGGER.info("NOTE: %d masks are JPEG, such as %s: their numbers are taken as 0 and 255", len(lossy), lossy[0])
    for path in paths:
        if not is_picture(path) or is_still(path):
            continue
        for number, colour in guarded(path, _used_colours).items():
            there, other = colours.setdefault(number, (colour, path))
            if there != colour:
                raise UserError(
                    f"the number {number} is the colour {there} in {other} and {colour} in {path}: save all masks with "
                    "one palette, or as grey pictures."
                )
        polarities.setdefault(guarded(path, _shows_zero_white), []).append(path)
    if len(polarities) > 1:
        raise UserError(
            f"0 is white in {polarities[True][0]} and black in {polarities[False][0]} (an inverting table): save all "
            "masks alike."
        )
    if True in polarities:
        inverted = polarities[True]
        LOGGER.info(
            "NOTE: %d masks are stored with an inverting table, 0 as white, such as %s: the stored numbers count, 0 is "
            "the background", len(inverted), inverted[0],
        )  # fmt: skip


def _shows_zero_white(path: Path) -> bool:
    with _opened(path) as picture:
        return _is_inverted(picture)


def _used_colours(path: Path) -> dict[int, tuple[int, ...]]:
    """Return the colours (r, g, b) of the numbers that a palette mask holds; nothing of a grey one."""
    with _opened(path) as picture:
        is_gif = picture.format == "GIF"
        if picture.mode != "P" or (is_gif and _as_grey(np.asarray(picture.convert("RGB")), False) is not None):
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
    if is_still(path):
        return has_samples(path)
    with _opened(path) as picture:
        return _is_coloured(picture)


def _is_coloured(picture: Image.Image) -> bool:
    return picture.mode not in GREY


def _opened(path: Path, pages: bool = False) -> Image.Image:
    """Open a picture; nothing of it is decoded yet.

    Args:
        path: the file.
        pages: it may have several.

    Raises:
        UserError: it has several pages, another kind of pixels, or declares more than it can hold.
    """
    try:
        picture = Image.open(path)
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more pixels than are read at once: cut it into smaller pictures.") from None
    try:
        _check(path, picture, pages)
    except BaseException:
        picture.close()
        raise
    return picture


def _raw_mode(picture: Image.Image) -> str:
    """Return how a picture's pixels are stored, such as "RGB;16B"; "" where its format does not say."""
    stored = picture.tile[0][3] if getattr(picture, "tile", None) else ""
    return str(stored[0] if isinstance(stored, tuple) and stored else stored)


def _check(path: Path, picture: Image.Image, pages: bool = False) -> None:
    """Refuse what cannot be read as it is meant; see _opened()."""
    count = getattr(picture, "n_frames", 1)
    if count > 1 and not pages:
        is_stack = path.name.lower().endswith(STACKS)
        way_out = f', or put its voxel sides beside it as {path.stem}.json: {{"spacing": [z, y, x]}}' * is_stack
        raise UserError(f"{path} holds {count} pages: save each as a picture, or the stack as NIfTI{way_out}.")
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
    shape = (*picture.size, len(picture.getbands()), count if pages else 1)
    check_declared(path, "its header", shape, 1, path.stat().st_size)
