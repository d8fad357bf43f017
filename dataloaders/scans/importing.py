"""The import of a data set of one's own: cases that are found somehow become HDF5, lists and a description."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.datasets import find_file
from dataloaders.files import read_sample
from dataloaders.own import DESCRIPTION, is_name
from dataloaders.scans.alignment import TRUSTED, check_alignment
from dataloaders.scans.channels import read_channels
from dataloaders.scans.convert import Job, Origin, check_trust, convert, provenance, write_case, write_slices
from dataloaders.scans.hounsfield import TRUSTED_HU
from dataloaders.scans.import_lists import (
    Lists,
    check_lists_replaceable,
    draw,
    keep,
    settings_of,
    tell_healthy_splits,
    write_lists,
)
from dataloaders.scans.joining import Cases
from dataloaders.scans.label_values import LabelMap, choose_values, name_classes
from dataloaders.scans.patients import tell_shared_patients, with_patients
from dataloaders.scans.pictures import check_palettes, colours_of, is_picture
from dataloaders.scans.preprocessing import WINDOW_HU, Preprocessing, prepare_channels, prepare_label
from dataloaders.scans.reading import (
    SIDES_MM,
    Scan,
    aligned_label,
    few_whole_numbers,
    label_by_index,
    read_label,
    says_nothing,
)
from dataloaders.scans.slicing import choose_slice_axis
from dataloaders.voxel_sides import unlike_cases
from sdcl.runs.atomic import write_text
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.runs.written_files import check_replaceable, is_our_description, is_recorded

RULE = "import_nifti"
BY_INDEX = "by_index.png"
DRAWN = 4  # cases that it shows


def import_cases(config: Any, find: Callable[[], Cases]) -> None:
    """Check, convert, and write the lists and the description.

    Args:
        config: the header of import_nifti.py, or one with its fields.
        find: finds the cases, after the header's own checks.

    Raises:
        UserError: a setting is impossible, or a case is refused; the other ones are finished.
    """
    _check(config)
    labels = LabelMap.of(config.label_values, config.merge, config.ignore)
    there = _earlier(config)
    if config.by_index:
        check_replaceable(config.output / BY_INDEX)
    found = with_patients(_with_colours(find(), config), config)
    cases = found.files
    if found.class_names and (config.label_values or config.merge or config.ignore):
        raise UserError(
            "--label_pattern with {class} numbers the classes: leave --label_values, --merge, --ignore out."
        )
    if found.class_names:
        labels = LabelMap(tuple(range(1, len(found.class_names) + 1)))
    given_names = config.class_names or found.class_names
    masks = {name: label for name, (_, label) in cases.items() if label is not None}
    check_palettes(masks.values())
    check_trust(config.trust, masks)
    chosen = choose_values(masks, labels, given_names, config.workers, getattr(config, "described_by", None))
    labels = chosen.label_map
    names = name_classes(masks, labels, given_names)
    lists = draw(list(masks), [name for name in cases if name not in masks], config, found, chosen.healthy)
    how = preprocessing_of(config, found, there)
    content = {
        "name": config.output.resolve().name,
        "class_names": names,
        "preprocessing": json.loads(how.to_json()),
        "label_values": list(labels.values),
        "merge": {str(first): second for first, second in labels.merge},
        "ignore": list(labels.ignore),
        "split": settings_of(config),
    }
    if found.patients:
        content["patients"] = dict(found.patients)
    _check_same(config, there, content)
    earlier = Lists.read(config.output) if there and not config.resplit and not found.splits else None
    if earlier is not None:
        lists = keep(earlier, lists, config, there.get("split"), found.patients)
        content["split"] = there.get("split")
    held = {"val": lists.val, "test": lists.test}
    tell_shared_patients({"train": [*lists.labelled, *lists.unlabelled], **held}, found.patients)
    tell_healthy_splits(lists, chosen.healthy)
    jobs = []
    for name, (images, label) in cases.items():
        run = lambda n=name, i=images, m=label: convert_case(n, i, m, how, labels, config)  # noqa: E731
        target = find_file(config.output, name)
        jobs.append(Job(name, [target], run, images, label, made_by(how, labels, label)))
    convert(jobs, config.workers, config.overwrite)
    files = {name: find_file(config.output, name) for name in cases}
    if warning := unlike_cases(files, config.layout == "volume"):
        LOGGER.warning("WARNING: %s.", warning)
    write_lists(config.output, config.layout, lists)
    write_text(config.output / DESCRIPTION, json.dumps(content, indent=2) + "\n", any_content=True, is_known=True)
    if config.by_index and (
        laid := [name for name, path in masks.items() if says_nothing(read_label(path, may_be_empty=True))]
    ):
        draw_by_index(config, laid, content)
    tell_end(config, lists)


def _with_colours(found: Cases, config: Any) -> Cases:
    """Return the cases with the channels of colour pictures, if they are some.

    Raises:
        UserError: a setting is impossible for pictures, or some hold colours and some do not.
    """
    kinds = {is_picture(path): path for paths, _ in found.files.values() for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{kinds[True]} is a picture and {kinds[False]} a scan: import them apart.")
    if not kinds.get(True):
        return found
    if config.layout != "slices":
        raise UserError("pictures are slices: give --layout slices.")
    if config.spacing_mm is not None:
        raise UserError("pictures have no voxel sides in mm, to which --spacing_mm could resample: leave it out.")
    single = {name: paths[0] for name, (paths, _) in found.files.items() if len(paths) == 1}
    colours = colours_of(single, tell=not found.channels)
    if colours_of({name: paths[0] for name, (paths, _) in found.files.items() if len(paths) > 1}):
        raise UserError("--channels names files of one channel each, and these pictures hold colours: leave it out.")
    return replace(found, channels=found.channels or colours)


def tell_end(config: Any, lists: Lists) -> None:
    """Say what came of it, and what to do next."""
    counts = (len(lists.labelled), len(lists.unlabelled), len(lists.val), len(lists.test))
    LOGGER.info("%s: %d labelled, %d unlabelled, %d validation and %d test cases", config.output, *counts)
    LOGGER.info("train on them with `python code/own_train.py --root_path %s`", config.output)


def convert_case(
    name: str, paths: tuple[Path, ...], label_path: Path | None, how: Preprocessing, labels: LabelMap, config: Any
):
    """Align, preprocess and write one case, in 2D its single slices first."""
    channels, mask, alignment = read_channels(paths, config.pixel_spacing_mm, len(how.rules)), None, ""
    image = channels[0]
    described_by = getattr(config, "described_by", None)
    if len(paths) == 1 < len(channels) != len(how.rules) and not is_picture(paths[0]):
        raise UserError(
            f"{paths[0]} holds {len(channels)} volumes: name them "
            f"{f'in {described_by}' if described_by else 'by --channels'} if they are channels, or save each as a scan "
            "of its own."
        )
    if not is_picture(paths[0]) and (values := few_whole_numbers(image.array)):
        LOGGER.warning(
            "WARNING: %s holds only the numbers %s, like a label map: is it the scan?", paths[0],
            ", ".join(map(str, values)),
        )  # fmt: skip
    # choose_slice_axis() has told; what is no CT aligns nowhere
    case = prepare_channels(channels, how, config.trust_hu, tell=False)
    if label_path is not None:
        label = read_label(label_path, onto=image, may_be_empty=True)
        classes = Scan(label_path, labels.classes(label.array), label.affine)
        is_by_index = config.by_index and says_nothing(label)
        on_image = label_by_index(image, classes) if is_by_index else aligned_label(image, classes)
        alignment = TRUSTED if name in config.trust or "all" in config.trust else "checked"
        if "ct" in how.rules and alignment != TRUSTED and on_image.any():
            clipped = np.clip(channels[how.rules.index("ct")].array, *WINDOW_HU)
            check_alignment(label_path, clipped, on_image, is_organ_ct=False, way_out=f"give --trust {name}")
        mask = prepare_label(on_image, image, how)
        tell_lost(name, label_path, on_image, mask, config)
    raw = config.images if config.table is None else config.table.parent
    attributes = provenance(case, how, Origin(RULE, raw, paths, label_path))
    attributes |= {"alignment": alignment} | made_by(how, labels, label_path)
    attributes |= {"hu": TRUSTED_HU} if config.trust_hu and "ct" in how.rules else {}
    if is_picture(paths[0]):
        attributes = {key: value for key, value in attributes.items() if key not in ("spacing", "origin", "direction")}
    if how.layout == "slices":
        write_slices(config.output, name, case.array, mask, attributes)
    else:
        write_case(config.output / "data" / f"{name}.h5", case.array, mask, attributes)


def draw_by_index(config: Any, names: Sequence[str], content: dict[str, Any]) -> None:
    """Draw some cases whose labels were laid on their scans by index, for somebody to look at."""
    from sdcl.scoring.evaluation import Case  # with PyTorch, for which a wrong flag need not wait
    from sdcl.scoring.figures import save_label_figure

    cases, classes = [], content["class_names"]
    for name in names[:DRAWN]:
        channels = content["preprocessing"].get("channels", ())
        sample = read_sample(find_file(config.output, name), ndim=3, num_classes=len(classes) + 1, channels=channels)
        cases.append(Case(name, sample.image, sample.label))
    path = config.output / BY_INDEX
    save_label_figure(path, cases, classes, config.layout == "volume")
    LOGGER.warning(
        "NOTE: --by_index: the labels of %d cases have no geometry and were laid on their scans voxel by voxel, which "
        "nothing but a look can check: see %s", len(names), path,
    )  # fmt: skip


def made_by(how: Preprocessing, labels: LabelMap, label: Path | None) -> dict[str, str]:
    """Return the attributes that say how a case is made."""
    return {"rule": RULE, "preprocessing": how.to_json(), "label_map": labels.to_json() if label is not None else ""}


def tell_lost(name: str, path: Path, before: np.ndarray, after: np.ndarray, config: Any) -> None:
    """Say which structures of a case are too small for the new voxels.

    Raises:
        UserError: none is left.
    """
    lost = sorted(set(np.unique(before).tolist()) - set(np.unique(after).tolist()) - {0})
    spacing = " ".join(f"{side:g}" for side in config.spacing_mm or ())
    if before.any() and not after.any():
        raise UserError(
            f"{path} vanishes at --spacing_mm {spacing}: choose finer voxels, or move the label away, and the scan "
            "counts as unlabelled."
        )
    for k in lost:
        structure = config.class_names[k - 1] if config.class_names else f"class{k}"
        LOGGER.info("%s: %s vanishes at --spacing_mm %s; the case trains without it", name, structure, spacing)


def _check(config: Any) -> None:
    """Refuse impossible settings before anything is read."""
    if config.workers < 1:
        raise UserError(f"--workers is {config.workers}: it must be above 0.")
    for flag in ("spacing_mm", "pixel_spacing_mm"):
        sides = getattr(config, flag)
        if sides is not None and not all(SIDES_MM[0] <= side <= SIDES_MM[1] for side in sides):
            raise UserError(
                f"--{flag} {' '.join(f'{side:g}' for side in sides)}: every side must lie within {SIDES_MM[0]:g} and "
                f"{SIDES_MM[1]:g} mm."
            )
    if len(set(config.class_names)) < len(config.class_names):
        raise UserError(f"--class_names {' '.join(config.class_names)} names a class twice: give different names.")
    if config.slice_axis is not None and config.layout != "slices":
        raise UserError(f"--slice_axis {config.slice_axis} is for 2D data alone: give --layout slices, too.")
    name = config.output.resolve().name
    if not is_name(name):
        raise UserError(f"--output {config.output}: the folder's name must be of letters, digits, - and _.")


def _earlier(config: Any) -> dict[str, Any]:
    """Return the description of an earlier import into the same folder, or {}.

    Raises:
        UserError: the folder holds another program's dataset.json, such as nnU-Net's, or lists of the user's.
    """
    path = config.output / DESCRIPTION
    if not path.exists():
        check_lists_replaceable(config.output)
        return {}
    try:
        there = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        there = {} if is_recorded(path) else None  # ours, but damaged: it is made again
    if there != {} and not is_our_description(there):
        raise UserError(
            f"--output {config.output} holds a {DESCRIPTION} that no import here wrote, such as nnU-Net's: choose an "
            "empty folder."
        )
    check_replaceable(path)
    check_lists_replaceable(config.output)
    return there


def _check_same(config: Any, there: dict[str, Any], content: dict[str, Any]) -> None:
    """Refuse to go on with a data set that was imported in another way: its finished files would stay as they are."""
    if config.overwrite:
        return
    there = {"merge": {}, "ignore": []} | there if there else {}
    try:
        there["preprocessing"] = json.loads(Preprocessing.from_dict(there["preprocessing"]).to_json())
    except (KeyError, TypeError, ValueError):
        there.pop("preprocessing", None)
    kept = {key: value for key, value in content.items() if key not in ("split", "patients")}
    differing = [key for key, value in kept.items() if key in there and there[key] != value]
    if differing:
        raise UserError(
            f"{config.output / DESCRIPTION} is of an import with other {' and '.join(differing)}: give --overwrite to "
            "convert all cases again, another --output, or the earlier settings."
        )


def preprocessing_of(config: Any, found: Cases, there: dict[str, Any]) -> Preprocessing:
    """Return what is done to every scan; the slicing axis once for all of them, by their first channels.

    Raises:
        UserError: --normalise gives neither one rule nor one for each channel.
    """
    axis, rules = None, tuple(config.normalise)
    if len(rules) not in (1, max(len(found.channels), 1)):
        raise UserError(
            f"--normalise gives {len(rules)} rules for {max(len(found.channels), 1)} channels: give one for all, or "
            "one for each."
        )
    for name, rule in zip(found.channels, rules if len(rules) > 1 else rules * len(found.channels), strict=True):
        LOGGER.info("channel %s is normalised by %s", name, rule)
    if config.layout == "slices":
        earlier = (there.get("preprocessing") or {}).get("slice_axis") if not config.overwrite else None
        reader: Callable[[Path], Scan] = lambda path: read_channels((path,), config.pixel_spacing_mm)[0]  # noqa: E731
        scans = {name: images[0] for name, (images, _) in found.files.items()}
        axis = choose_slice_axis(scans, config.slice_axis or earlier, config.spacing_mm, config.workers, reader)
    normalise = rules if len(set(rules)) > 1 else rules[0]
    return Preprocessing(
        normalise, "LPS", config.spacing_mm, layout=config.layout, slice_axis=axis, channels=found.channels
    )
