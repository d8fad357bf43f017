"""Images of several channels: which files make a case, and their reading onto one grid."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dataloaders.scans.finding import VolumePath
from dataloaders.scans.pictures import AFFINE, is_picture, read_picture
from dataloaders.scans.reading import Scan, aligned_label, count_volumes, read_scan
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER

FIRST = "_0000"  # that nnU-Net's image names end with, and its label names do not
NUMBERED = re.compile(r"(.+)_(\d{4})")
PLACE = "{channel}"  # in a pattern
MOST_CHANNELS = 16
NAMED = 20  # files that a line names


def group(
    found: Mapping[str, Path], channels: Sequence[str], incomplete: dict[str, str] | None = None
) -> dict[str, tuple[Path, ...]]:
    """Put the files of each case together, by the channels' names or numbers at their names' ends.

    Args:
        found: files by name, such as "p1_t1" and "p1_t2", or "p1_0000" and "p1_0001".
        channels: their names, in order; fewer than two: every file is a case.
        incomplete: receives what is the matter with cases that lack a channel; None: they are refused.

    Returns:
        Case name to the channels' files, in the channels' order; of pictures that hold all channels one file.

    Raises:
        UserError: a channel of a case is missing or there twice, or no file's name ends so.
    """
    if len(channels) < 2:
        return {name: (path,) for name, path in found.items()}
    numbers = [f"{k:04d}" for k in range(len(channels))]
    named = _by_ending(found, channels)
    cases = named or _by_ending(found, numbers)
    are_first = all(set(files) == {numbers[0]} for files in cases.values())
    if all(map(is_picture, found.values())) and not named and are_first:  # each holds all channels
        return {name.removesuffix(FIRST): (path,) for name, path in found.items()}
    if not cases and all(count_volumes(path) == len(channels) for path in found.values()):  # 4D files
        return {name.removesuffix(FIRST): (path,) for name, path in found.items()}
    if not cases:
        raise UserError(
            f"{next(iter(found.values()))} has no channel in its name: names end with "
            f"{', '.join(f'_{name}' for name in channels)} (capitals count) or _0000, _0001 ...: rename the files."
        )
    used = {path for files in cases.values() for path in files.values()}
    others = [path for path in found.values() if path not in used]
    if series := [path for path in others if getattr(path, "files", ())]:
        raise UserError(f"{series[0]} is a series that no channel's name ends: its case lacks channels, or rename it.")
    if others:
        shown = ", ".join(str(path) for path in others[:NAMED]) + (" ..." if len(others) > NAMED else "")
        LOGGER.info("left out, since their names end with no channel's: %d files, %s", len(others), shown)
    complete = {}
    for name, files in sorted(cases.items()):
        try:
            complete[name] = _complete(name, files, channels if named else numbers)
        except UserError as error:
            if incomplete is None:
                raise
            incomplete[name] = str(error)
    return complete


def _by_ending(found: Mapping[str, Path], endings: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return case name to its files by ending, behind an underscore or a hyphen."""
    cases: dict[str, dict[str, Path]] = {}
    for name, path in found.items():
        ending = next((one for one in endings if name[: -len(one)].endswith(("_", "-")) and name.endswith(one)), None)
        if ending is not None and len(name) > len(ending) + 1:
            files = cases.setdefault(name[: -len(ending) - 1], {})
            if ending in files:
                raise UserError(f"{files[ending]} and {path} are the same channel of one case: rename one of them.")
            files[ending] = path
    return cases


def _complete(name: str, files: Mapping[str, Path], channels: Sequence[str]) -> tuple[Path, ...]:
    missing = next((channel for channel in channels if channel not in files), None)
    if missing is not None:
        raise UserError(
            f"the case {name} has no channel {missing}, only {next(iter(files.values()))}"
            f"{f' and {len(files) - 1} more' if len(files) > 1 else ''}: put its file there, or leave the case out."
        )
    return tuple(files[channel] for channel in channels)


def numbers_of(found: Mapping[str, Path], masks: Mapping[str, Path]) -> tuple[str, ...]:
    """Return the channels' numbers that names end with, as nnU-Net has them: "0000", "0001", ...; none of one channel.

    A number is part of the name where labels have it too.

    Args:
        found: scans by their files' names.
        masks: labels by theirs.

    Raises:
        UserError: beside numbered files of a case lies one without a number.
    """
    matches = {name: match for name in found if (match := NUMBERED.fullmatch(name))}
    own = {match[1] for match in map(NUMBERED.fullmatch, masks) if match} - set(masks)
    uses = any(match[1] in masks for name, match in matches.items() if name.endswith(FIRST))
    first = {match[1] for name, match in matches.items() if name.endswith(FIRST)}
    numbers_by_stem: dict[str, set[int]] = {}
    for match in matches.values():
        numbers_by_stem.setdefault(match[1], set()).add(int(match[2]))
    highest = 0
    for name, path in found.items():
        stem = matches[name][1] if name in matches else name
        if stem in own:
            continue
        if name in first:
            raise UserError(
                f"{path} is another channel or copy of {name}{FIRST}: number its channels, or rename one of them."
            )
        if name in matches and (stem in masks or (uses and _may_be_channels(numbers_by_stem[stem]))):
            highest = max(highest, int(matches[name][2]))
    return tuple(f"{k:04d}" for k in range(highest + 1)) if highest else ()


def _may_be_channels(numbers: set[int]) -> bool:
    """Tell whether the numbers at the ends of unlabelled names may be channels', unlike scan_2019 or p_0001 to p_0009.

    They are 0, 1, ... without a gap; or a single small number, of a case whose first channel is missing.
    """
    return numbers == set(range(len(numbers))) or (len(numbers) == 1 and max(numbers) < MOST_CHANNELS)


def read_channels(
    paths: Sequence[Path], pixel_spacing_mm: tuple[float, float] | None = None, count: int | None = None
) -> list[Scan]:
    """Read the channels of a case; those beyond the first may have other axes, but lie on its voxels.

    Args:
        paths: of each channel, see read_scan(); of a picture with colours, or a 4D file, one.
        pixel_spacing_mm: see read_scan().
        count: channels that are wanted of a picture; None: as many as it shows, see read_picture().

    Raises:
        UserError: a file cannot be read, or lies on another grid than the first.
    """
    volumes = count_volumes(paths[0]) if len(paths) == 1 and getattr(paths[0], "volume", None) is None else 1
    if volumes > 1:
        paths = [VolumePath.of(paths[0], k) for k in range(volumes)]
    if len(paths) == 1 and is_picture(paths[0]):
        return [Scan(paths[0], array, AFFINE) for array in read_picture(paths[0], count)]
    first, *others = (read_scan(path, pixel_spacing_mm=pixel_spacing_mm) for path in paths)
    return [first, *(replace(one, array=aligned_label(first, one, "channel"), affine=first.affine) for one in others)]
