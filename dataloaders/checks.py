"""What every reader checks of names, sizes and arrays that come from files; each message ends with the way out."""

import os
import re
import stat
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from sdcl.runs.errors import UserError

MAX_VOXELS = 2**30  # of one array, 1024 x 1024 x 1024; the largest CT here has 2**27
MAX_RATIO = 1100  # of decoded to stored bytes: deflate cannot exceed 1032, so that more was never stored
FREE_BYTES = 2**26  # an array up to this size may be stored in nothing at all
MAX_POINTER_BYTES = 2**10  # begins a git-lfs pointer
REDO = "convert the case again"
# What some system's paths give a meaning, what ends a line of a list, and half characters, which no list can hold.
NOT_IN_A_NAME = re.compile(r'[\x00-\x1f\x7f-\x9f\\:*?"<>|\ufffd\u2028\u2029\ud800-\udfff]')
MAX_NAME_BYTES = 200  # so that a file's name, with slice and suffix, stays below the 255 that systems allow


LFS = b"version https://git-lfs.github.com/spec/"  # begins a git-lfs pointer, which stands for a file not loaded yet


def is_lfs_pointer(path: Path) -> bool:
    """Tell whether a file is a git-lfs pointer instead of the data."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False


def check_is_loaded(path: Path) -> None:
    """Refuse a git-lfs pointer.

    Raises:
        UserError: says what to do.
    """
    if is_lfs_pointer(path):
        raise UserError(f"{path} is a git-lfs pointer, not the data: run git lfs pull.")


def check_file(path: Path) -> os.stat_result:
    """Refuse what is not a plain file, before anything opens it: a pipe would wait forever.

    Args:
        path: the file.

    Returns:
        What the system says of it, such as its size.

    Raises:
        UserError: it is missing, empty, a folder, a device or a git-lfs pointer.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: restore it, or take its name out of the list.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be reached ({error}): check its path and permissions.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file: put the case's file in its place, or take it out of the list.")
    if status.st_size == 0:
        raise UserError(f"{path} is empty: copy or {REDO}.")
    if status.st_size < MAX_POINTER_BYTES:
        check_is_loaded(path)
    return status


def name_fault(name: str) -> str:
    """Say why a case cannot be called so, or "": in lists, in files' names, in folders of any system."""
    bad = NOT_IN_A_NAME.search(name)
    if bad:
        return f"it has the character {bad[0]!r}"
    if name != name.strip() or not name:
        return "it begins or ends with a space, or is empty"
    if name.startswith(("/", "~")) or ".." in name.split("/"):
        return "it leads out of its folder"
    is_long = len(name.encode()) > MAX_NAME_BYTES
    return f"it takes more than {MAX_NAME_BYTES} bytes" if is_long else ""


def check_name(name: str, where: Path) -> None:
    """Refuse a case's name that could lead out of the data's folder.

    Args:
        name: as a list gives it.
        where: the list, for the message.

    Raises:
        UserError: the name is absolute, has `..`, or characters that no case's name has.
    """
    if name_fault(name):
        raise UserError(
            f"the list {where} names {name[:80]!r}, which is no case's name or leaves the data's folder: "
            "write names as the files have them, without a path."
        )


def inside(folder: Path, relative: str) -> Path:
    """Return the path of a case's file, and refuse one that leads out of the folder, by its name or by a link.

    The folder as a whole may be a link to elsewhere.

    Args:
        folder: that holds all cases.
        relative: the file's path in it.

    Raises:
        UserError: the path leaves the folder.
    """
    path = folder / relative
    if _stays(folder, relative):
        return path
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a link in a circle, or a name that is no path
        is_inside = False
    if not is_inside:
        raise UserError(
            f"{path} leads out of {folder}: copy the case there, or make the whole folder a link to where the data are."
        )
    return path


def _stays(folder: Path, relative: str) -> bool:
    """Tell whether a file lies in a folder just as its name says, with no link on the way, which is soon seen."""
    parts = PurePath(relative).parts
    if ".." in parts or PurePath(relative).is_absolute() or PurePath(relative).drive:
        return False
    way = os.fspath(folder)
    for part in parts:
        way = os.path.join(way, part)
        if os.path.islink(way):
            return False
    return "\0" not in relative


