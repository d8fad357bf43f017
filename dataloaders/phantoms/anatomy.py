"""The anatomy of the synthetic cases: what a heart, an atrium and a pancreas look like in a noisy scan."""

import numpy as np
from scipy import ndimage

RIGHT_VENTRICLE, MYOCARDIUM, LEFT_VENTRICLE = 1, 2, 3


def draw_heart(rng: np.random.Generator, size: tuple[int, int], slices: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw one patient and return end-diastole and end-systole as (image, label), each (slices, H, W)."""
    shape = np.asarray(size) + rng.integers(-2, 3, size=2)
    unit = min(size) / 72  # lengths below are pixels of a 72-pixel field of view
    heart = {
        "centre": (shape - 1) / 2 + unit * rng.uniform(-4, 4, 2) + unit * np.array([0, 3]),
        "drift": unit * rng.uniform(-3, 3, 2),
        "radius": unit * rng.uniform(9, 11.5),
        "wall": unit * rng.uniform(5, 6),
        "reach": unit * rng.uniform(9, 11),
        "angle": np.pi + rng.uniform(-0.9, 0.9),
        "aspect": rng.uniform(0.94, 1.06),
        "lobe": rng.uniform(0, 2 * np.pi),
        "valve": rng.uniform(0.1, 1.5),  # in radii: how much of the right ventricle its basal slice still shows
        "squeeze": rng.uniform(0.62, 0.75),
        "blood": rng.uniform(0.65, 0.85),
        "muscle": rng.uniform(0.24, 0.34),
    }
    organs = _chest_organs(rng, shape, unit, heart["blood"], heart["muscle"])
    frames = []
    for contraction in (1.0, heart["squeeze"]):
        depths = np.linspace(0, 1, slices)
        drawn = [_heart_slice(heart, shape, depth, contraction, _chest(shape, organs, depth)) for depth in depths]
        ideal, label = (np.stack(parts) for parts in zip(*drawn, strict=True))  # (slices, H, W)
        image = _scan(rng, ideal, blur=(0, 0.7 * unit, 0.7 * unit), bias=0.2, noise=0.04)
        frames.append(((image - image.min()) / np.ptp(image), label))
    return frames


def _chest_organs(rng: np.random.Generator, shape: np.ndarray, unit: float, blood: float, muscle: float) -> list[tuple]:
    """Return what surrounds a heart: (centre, radii, intensity, growth to the apex) of ellipses, in painting order."""
    middle = (shape - 1) / 2
    body = shape * rng.uniform(0.46, 0.52, 2)
    layers = ((1, 0.8), (0.92, muscle), (0.82, 0.1))  # fat, ribs, lungs: share of the body's radii, intensity
    organs = [(middle, share * body, intensity, 0) for share, intensity in layers]
    organs.append((middle + body * (0.6, -0.3), body * (0.45, 0.6), rng.uniform(0.9, 1.2) * muscle, 0.2))  # liver
    # Vessels as bright as the ventricles' blood and lumps as dark as the myocardium make a threshold useless.
    for bright in (True, True, True, False, False, True):
        direction = rng.uniform(0, 2 * np.pi)
        centre = middle + rng.uniform(0.45, 0.8) * body * (np.sin(direction), np.cos(direction))
        radii = unit * rng.uniform(3, 7) * rng.uniform(0.8, 1.2, 2)
        organs.append((centre, radii, rng.uniform(0.9, 1.1) * (blood if bright else muscle), rng.uniform(-0.4, 0.4)))
    return organs


def _chest(shape: np.ndarray, organs: list[tuple], depth: float) -> np.ndarray:
    """Paint one slice (H, W) of the organs at `depth`, 0 base to 1 apex."""
    image = np.full(tuple(shape), 0.02)
    for centre, radii, intensity, growth in organs:
        image[_ellipsoid(shape, centre, radii * (1 + growth * (depth - 0.5))) > 0] = intensity
    return image


def _heart_slice(
    heart: dict, shape: np.ndarray, depth: float, contraction: float, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the heart on `image` at `depth` (0 base, 1 apex) and return image and label, (H, W) each."""
    taper = np.sqrt(1 - (0.65 * depth) ** 2)
    offset = np.indices(shape) - (heart["centre"] + depth * heart["drift"])[:, None, None]
    sine, cosine = np.sin(heart["angle"]), np.cos(heart["angle"])
    along, across = offset[1] * cosine + offset[0] * sine, offset[0] * cosine - offset[1] * sine  # along: to the RV
    lobes = 1 + 0.04 * np.cos(3 * np.arctan2(across, along) + heart["lobe"])
    radius = np.hypot(along * heart["aspect"], across / heart["aspect"]) / lobes
    relaxed = heart["radius"] * taper
    inner = contraction * relaxed
    # Muscle does not compress: as the cavity shrinks, the wall thickens and keeps its area.
    outer = np.sqrt(inner**2 + (relaxed + heart["wall"]) ** 2 - relaxed**2)
    reach = heart["reach"] * taper * (0.6 + 0.4 * contraction)
    crescent = 0.9 * outer - np.hypot(along - (0.1 * outer + reach), across / 1.1)  # pixels below its surface
    if depth == 0:
        crescent = np.minimum(crescent, heart["valve"] * heart["radius"] - across)
    label = np.zeros(tuple(shape), np.uint8)
    label[crescent > 0] = RIGHT_VENTRICLE
    label[radius < outer] = MYOCARDIUM
    label[radius < inner] = LEFT_VENTRICLE
    image[crescent > -0.2 * heart["wall"]] = heart["muscle"]  # the right ventricle's thin wall, not labelled
    image[np.isin(label, (RIGHT_VENTRICLE, LEFT_VENTRICLE))] = heart["blood"]
    papillary = np.hypot(along + 0.25 * inner, np.abs(across) - 0.55 * inner) < 0.17 * inner
    image[(label == MYOCARDIUM) | papillary] = heart["muscle"]  # the cavity's label includes its papillary muscles
    return image, label


def draw_atrium(rng: np.random.Generator, size: tuple[int, int, int], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one atrium and return image and label, (X, Y, Z) each."""
    extent, unit = np.asarray(size), min(size) / 40  # lengths below are voxels of a 40-voxel field of view
    centre = extent * (0.5 + rng.uniform(-0.05, 0.05, 3))
    radii = unit * np.array([11.5, 8.5, 9.5]) * rng.uniform(0.88, 1.12, 3)
    bumps = 0.8 * unit * _smooth_noise(rng, size, 4 * unit)
    body = radii.mean() * _ellipsoid(size, centre, radii) + bumps  # depth below the surface in voxels
    veins = np.full(size, -np.inf)
    for side in ((-1, 0.5, 0.8), (1, 0.5, 0.8), (-1, 0.5, -0.7), (1, 0.5, -0.7)):
        ends = [centre + reach * radii * side + unit * rng.uniform(-2, 2, 3) for reach in (0.3, 0.7, 1.2, 1.7)]
        veins = np.maximum(veins, _tube(size, _curve(ends), unit * rng.uniform(2.4, 3.2)))
    atrium = np.maximum(body, veins)
    label = _largest(atrium > 0).astype(np.uint8)
    if classes == 3:
        label[(label == 1) & (body <= 0)] = 2

    ideal = 0.35 + 0.06 * _smooth_noise(rng, size, 3 * unit)
    ideal[_smooth_noise(rng, size, 6 * unit) > 0.7] = 0.1  # lung
    blood = rng.uniform(0.7, 0.85)
    # Ventricle, right atrium and aorta carry the same blood; walls and place tell them apart.
    for place, spread in (((0.72, 0.02, 0.5), (15, 12, 12)), ((0.15, 0.12, 0.55), (9, 9, 10))):
        position = extent * (place + rng.uniform(-0.05, 0.05, 3))
        chamber = _ellipsoid(size, position, unit * np.array(spread))
        ideal[chamber > -0.25] = 0.25
        ideal[chamber > 0] = blood * rng.uniform(0.93, 1.07)
    ideal[_aorta(rng, size, unit) > 0] = blood * rng.uniform(0.93, 1.07)
    ideal[atrium > -1.5 * unit] = 0.25
    scar = (atrium > -1.5 * unit) & (_smooth_noise(rng, size, 3 * unit) > 1.2)
    ideal[scar] = 1.1 * blood
    ideal[label > 0] = blood
    image = _scan(rng, ideal, blur=0.7 * unit, bias=0.15, noise=0.07)
    return (image - image.mean()) / image.std(), label


def draw_pancreas(rng: np.random.Generator, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one pancreas and return image and label, (X, Y, Z) each."""
    extent, unit = np.asarray(size), min(size) / 48  # lengths below are voxels of a 48-voxel field of view
    joints = np.array([[0.24, 0.62, 0.34], [0.38, 0.2, 0.44], [0.6, 0.6, 0.58], [0.8, 0.42, 0.68]])
    line = _curve(extent * (joints + rng.uniform(-0.06, 0.06, joints.shape)))
    girth = np.interp(np.linspace(0, 1, len(line)), (0, 0.35, 0.65, 1), rng.uniform(0.9, 1.1, 4) * (6.5, 4.5, 5, 3.5))
    lobules = 0.7 * unit * _smooth_noise(rng, size, 1.6 * unit)
    pancreas = _tube(size, line, unit * girth) + lobules
    label = _largest(pancreas > 0)

    tissue = rng.uniform(70, 95)  # HU, as all intensities here
    ideal = -85 + 12 * _smooth_noise(rng, size, 2 * unit)  # fat
    liver = _ellipsoid(size, extent * rng.uniform(-0.05, 0.1, 3), extent * 0.45)
    ideal[liver > 0] = tissue + rng.uniform(5, 25)
    for _ in range(3):
        ends = extent * rng.uniform(-0.1, 1.1, (4, 3))
        bowel = _tube(size, _curve(ends), unit * rng.uniform(3.5, 6))
        ideal[bowel > 0] = tissue + rng.uniform(-8, 8)
        ideal[bowel > 2.3 * unit] = tissue + rng.choice((-50, 45))  # the lumen is what gives bowel away
    splenic_vein = _tube(size, line + unit * (girth[:, None] + 2.5) * (0, 1, 0.2), unit * 1.8)  # runs along its back
    ideal[np.maximum(splenic_vein, _aorta(rng, size, unit)) > 0] = rng.uniform(140, 170)
    ideal[(pancreas > -1.2 * unit) & (ideal > 0)] = -40  # a thin fat plane, blurred below to a faint one
    ideal[label] = tissue
    image = _scan(rng, ideal, blur=0.7 * unit, bias=0, noise=15)
    return np.clip((image + 125) / 400, 0, 1), label.astype(np.uint8)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """Return a random field of zero mean and unit variance, correlated over `sigma` voxels."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    return (field - field.mean()) / field.std()


def _scan(rng: np.random.Generator, ideal: np.ndarray, blur: float | tuple, bias: float, noise: float) -> np.ndarray:
    """Return `ideal` as a scanner shows it: blurred, shaded (`bias`, relative) and noisy (`noise`, its unit)."""
    shading = np.exp(bias * _smooth_noise(rng, ideal.shape, max(ideal.shape) / 4))
    grain = noise * (_smooth_noise(rng, ideal.shape, 0.8) + 0.7 * rng.standard_normal(ideal.shape))
    return (ndimage.gaussian_filter(ideal, blur) * shading + grain).astype(np.float32)


def _ellipsoid(shape: tuple[int, ...] | np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return 1 at the centre of an axis-parallel ellipse or ellipsoid, 0 on its surface, negative outside."""
    axes = np.ogrid[tuple(slice(0, length) for length in shape)]
    return 1 - np.sqrt(sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radii, strict=True)))


