"""Outlines of the objects in generated images: shapes, people with COCO's 17 keypoints, and crowds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Points = NDArray[np.float64]  # [N, 2], x and y

# COCO's keypoints in COCO's order, and the parts of a person that each belongs to. A keypoint is visible if the
# frontmost part at its position is one of these.
KEYPOINTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("nose", "left_eye", "right_eye"), ("head", "face")),
    **dict.fromkeys(("left_ear", "right_ear"), ("head",)),
    **{f"{side}_shoulder": ("torso", f"{side} arm") for side in ("left", "right")},
    **{f"{side}_{joint}": (f"{side} arm",) for joint in ("elbow", "wrist") for side in ("left", "right")},
    **{f"{side}_hip": ("torso", f"{side} leg") for side in ("left", "right")},
    **{f"{side}_{joint}": (f"{side} leg",) for joint in ("knee", "ankle") for side in ("left", "right")},
}
SKELETON = (  # COCO's pairs of keypoints, counted from 1
    *((16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9)),
    *((8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7)),
)


@dataclass(frozen=True)
class Part:
    """A region: the union of polygons without the holes. Parts of a figure with the same `paint` share a texture."""

    name: str
    paint: str
    polygons: tuple[Points, ...]
    holes: tuple[Points, ...] = ()


@dataclass(frozen=True)
class Figure:
    """An object. Later parts are in front of earlier ones."""

    category: str
    parts: tuple[Part, ...]
    keypoints: Points | None = None
    crowd: bool = False

    def transform(self, matrix: Points, offset: Points) -> Figure:
        """A copy with each point multiplied by `matrix`, `[2, 2]`, and moved by `offset`, `[2]` in pixels."""

        def move(polygons: Iterable[Points]) -> tuple[Points, ...]:
            return tuple(polygon @ matrix.T + offset for polygon in polygons)

        parts = tuple(replace(part, polygons=move(part.polygons), holes=move(part.holes)) for part in self.parts)
        keypoints = None if self.keypoints is None else self.keypoints @ matrix.T + offset
        return replace(self, parts=parts, keypoints=keypoints)


def figure(category: str, size: float, centre: Points, rng: Generator) -> Figure:
    """Draw a random object.

    Args:
        category: "person" or a key of `OUTLINES`.
        size: square root of its approximate area, in pixels.
        centre: x and y in pixels.
        rng: for rotation, aspect ratio and pose.
    """
    if category == "person":
        result, scale = _person(rng), np.full(2, PERSON_HEIGHT * size)
    else:
        holes = (_circle(rng.uniform(0.26, 0.34)),) if category == "ring" else ()
        result = Figure(category, (Part("shape", "shape", (OUTLINES[category],), holes),))
        scale = size * np.exp(rng.uniform(-0.12, 0.12, 2))
    turn = rng.uniform(-0.3, 0.3)  # radians: approximately upright
    rotation = np.array([(np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))])
    return result.transform(rotation * scale, centre)


def crowd(category: str, centre: Points, rng: Generator) -> Figure:
    """Draw many small objects, which are annotated as one crowd.

    Args:
        category: of all objects.
        centre: x and y in pixels, around which the objects are placed.
        rng: determines everything else.
    """
    count, size = rng.integers(8, 15), rng.uniform(13, 19)
    places = centre + rng.normal(scale=1.4 * size, size=(count, 2))
    members = [figure(category, size * rng.uniform(0.8, 1.2), place, rng) for place in places]
    parts = (replace(part, paint=f"{part.paint} {i}") for i, member in enumerate(members) for part in member.parts)
    return Figure(category, tuple(parts), crowd=True)


def _circle(radius: float, centre: Sequence[float] = (0, 0), corners: int = 48) -> Points:
    """A regular polygon, starting with its top corner."""
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1) + centre


def _unit_area(outline: Points) -> Points:
    """Scale a polygon to an area of 1 (shoelace formula)."""
    x, y = outline.T
    return outline / np.sqrt(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


OUTLINES = {
    "disc": _unit_area(_circle(1)),
    "ring": _unit_area(_circle(1)),
    "square": np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]),
    "triangle": _unit_area(_circle(1, corners=3)),
}

# A person in units of its upright height, with the origin at its waist. Its area is about 0.3 squared units.
PERSON_HEIGHT = 0.3**-0.5
HEAD, NOSE, EYE, EAR = (0.0, -0.41), (0.0, -0.4), (0.035, -0.43), (0.09, -0.41)  # of pairs, the left one
SHOULDER, HIP = (0.13, -0.27), (0.07, 0.02)
TORSO = ((-0.165, -0.3), (0.165, -0.3), (0.125, 0.06), (-0.125, 0.06))
MOUTH = ((-0.03, -0.365), (0.03, -0.365))
MIRROR = np.array([-1, 1])


def _person(rng: Generator) -> Figure:
    """A person in a random pose, facing the viewer: its left side is at the right of the image."""
    limbs: dict[str, Points] = {}
    for side, mirror in (("left", np.ones(2)), ("right", MIRROR)):
        arm, thigh = rng.uniform((-0.1, 0.0), (1.4, 0.6))
        forearm, shin = arm + rng.uniform(-1.6, 0.8), thigh + rng.uniform(-0.4, 0.2)
        limbs[f"{side} arm"] = _chain(SHOULDER, (0.17, 0.16), (arm, forearm)) * mirror
        limbs[f"{side} leg"] = _chain(HIP, (0.23, 0.23), (thigh, shin)) * mirror
    arms = [Part(name, "skin", _limb(limbs[name], 0.065)) for name in ("left arm", "right arm")]
    rng.shuffle(arms)
    behind = rng.integers(3)
    parts = (
        *arms[:behind],
        *(Part(name, "trousers", _limb(limbs[name], 0.08)) for name in ("left leg", "right leg")),
        Part("torso", "shirt", (np.array(TORSO),)),
        Part("head", "skin", (_circle(0.105, HEAD, 24),)),
        Part("face", "face", (_circle(0.016, EYE, 8), _circle(0.016, EYE * MIRROR, 8), *_limb(np.array(MOUTH), 0.009))),
        *arms[behind:],
    )
    face = np.array([NOSE, EYE, EYE * MIRROR, EAR, EAR * MIRROR])
    left, right = (np.concatenate([limbs[f"{side} arm"], limbs[f"{side} leg"]]) for side in ("left", "right"))
    return Figure("person", parts, np.concatenate([face, np.stack([left, right], 1).reshape(-1, 2)]))


def _chain(start: Sequence[float], lengths: Sequence[float], angles: Sequence[float]) -> Points:
    """Joints of a limb from `start` on. Angles are in radians: 0 points straight down, positive ones outwards."""
    steps = [(length * np.sin(angle), length * np.cos(angle)) for length, angle in zip(lengths, angles, strict=True)]
    return np.cumsum([start, *steps], 0)


def _limb(joints: Points, radius: float) -> tuple[Points, ...]:
    """For each pair of consecutive joints, a polygon with round ends."""
    bones = []
    for start, end in pairwise(joints):
        x, y = (end - start) / np.linalg.norm(end - start)
        cap = _circle(radius, corners=16)[:9] @ np.array([(x, y), (-y, x)])
        bones.append(np.concatenate([end + cap, start - cap]))
    return tuple(bones)
