"""Draw docs/method.png, the picture of SDCL's self-training step.

Every mask in it is computed from a synthetic ring phantom: the discrepancy is where the two predictions differ, and
the coloured voxels beside the KL term are those of the discrepancy where a student differs from the target.

    python docs/method_figure.py [--output PATH]
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from scipy import ndimage

from sdcl.runs.atomic import replacing

SIDE = 168  # pixels of a thumbnail's side
BOX = (slice(50, 162), slice(7, 119))  # rows and columns of the pasted box: two thirds of a side
SEED = 3
WIDTH_IN, HEIGHT_IN, DPI = 12.0, 6.0, 150
THUMB = 1.15  # a thumbnail's side in inches

# Okabe and Ito's palette, but for a darker purple: the students' colours differ in lightness too, so that every common
# kind of colour vision tells them apart.
LABELLED, UNLABELLED = "#0072B2", "#E69F00"
STUDENT_A, STUDENT_B, DISCREPANCY = "#009E73", "#7A3B93", "#D55E00"
INK, GREY, PAPER = "#222222", "#666666", "#F1F1F1"

# Columns and rows, in inches from the lower left corner.
X_IMAGE, X_MIX, X_NETWORK, X_PREDICTION, X_JOIN, X_REGION, X_LOSS = 0.78, 2.3, 3.92, 5.54, 7.14, 8.7, 10.78
Y_TEACHER, Y_EMA, Y_A, Y_MIX, Y_B = 4.75, 3.93, 2.89, 1.98, 1.06


def waves(rng: np.random.Generator, count: int = 14, longest: float = 150.0, shortest: float = 60.0) -> np.ndarray:
    """Return a smooth random field of unit standard deviation."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    field = np.zeros((SIDE, SIDE))
    for _ in range(count):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        frequency = 2 * np.pi / rng.uniform(shortest, longest)
        field += np.cos(frequency * (rows * np.sin(angle) + columns * np.cos(angle)) + phase)
    return field / field.std()


def ring(centre: tuple[float, float], radius: float, thickness: float, stretch: float) -> np.ndarray:
    """Return how deep each pixel lies inside an elliptic ring: positive inside, negative outside, in pixels."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    distance = np.hypot((rows - centre[0]) / stretch, (columns - centre[1]) * stretch)
    return thickness / 2 - np.abs(distance - radius)


def render(depth: np.ndarray, rng: np.random.Generator, base: float) -> np.ndarray:
    """Return a grey image in [0, 1] of a ring in soft tissue of brightness `base`, with texture and noise."""
    edge = 1 / (1 + np.exp(-depth / 1.5))
    image = base + 0.42 * edge + 0.06 * waves(rng) + rng.normal(0, 0.045, depth.shape)
    return np.clip(ndimage.gaussian_filter(image, 0.7), 0, 1)


def paste(image: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Return the image with the patch's box pasted into it."""
    mixed = image.copy()
    mixed[BOX] = patch[BOX]
    return mixed


def blobs(places: list[tuple[int, int, int]]) -> np.ndarray:
    """Return a mask of small discs, each a (row, column, radius)."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return np.any([np.hypot(rows - r, columns - c) < radius for r, c, radius in places], axis=0)


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the mask's largest 8-connected component."""
    components, _ = ndimage.label(mask, np.ones((3, 3)))
    return components == np.argmax(np.bincount(components.ravel())[1:]) + 1


def make_scene() -> dict[str, np.ndarray]:
    """Make the images, the target and both predictions, and compute what follows from them."""
    rng = np.random.default_rng(SEED)
    depth_x, depth_u = ring((76, 92), 44, 27, 1.1), ring((72, 94), 46, 29, 0.96)
    scene = {"x": render(depth_x, rng, 0.42), "u": render(depth_u, rng, 0.2), "y": depth_x > 0}
    scene["raw"] = (depth_u + 2.5 * waves(rng) > 0) | blobs([(24, 22, 8), (146, 146, 10), (72, 96, 6)])
    scene["q"] = largest_component(scene["raw"])
    scene["mix"], scene["reverse"] = paste(scene["u"], scene["x"]), paste(scene["x"], scene["u"])
    scene["target"] = paste(scene["q"], scene["y"])
    depth = ndimage.gaussian_filter(paste(depth_u, depth_x), 2.5)
    scene["a"] = depth + 4.2 * waves(rng) > 0
    scene["b"] = depth + 4.2 * waves(rng) > 0
    scene["d"] = scene["a"] != scene["b"]
    scene["wrong_a"] = scene["d"] & (scene["a"] != scene["target"])
    scene["wrong_b"] = scene["d"] & (scene["b"] != scene["target"])
    scene["inside"] = paste(np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool))
    return scene


