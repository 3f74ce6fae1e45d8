"""Generated images of overlapping textured figures, and their ground truth.

Only the outline distinguishes the categories: the colours and textures of figures and background are random. Later
figures cover earlier ones. A figure is placed only where enough of it and of all others stays visible, so that every
object has an annotation. Coordinates are continuous pixels: pixel i covers [i, i + 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models.data.synthetic.figures import KEYPOINTS, OUTLINES, Figure, Part, Points, crowd, figure

CATEGORIES = ("person", *OUTLINES)
SIZES = (20, 80, 180)  # square root of a figure's area in pixels: minimum, mode and maximum
MIN_VISIBLE = 0.6  # fraction of a figure's area that is inside the image and not covered
MIN_PIXELS = 24  # visible pixels of a figure
SIBLING = 0.3  # probability that a figure is placed on one of the same category, to overlap it
CROWD = 0.12  # probability of a crowd in an image
TRIES = 20  # attempts to place a figure
SUPERSAMPLE = 5  # subpixels per side of a pixel, for antialiased edges
# The coverage, in 0..255, from which a pixel belongs to a mask: a half, plus half a subpixel because Pillow's polygons
# are wider by that.
COVERED = round(255 * (0.5 + 0.5 / SUPERSAMPLE))


@dataclass(frozen=True)
class Instance:
    """The ground truth of an object in an image."""

    category: str
    mask: NDArray[np.bool_]  # [H, W], the visible pixels
    outline: tuple[Points, ...]  # polygons; empty if the object has holes or is not completely visible
    keypoints: Points | None  # [17, 3]: x, y and COCO's visibility; None if it has none
    crowd: bool


def draw(rng: Generator, sides: tuple[int, int], objects: tuple[int, int]) -> tuple[Image.Image, list[Instance]]:
    """Draw a random image.

    Args:
        rng: determines everything.
        sides: minimum and maximum of height and width, in pixels.
        objects: minimum and maximum number of objects, without a crowd. Objects that do not fit are left out.

    Returns:
        The image, and its objects from back to front.
    """
    size = width, height = rng.integers(*sides, size=2, endpoint=True)
    scene = _Scene(height, width, rng)
    if rng.random() < CROWD:
        scene.place(crowd(_category(rng), size * rng.uniform(0.2, 0.8, 2), rng))
    singles: list[Figure] = []
    for _ in range(rng.integers(*objects, endpoint=True)):
        for _ in range(TRIES):
            category, centre = _category(rng), size * rng.uniform(0.08, 0.92, 2)
            if singles and rng.random() < SIBLING:
                sibling = singles[rng.integers(len(singles))]
                corners = _corners(sibling)
                category, centre = sibling.category, corners[rng.integers(len(corners))]
            candidate = figure(category, np.exp(rng.triangular(*np.log(SIZES))), centre, rng)
            if scene.place(candidate):
                singles.append(candidate)
                break
    return scene.render(), scene.instances()


def _category(rng: Generator) -> str:
    return CATEGORIES[rng.integers(len(CATEGORIES))]


class _Scene:
    """An image under construction: its pixels, and the part of a figure that each pixel shows."""

    def __init__(self, height: int, width: int, rng: Generator):
        self.rng = rng
        mean = rng.uniform(60, 195) + rng.uniform(-35, 35, 3)
        patches = mean + rng.uniform(-20, 20, (5, 5, 1)) + rng.uniform(-15, 15, (5, 5, 3))
        grain = rng.uniform(0, 25) * (np.asarray(_texture(width, height, rng), np.float32) / 255 - 0.5)
        self.canvas = _image(np.asarray(_blow_up(patches, width, height)) + grain[..., None])
        self.owner = np.zeros((height, width), np.int64)  # 0 is the background
        self.figures: list[tuple[Figure, int, int]] = []  # figure, owner index of its first part, area

    def place(self, candidate: Figure) -> bool:
        """Paint a figure if enough of it and of all earlier ones stays visible; returns whether it was painted."""
        corners, (height, width) = _corners(candidate), self.owner.shape
        left, top = np.floor(corners.min(0)).astype(int).tolist()
        right, bottom = np.ceil(corners.max(0)).astype(int).tolist()
        window = np.s_[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        inside = np.s_[max(-top, 0) : max(height - top, 0), max(-left, 0) : max(width - left, 0)]

        stencils = [_stencil(part, left, top, right - left, bottom - top) for part in candidate.parts]
        coverages = [np.asarray(stencil) for stencil in stencils]
        first = 1 + sum(len(other.parts) for other, *_ in self.figures)
        owned = np.zeros((bottom - top, right - left), np.int64)
        for owner, coverage in enumerate(coverages, first):
            owned[coverage >= COVERED] = owner
        owners = self.owner.copy()
        owners[window] = np.where(owned[inside], owned[inside], owners[window])
        figures = [*self.figures, (candidate, first, np.count_nonzero(owned))]
        pixels = np.bincount(owners.ravel(), minlength=first + len(coverages))
        for other, start, area in figures:
            if pixels[start : start + len(other.parts)].sum() < max(MIN_PIXELS, MIN_VISIBLE * area):
                return False

        self.owner, self.figures = owners, figures
        paints: dict[str, Image.Image] = {}
        for part, stencil in zip(candidate.parts, stencils, strict=True):
            if part.paint not in paints:
                alike = [c for c, other in zip(coverages, candidate.parts, strict=True) if other.paint == part.paint]
                covered = np.max(alike, axis=0)[inside] > 0
                paints[part.paint] = self._paint(np.asarray(self.canvas)[window][covered], stencil.size)
            self.canvas.paste(paints[part.paint], (left, top), stencil)
        return True

    def _paint(self, beneath: NDArray, size: tuple[int, int]) -> Image.Image:
        """A random texture in two colours that stand out from what it covers.

        Args:
            beneath: `[N, 3]`, pixels to be covered. The most distant of 16 random pairs of colours is taken.
            size: width and height.
        """
        pairs = self.rng.integers(0, 256, (16, 2, 3))
        pairs[:, 1] = pairs[:, 0] + (pairs[:, 1] - pairs[:, 0]) // 3  # a texture must not hide the outline
        distances = np.linalg.norm(pairs[:, :, None] - beneath[:: 1 + len(beneath) // 32], axis=-1)
        pair = pairs[distances.min((1, 2), initial=255).argmax()]
        one, other = (Image.new("RGB", size, tuple(colour)) for colour in pair.tolist())
        return Image.composite(one, other, _texture(*size, self.rng))

    def render(self) -> Image.Image:
        """The image with noise added."""
        noise = self.rng.standard_normal(self.owner.shape, np.float32) * self.rng.uniform(1, 6)
        return _image(np.asarray(self.canvas) + noise[..., None])

    def instances(self) -> list[Instance]:
        """The ground truth of all figures, from back to front."""
        result = []
        for drawn, first, area in self.figures:
            mask = (self.owner >= first) & (self.owner < first + len(drawn.parts))
            whole = np.count_nonzero(mask) == area and not any(part.holes for part in drawn.parts)
            outline = tuple(polygon for part in drawn.parts for polygon in part.polygons) if whole else ()
            result.append(Instance(drawn.category, mask, outline, self._keypoints(drawn, first), drawn.crowd))
        return result

    def _keypoints(self, drawn: Figure, first: int) -> Points | None:
        """`[17, 3]`: x, y, and visibility 2 if a part of the keypoint is in front, 1 if hidden, 0 if outside."""
        if drawn.keypoints is None:
            return None
        height, width = self.owner.shape
        owners = {owner: part.name for owner, part in enumerate(drawn.parts, first)}
        result = np.zeros((len(KEYPOINTS), 3))
        for row, (x, y), parts in zip(result, drawn.keypoints.round(1), KEYPOINTS.values(), strict=True):
            if 0 <= x < width and 0 <= y < height:
                row[:] = x, y, 2 if owners.get(self.owner[int(y), int(x)]) in parts else 1
        return result


def _corners(drawn: Figure) -> Points:
    return np.concatenate([polygon for part in drawn.parts for polygon in part.polygons])


def _stencil(part: Part, left: int, top: int, width: int, height: int) -> Image.Image:
    """The coverage of each pixel by a part, 0..255."""
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for polygons, fill in ((part.polygons, 255), (part.holes, 0)):
        for polygon in polygons:
            pen.polygon(((polygon - (left, top)) * SUPERSAMPLE).ravel().tolist(), fill)
    return canvas.reduce(SUPERSAMPLE)


# Functions of a position (2 pi is a period) to brightness, clipped to 0..1.
TEXTURES: tuple[Callable[[NDArray, NDArray], NDArray], ...] = (
    lambda u, _: 0.5 + 2 * np.sin(u),  # stripes
    lambda u, v: 0.5 + 2 * np.sin(u) * np.sin(v),  # checks
    lambda u, v: 2 * (np.cos(u) + np.cos(v)) - 0.5,  # dots
    lambda u, _: (u - u.min()) / (u.max() - u.min() + 1),  # gradient
)


def _texture(width: int, height: int, rng: Generator) -> Image.Image:
    """A random texture in grey, 0..255."""
    choice = rng.integers(len(TEXTURES) + 1)
    if choice == len(TEXTURES):  # blotches
        return _blow_up(rng.uniform(0, 255, (2 + height // 10, 2 + width // 10)), width, height)
    turn, step = rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(6, 16)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    along, across = step * np.cos(turn), step * np.sin(turn)
    return _image(255 * TEXTURES[choice](along * x + across * y, along * y - across * x))


def _blow_up(grid: NDArray, width: int, height: int) -> Image.Image:
    return _image(grid).resize((width, height), Image.Resampling.BICUBIC)


def _image(values: NDArray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