def _curve(control: np.ndarray | list, points: int = 48) -> np.ndarray:
    """Return `points` positions (points, 3) along the cubic Bezier curve of four control points (4, 3)."""
    t = np.linspace(0, 1, points)[:, None]
    a, b, c, d = np.asarray(control)
    return (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * d


def _tube(shape: tuple[int, int, int], line: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Return each voxel's depth below the surface of a tube along `line` (points, 3), negative outside (X, Y, Z)."""
    depth = np.full(shape, -np.inf)
    for point, r in zip(line, np.broadcast_to(radius, len(line)), strict=True):
        # Only a ball's neighbourhood can be inside it; the margin of 4 serves walls and rough surfaces.
        low = np.clip(np.floor(point - r - 4), 0, shape).astype(int)
        high = np.clip(np.ceil(point + r + 5), 0, shape).astype(int)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        ball = r * _ellipsoid(high - low, point - low, (r, r, r))
        depth[box] = np.maximum(depth[box], ball)
    return depth


def _aorta(rng: np.random.Generator, size: tuple[int, int, int], unit: float) -> np.ndarray:
    """Return the depth below the surface of a vessel that runs along z, behind everything else (X, Y, Z)."""
    ends = [np.array(size) * (0.5, 0.92, z) + unit * rng.uniform(-3, 3, 3) for z in (-0.1, 0.3, 0.7, 1.1)]
    return _tube(size, _curve(ends), unit * 4.5)


def _largest(mask: np.ndarray) -> np.ndarray:
    """Return the largest connected part (faces touching) of a boolean mask."""
    parts, _ = ndimage.label(mask)
    return parts == np.argmax(np.bincount(parts[mask]))