def paint(*layers: tuple[np.ndarray, str]) -> np.ndarray:
    """Return an RGB picture of masks laid over one another on pale paper, each a (mask, colour)."""
    picture = np.tile(to_rgb(PAPER), (SIDE, SIDE, 1))
    for mask, colour in layers:
        picture[mask] = to_rgb(colour)
    return picture


def outlined(image: np.ndarray, mask: np.ndarray, colour: str) -> np.ndarray:
    """Return a grey image as RGB with the mask's outline drawn in colour."""
    picture = np.repeat(image[..., None], 3, axis=2)
    picture[ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_erosion(mask)] = to_rgb(colour)
    return picture


def thumbnail(
    ax: Axes, centre: tuple[float, float], picture: np.ndarray, frame: str, *, side: float = THUMB, box: str = ""
) -> None:
    """Show a picture around a centre, in a coloured frame; `box` is the colour of the mask's dashed outline."""
    left, bottom = centre[0] - side / 2, centre[1] - side / 2
    extent = (left, left + side, bottom, bottom + side)
    ax.imshow(picture, extent=extent, cmap="gray", vmin=0, vmax=1, interpolation="antialiased", zorder=2)
    ax.add_patch(Rectangle((left, bottom), side, side, fill=False, ec=frame, lw=2.6, zorder=3))
    if box:
        scale, (rows, columns) = side / SIDE, BOX
        corner = (left + columns.start * scale, bottom + side - rows.stop * scale)
        size = (columns.stop - columns.start) * scale, (rows.stop - rows.start) * scale
        ax.add_patch(Rectangle(corner, *size, fill=False, ec=box, lw=1.7, ls=(0, (3, 1.6)), zorder=4))


def write(ax: Axes, x: float, y: float, text: str, size: float = 11.5, **style) -> None:
    """Write centred text; `style` goes to matplotlib."""
    ax.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, "fontsize": size, "zorder": 5, **style})


def caption(ax: Axes, centre: tuple[float, float], title: str, note: str = "", *, below: bool = False) -> None:
    """Write a bold title, and a plain note under it, above or below a thumbnail."""
    edge = centre[1] + (-1 if below else 1) * (THUMB / 2 + 0.17)
    rows = [(title, {"weight": "bold"})] + ([(note, {"color": GREY})] if note else [])
    for i, (text, style) in enumerate(rows if below else rows[::-1]):
        write(ax, centre[0], edge + (-0.21 if below else 0.21) * i, text, **style)


def arrow(ax: Axes, *points: tuple[float, float], colour: str = GREY, style: str = "-") -> None:
    """Draw a line through the points that ends in an arrowhead."""
    xs, ys = zip(*points, strict=True)
    if len(points) > 2:
        ax.plot(xs[:-1], ys[:-1], color=colour, lw=2, ls=style, solid_capstyle="round", zorder=1)
    shape = {"arrowstyle": "-|>,head_width=0.28,head_length=0.5", "color": colour, "lw": 2, "ls": style}
    ax.annotate("", points[-1], points[-2], arrowprops={**shape, "shrinkA": 0, "shrinkB": 0}, zorder=1)


def node(ax: Axes, x: float, y: float, text: str, colour: str = INK) -> None:
    """Draw an operation in a small circle."""
    ax.add_patch(Circle((x, y), 0.17, fc="white", ec=colour, lw=2, zorder=4))
    write(ax, x, y - 0.005, text, 13, weight="bold", color=colour)