def check_declared(path: Path, what: str, shape: tuple[int, ...], item_bytes: int, stored_bytes: int) -> None:
    """Refuse an array that declares more than it can hold, before it is read.

    Args:
        path: the file, for the message.
        what: the array's name in it.
        shape: as declared.
        item_bytes: of one number.
        stored_bytes: that the array takes in the file, compressed or not.

    Raises:
        UserError: it declares more than MAX_VOXELS, or far more than deflate could have stored in so few bytes.
    """
    count = 1
    for side in shape:
        count *= int(side)  # whole numbers without a bound, unlike numpy's
    if count > MAX_VOXELS:
        raise UserError(f"{path}: {what} declares {count} voxels, more than the {MAX_VOXELS} allowed: crop the case.")
    if count * item_bytes > max(FREE_BYTES, MAX_RATIO * stored_bytes):
        raise UserError(
            f"{path}: {what} declares {count * item_bytes} bytes, but only {stored_bytes} are stored: "
            f"copy the file again, or {REDO}."
        )


def check_image(path: Path, what: str, image: np.ndarray, ndim: int) -> np.ndarray:
    """Check an image and return it as float32.

    Args:
        path: the file, for the message.
        what: the array's name in it.
        image: as read.
        ndim: dimensions that it must have.

    Raises:
        UserError: other dimensions, no numbers, nan or infinite values.
    """
    if not isinstance(image, np.ndarray) or image.ndim != ndim or 0 in image.shape:
        raise UserError(
            f"{path}: {what} has the shape {np.shape(image)}, it needs {ndim} dimensions: convert it again."
        )
    if image.dtype.kind not in "fiu":
        raise UserError(f"{path}: {what} has the type {image.dtype}, it needs numbers: {REDO}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
        image = np.ascontiguousarray(image, np.float32)
    if not (np.isfinite(image.min()) and np.isfinite(image.max())):  # nan if any is
        raise UserError(f"{path}: {what} holds nan or infinite values: {REDO}.")
    return image


def check_varies(path: Path, what: str, image: np.ndarray) -> None:
    """Refuse an image that shows nothing: the same value everywhere.

    Args:
        path: the file, for the message.
        what: the array's name in it.
        image: from check_image().

    Raises:
        UserError: there is one value.
    """
    if image.min() == image.max():
        raise UserError(f"{path}: {what} is {image.flat[0]:g} everywhere: {REDO}, or take it out of the list.")


def check_label(path: Path, what: str, label: np.ndarray, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    """Check a label map and return it as uint8.

    Args:
        path: the file, for the message.
        what: the array's name in it.
        label: as read.
        shape: of the image.
        num_classes: values must lie in [0, num_classes).

    Raises:
        UserError: another shape, no numbers, fractions, or classes that there are not.
    """
    if np.shape(label) != shape:
        raise UserError(f"{path}: {what} {np.shape(label)} and `image` {shape} differ in shape: convert it again.")
    if label.dtype.kind not in "fiub":
        raise UserError(f"{path}: {what} has the type {label.dtype}, it needs whole numbers: {REDO}.")
    outside = ~((label >= 0) & (label < num_classes))  # nan is outside too
    outside |= label != np.floor(label) if label.dtype.kind == "f" else False
    if outside.any():
        raise UserError(
            f"{path}: {what} holds {label[outside].flat[0]}, outside the classes 0 to {num_classes - 1}: "
            f"correct the label, or {REDO}."
        )
    return np.ascontiguousarray(label, np.uint8)


def check_apart(train: list[str], others: dict[Path, list[str]], where: Path) -> None:
    """Refuse lists that share a case, or a patient's name up to the first `_`.

    Args:
        train: names, or patients, of the training list.
        others: the same of lists that training must not see.
        where: the training list, for the message.

    Raises:
        UserError: names the first that two lists share.
    """
    for path, names in others.items():
        both = sorted(set(train) & set(names))
        if both:
            raise UserError(f"{where} and {path.name} both name {both[0]}: take it out of one of them.")


def check_dimensions(config: Any, ndim: int) -> None:
    """Refuse a patch or a network that is not made for images of so many dimensions.

    Raises:
        UserError: names the flag.
    """
    if len(config.patch_size) != ndim:
        raise UserError(f"--patch_size has {len(config.patch_size)} sides, these images are {ndim}D: give {ndim}.")
    fitting = {2: ("unet", "resunet"), 3: ("vnet", "resvnet", "vnet_lowres", "resvnet_lowres")}[ndim]
    for flag in ("student_a", "student_b"):
        if getattr(config, flag) not in fitting:
            raise UserError(f"--{flag} {getattr(config, flag)} is not for {ndim}D images: choose {', '.join(fitting)}.")