def card(ax: Axes, x: float, y: float, size: tuple[float, float], title: str, note: str, colour: str) -> None:
    """Draw a rounded card with a title over a note."""
    tint = tuple(1 - 0.13 * (1 - channel) for channel in to_rgb(colour))
    corner, shape = (x - size[0] / 2, y - size[1] / 2), "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch(corner, *size, boxstyle=shape, fc=tint, ec=colour, lw=2.2, zorder=2))
    lift = 0.13 * (1 + note.count("\n"))
    write(ax, x, y + lift, title, 14, weight="bold")
    write(ax, x, y - 0.17, note, linespacing=1.25)


def draw_inputs(ax: Axes, scene: dict[str, np.ndarray]) -> None:
    """Draw the images, their mix, and what the mask is."""
    thumbnail(ax, (X_IMAGE, Y_TEACHER), scene["u"], UNLABELLED)
    caption(ax, (X_IMAGE, Y_TEACHER), "unlabelled u")
    thumbnail(ax, (X_IMAGE, Y_MIX), outlined(scene["x"], scene["y"], LABELLED), LABELLED, box="white")
    caption(ax, (X_IMAGE, Y_MIX), "labelled x, y", below=True)
    thumbnail(ax, (X_MIX, Y_MIX), scene["mix"], GREY, box="white")
    caption(ax, (X_MIX, Y_MIX), "mix: x in u", below=True)
    for x, picture, text in (
        (X_IMAGE - 0.29, 1.0 - scene["inside"], "box\nmask M"),
        (X_MIX - 0.29, scene["reverse"], "and the\nreverse mix"),
    ):
        thumbnail(ax, (x, 0.5), picture, GREY, side=0.56, box="" if text[0] == "b" else "white")
        write(ax, x + 0.37, 0.5, text, 11, ha="left", color=GREY)


def draw_target(ax: Axes, scene: dict[str, np.ndarray]) -> None:
    """Draw how the teacher's pseudo-label and the label become the target."""
    q, inside = scene["q"], scene["inside"]
    card(ax, X_NETWORK, Y_TEACHER, (1.4, 1.0), "Teacher", "no gradient", "#555555")
    thumbnail(ax, (X_PREDICTION, Y_TEACHER), paint((scene["raw"], "#BDBDBD"), (q, UNLABELLED)), UNLABELLED)
    caption(ax, (X_PREDICTION, Y_TEACHER), "pseudo-label q", "largest component")
    thumbnail(ax, (X_JOIN, Y_TEACHER), paint((scene["y"], LABELLED)), LABELLED, box=INK)
    caption(ax, (X_JOIN, Y_TEACHER), "label y")
    layers = (q & ~inside, UNLABELLED), (scene["y"] & inside, LABELLED)
    thumbnail(ax, (X_REGION, Y_TEACHER), paint(*layers), INK, box=INK)
    caption(ax, (X_REGION, Y_TEACHER), "target", "y in box, q outside")
    node(ax, (X_PREDICTION + X_JOIN) / 2, Y_TEACHER, "M")


def draw_students(ax: Axes, scene: dict[str, np.ndarray]) -> None:
    """Draw the students, their predictions, where these differ, and who is wrong there."""
    either = scene["a"] | scene["b"], "#D9D9D9"
    for y, name, note, key, colour in (
        (Y_A, "Student A", "V-Net / U-Net", "a", STUDENT_A),
        (Y_B, "Student B", "ResNet-34\nencoder", "b", STUDENT_B),
    ):
        card(ax, X_NETWORK, y, (1.4, 1.0), name, note, colour)
        thumbnail(ax, (X_PREDICTION, y), paint((scene[key], colour)), colour)
        caption(ax, (X_PREDICTION, y), f"prediction {name[-1]}", below=y == Y_B)
    thumbnail(ax, (X_REGION, Y_A), paint(either, (scene["d"], DISCREPANCY)), DISCREPANCY)
    caption(ax, (X_REGION, Y_A), "discrepancy D")
    layers = either, (scene["wrong_a"], STUDENT_A), (scene["wrong_b"], STUDENT_B)
    thumbnail(ax, (X_REGION, Y_B), paint(*layers), DISCREPANCY)
    write(ax, X_REGION - 0.17, Y_B - THUMB / 2 - 0.19, "wrong in D:", weight="bold")
    for x, name, colour in ((0.5, "A", STUDENT_A), (0.78, "B", STUDENT_B)):
        chip = {"boxstyle": "round,pad=0.2", "fc": colour, "ec": "none"}
        write(ax, X_REGION + x, Y_B - THUMB / 2 - 0.19, name, 11, weight="bold", color="white", bbox=chip)
    node(ax, X_JOIN, Y_A, "≠", DISCREPANCY)


def draw_losses(ax: Axes) -> None:
    """Draw the three terms of a student's loss, each beside the voxels that it acts on."""
    for y, title, note, colour in (
        (Y_TEACHER, "Dice + CE", "every voxel", INK),
        (Y_A, r"$\mathbf{\lambda_{mse}}$ · MSE", "every voxel of D:\npull to the target", DISCREPANCY),
        (Y_B, r"$\mathbf{\lambda_{kl}}$ · KL", "where wrong in D:\nraise the entropy", DISCREPANCY),
    ):
        card(ax, X_LOSS, y, (2.2, THUMB), title, note, colour)
        arrow(ax, (X_REGION + THUMB / 2 + 0.06, y), (X_LOSS - 1.13, y))
    write(ax, X_LOSS, Y_TEACHER + 0.83, "each student's loss", weight="bold")
    for y in ((Y_TEACHER + Y_A) / 2, (Y_A + Y_B) / 2):
        write(ax, X_LOSS, y, "+", 18, weight="bold", color=GREY)


def draw_arrows(ax: Axes) -> None:
    """Connect the parts."""
    half, edge = THUMB / 2 + 0.05, 0.74
    arrow(ax, (X_IMAGE + half, Y_TEACHER), (X_NETWORK - edge, Y_TEACHER))
    arrow(ax, (X_MIX, Y_TEACHER), (X_MIX, Y_MIX + half))
    ax.add_patch(Circle((X_MIX, Y_TEACHER), 0.05, color=GREY, zorder=2))
    arrow(ax, (X_IMAGE + half, Y_MIX), (X_MIX - half, Y_MIX))
    fork = (X_MIX + half + X_NETWORK - edge) / 2 - 0.04
    for y in (Y_A, Y_B):
        arrow(ax, (X_MIX + half, Y_MIX), (fork, Y_MIX), (fork, y), (X_NETWORK - edge, y))
    for y in (Y_TEACHER, Y_A, Y_B):
        arrow(ax, (X_NETWORK + edge, y), (X_PREDICTION - half, y))
    arrow(ax, (X_JOIN + half, Y_TEACHER), (X_REGION - half, Y_TEACHER))
    arrow(ax, (X_PREDICTION + half, Y_A), (X_JOIN - 0.2, Y_A))
    arrow(ax, (X_PREDICTION + half, Y_B), (X_JOIN, Y_B), (X_JOIN, Y_A - 0.2))
    arrow(ax, (X_JOIN + 0.2, Y_A), (X_REGION - half, Y_A))
    arrow(ax, (X_REGION, Y_A - half), (X_REGION, Y_B + half))
    write(ax, X_REGION + 0.1, (Y_A + Y_B) / 2, "≠ target", 11, ha="left", color=GREY)
    arrow(ax, (X_NETWORK, Y_A + 0.54), (X_NETWORK, Y_TEACHER - 0.54), colour=STUDENT_A, style="--")
    write(ax, X_NETWORK - 0.1, Y_EMA, "EMA", weight="bold", ha="right")
    write(ax, X_NETWORK + 0.12, Y_EMA, "0.99 teacher + 0.01 A", 11, ha="left", color=GREY)


def draw(output: Path) -> None:
    """Draw the whole picture and save it."""
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    scene = make_scene()
    draw_inputs(ax, scene)
    draw_target(ax, scene)
    draw_students(ax, scene)
    draw_losses(ax)
    draw_arrows(ax)
    ax.set(xlim=(0, WIDTH_IN), ylim=(0, HEIGHT_IN))
    ax.set_axis_off()
    with replacing(output) as temporary:
        figure.savefig(temporary, metadata={"Software": None})


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw the picture of the method.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("method.png"), help="PNG to write")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
