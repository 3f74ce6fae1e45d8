"""Ground-truth masks in compact form: polygons, runs or bitmaps, which nothing rasterises before `mask_targets`.

An object is a list of polygons, one run-length encoding (RLE) or one bitmap; objects of all three kinds may be mixed.
A flip, resize or crop moves the vertices of polygons. It leaves runs and bitmaps as they are and changes where their
pixels lie in the image: along each axis, the point p of the image, in pixels whose centres are the integers, is point

    q = scale * p + offset

of the object's own pixels. So a mask is sampled once, from the pixels that were annotated.

Memory: 16 bytes for each vertex in float64, 4 for each run. 500 polygons of 60 vertices take 0.5 MB; as bitmaps of
8000 x 4000 pixels they take 16 GB.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from fastmask.kernels._validation import check_int, check_pair, check_sequence, check_tensor, describe

# The kinds of objects, and the columns of `Masks.objects`.
POLYGONS, RLE, BITMAP = 0, 1, 2
OBJECT_COLUMNS = 5

MAX_PIXELS = 2**31 - 1  # of an image: runs end at 32-bit indices
_CODES_PER_COUNT = 7  # of a compressed RLE, at most, for a number of 32 bits

Segmentation = Sequence[Sequence[float]] | Mapping[str, Any]  # as in COCO's JSON


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of the objects of one image, or of a batch of images, in compact form.

    Make them with `from_coco` or `from_bitmaps`, and batches with `batch`; the arguments below are what these
    prepare. Masks can be pickled. Indexing an image's masks selects objects and copies no vertex, run or pixel.

    Args:
        vertices: `[V, 2]` float32 or float64, `(x, y)` of all polygons in pixels of the image; continuous coordinates,
            pixel j covers [j, j + 1).
        parts: `[P, 2]` int64, the first vertex and the number of vertices of each polygon.
        runs: int32, where each run ends, in pixels of its object numbered down the columns; runs of background and of
            the object take turns.
        pixels: uint8, those of all bitmaps, 0 or 1, row by row.
        objects: `[G, 5]` int64, the kind of each object (0 polygons, 1 RLE, 2 bitmap), its first part, run or pixel,
            their number, and the height and width of its own pixels, which polygons do not have.
        transforms: `[G, 4]` float32, `(scale_x, scale_y, offset_x, offset_y)` from the image to an object's own pixels.
        offsets: `[B + 1]` int64, the first object of each image, and G.
        sizes: (height, width) of each of the B images.
    """

    vertices: Tensor
    parts: Tensor
    runs: Tensor
    pixels: Tensor
    objects: Tensor
    transforms: Tensor
    offsets: Tensor
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def from_coco(
        cls, segmentations: Sequence[Segmentation], size: tuple[int, int], dtype: torch.dtype = torch.float64
    ) -> Self:
        """Masks of the objects of one image from COCO's JSON.

        Args:
            segmentations: of each object, a list of polygons `[x1, y1, x2, y2, ...]`, or RLE `{"size": (height, width),
                "counts": counts}`, where `counts` is a list of numbers or COCO's compressed string.
            size: (height, width) of the image.
            dtype: of the vertices. float64 keeps the results equal to pycocotools'.

        Returns:
            Masks on the CPU.

        Raises:
            TypeError: a segmentation is neither polygons nor RLE, or an argument has the wrong type.
            ValueError: there is no polygon, one has fewer than three points, or the runs do not fill the image.
        """
        size = _check_size(size)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected float32 or float64, got {dtype}")
        coordinates, runs = array("d"), array("i")
        parts, objects = array("q"), array("q")
        for segmentation in check_sequence("segmentations", segmentations, "segmentations"):
            if isinstance(segmentation, Mapping):
                ends = _ends_of_runs(segmentation, size)
                objects.extend((RLE, len(runs), len(ends), *size))
                runs.extend(ends)
            else:
                polygons = check_sequence("segmentations", segmentation, "polygons, or RLE")
                if not polygons:
                    raise ValueError("segmentations: expected polygons, got an empty list")
                objects.extend((POLYGONS, len(parts) // 2, len(polygons), 0, 0))
                for polygon in polygons:
                    first = len(coordinates) // 2
                    _extend_by_polygon(coordinates, polygon)
                    parts.extend((first, len(coordinates) // 2 - first))
        count = len(objects) // OBJECT_COLUMNS
        return cls(
            vertices=_from_array(coordinates, torch.float64).view(-1, 2).to(dtype),
            parts=_from_array(parts, torch.int64).view(-1, 2),
            runs=_from_array(runs, torch.int32),
            pixels=torch.empty(0, dtype=torch.uint8, device="cpu"),
            objects=_from_array(objects, torch.int64).view(-1, OBJECT_COLUMNS),
            transforms=_identity(count, torch.device("cpu")),
            offsets=_offsets([count], torch.device("cpu")),
            sizes=(size,),
        )

    @classmethod
    def from_bitmaps(cls, bitmaps: Tensor) -> Self:
        """Masks of the objects of one image from bitmaps, which are not copied if they are contiguous.

        Args:
            bitmaps: `[G, H, W]`, bool or uint8 of 0 and 1.

        Returns:
            Masks on the device of `bitmaps`.

        Raises:
            TypeError: `bitmaps` is not a dense tensor of these dtypes.
            ValueError: `bitmaps` has another shape, or more than 2^31 - 1 pixels an image.
        """
        check_tensor("bitmaps", bitmaps)
        if bitmaps.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"bitmaps: expected bool or uint8, got {bitmaps.dtype}")
        if bitmaps.ndim != 3 or bitmaps.shape[1] * bitmaps.shape[2] > MAX_PIXELS:
            raise ValueError(f"bitmaps: expected [G, H, W] of H * W < 2^31, got {list(bitmaps.shape)}")
        count, height, width = bitmaps.shape
        device = bitmaps.device
        objects = torch.empty(count, OBJECT_COLUMNS, dtype=torch.int64, device=device)
        for column, value in enumerate((BITMAP, 0, height * width, height, width)):
            objects[:, column] = value
        objects[:, 1] = torch.arange(count, device=device) * (height * width)
        return cls(
            vertices=torch.empty(0, 2, dtype=torch.float64, device=device),
            parts=torch.empty(0, 2, dtype=torch.int64, device=device),
            runs=torch.empty(0, dtype=torch.int32, device=device),
            pixels=bitmaps.contiguous().view(torch.uint8).flatten(),
            objects=objects,
            transforms=_identity(count, device),
            offsets=_offsets([count], device),
            sizes=((height, width),),
        )

    @classmethod
    def cat(cls, masks: Sequence[Masks]) -> Self:
        """The objects of several masks of one image.

        Args:
            masks: at least one, of one image size and on one device.

        Returns:
            Masks of one image.

        Raises:
            TypeError: `masks` is not a sequence of `Masks`.
            ValueError: there are none, one is a batch, or sizes or devices differ.
        """
        joined = cls.batch(masks)
        if len(set(joined.sizes)) > 1 or len(joined.sizes) != len(masks):
            raise ValueError(f"masks: expected those of one image size, got {list(joined.sizes)}")
        offsets = _offsets([len(joined)], joined.offsets.device)
        return replace(joined, offsets=offsets, sizes=joined.sizes[:1])

    @classmethod
    def batch(cls, masks: Sequence[Masks]) -> Self:
        """The masks of several images, one after the other; no host-device synchronisation.

        Args:
            masks: of each image, at least one; all on one device.

        Returns:
            Masks of a batch. Vertices are float64 if any are.

        Raises:
            TypeError: `masks` is not a sequence of `Masks`.
            ValueError: there are none, or devices differ.
        """
        parts = check_sequence("masks", masks, "Masks")
        if not parts:
            raise ValueError("masks: expected at least one, got none")
        for part in parts:
            if not isinstance(part, Masks):
                raise TypeError(f"masks: expected Masks, got {describe(part)}")
            if part.device != parts[0].device:
                raise ValueError(f"masks: expected all on {parts[0].device}, got one on {part.device}")
        if len(parts) == 1:
            return cls(**vars(parts[0]))
        polygons, objects, offsets = [], [], [parts[0].offsets[:1]]
        vertex = part_index = run = pixel = index = 0
        for part in parts:
            polygons.append(torch.stack([part.parts[:, 0] + vertex, part.parts[:, 1]], 1))
            kind, first, *rest = part.objects.unbind(1)
            # By kind, without a host tensor: it would be copied to the device.
            base = (kind == POLYGONS) * part_index + (kind == RLE) * run + (kind == BITMAP) * pixel
            objects.append(torch.stack([kind, first + base, *rest], 1))
            offsets.append(part.offsets[1:] + index)
            vertex += len(part.vertices)
            part_index += len(part.parts)
            run += len(part.runs)
            pixel += len(part.pixels)
            index += len(part)
        dtype = max((part.vertices.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        return cls(
            vertices=torch.cat([part.vertices.to(dtype) for part in parts]),
            parts=torch.cat(polygons),
            runs=torch.cat([part.runs for part in parts]),
            pixels=torch.cat([part.pixels for part in parts]),
            objects=torch.cat(objects),
            transforms=torch.cat([part.transforms for part in parts]),
            offsets=torch.cat(offsets),
            sizes=tuple(size for part in parts for size in part.sizes),
        )

    def __len__(self) -> int:
        """The number of objects, G."""
        return len(self.objects)

    def __getitem__(self, index: int | slice | Tensor) -> Self:
        """The objects of one image that `index` selects; they share vertices, runs and pixels with this."""
        self._check_one_image()
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index: expected that of one of {len(self)} objects, got {index}")
            index = slice(index, index + 1 or None)
        objects = self.objects[index]
        offsets = _offsets([len(objects)], self.device)
        return replace(self, objects=objects, transforms=self.transforms[index], offsets=offsets)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the one image.

        Raises:
            ValueError: these are the masks of a batch.
        """
        self._check_one_image()
        return self.sizes[0]

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.objects.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A copy with `Tensor.to` applied to every tensor, for a device. A dtype would convert indices too."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def flip(self) -> Self:
        """The masks of the horizontally flipped image.

        Raises:
            ValueError: these are the masks of a batch.
        """
        width = self.size[1]
        x, y = self.vertices.unbind(1)
        scale_x, scale_y, offset_x, offset_y = self.transforms.unbind(1)
        transforms = torch.stack([-scale_x, scale_y, offset_x + scale_x * (width - 1), offset_y], 1)
        return replace(self, vertices=torch.stack([width - x, y], 1), transforms=transforms)

    def resize(self, size: tuple[int, int]) -> Self:
        """The masks of the resized image.

        Args:
            size: (height, width) after the resize.

        Raises:
            ValueError: these are the masks of a batch, or a side is less than 1.
        """
        size = _check_size(size, least=1)
        (old_height, old_width), (height, width) = self.size, size
        x, y = self.vertices.unbind(1)
        vertices = torch.stack([x * (width / old_width), y * (height / old_height)], 1)
        ratio_x, ratio_y = old_width / width, old_height / height
        scale_x, scale_y, offset_x, offset_y = self.transforms.unbind(1)
        transforms = [scale_x * ratio_x, scale_y * ratio_y]
        transforms += [offset_x + scale_x * (ratio_x / 2 - 0.5), offset_y + scale_y * (ratio_y / 2 - 0.5)]
        return replace(self, vertices=vertices, transforms=torch.stack(transforms, 1), sizes=(size,))

    def crop(self, top: int, left: int, height: int, width: int) -> Self:
        """The masks of a part of the image. What lies outside is kept, and moves with it.

        Args:
            top, left: the first row and column of the part.
            height, width: its size.

        Raises:
            ValueError: these are the masks of a batch, or a side is negative.
        """
        self._check_one_image()
        top, left = check_int("top", top), check_int("left", left)
        size = check_int("height", height, least=0), check_int("width", width, least=0)
        x, y = self.vertices.unbind(1)
        scale_x, scale_y, offset_x, offset_y = self.transforms.unbind(1)
        transforms = torch.stack([scale_x, scale_y, offset_x + scale_x * left, offset_y + scale_y * top], 1)
        return replace(self, vertices=torch.stack([x - left, y - top], 1), transforms=transforms, sizes=(size,))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})

    def _check_one_image(self) -> None:
        if len(self.sizes) != 1:
            raise ValueError(f"masks: expected those of one image, got a batch of {len(self.sizes)}")


def _check_size(size: Any, least: int = 0) -> tuple[int, int]:
    height, width = check_pair("size", size, least=least)
    if height * width > MAX_PIXELS:
        raise ValueError(f"size: expected fewer than 2^31 pixels, got {(height, width)}")
    return height, width


def _identity(count: int, device: torch.device) -> Tensor:
    transforms = torch.zeros(count, 4, dtype=torch.float32, device=device)
    transforms[:, :2] = 1
    return transforms


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """The first object of each image, and the number of objects, without a copy from the host."""
    return torch.cat([torch.full((1,), n, dtype=torch.int64, device=device) for n in accumulate([0, *counts])])


def _from_array(values: array[Any], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype, device="cpu")


def _extend_by_polygon(coordinates: array[float], polygon: Any) -> None:
    if isinstance(polygon, str | bytes | Mapping) or not hasattr(polygon, "__len__"):
        raise TypeError(f"segmentations: expected polygons of numbers, got {describe(polygon)}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"segmentations: expected x, y of 3 points or more, got {describe(polygon)}")
    try:
        coordinates.extend(polygon)
    except TypeError:
        raise TypeError(f"segmentations: expected polygons of numbers, got {describe(polygon)}") from None


def _ends_of_runs(rle: Mapping[str, Any], size: tuple[int, int]) -> list[int]:
    """Where each run ends. No run is empty but the first: a binary search needs ascending ends."""
    counts = rle.get("counts")
    if isinstance(counts, str | bytes):
        counts = list(_decompress(counts.encode() if isinstance(counts, str) else counts))
    counts = [check_int("segmentations", count, least=0) for count in check_sequence("segmentations", counts, "runs")]
    if tuple(rle.get("size", ())) != size or sum(counts) != size[0] * size[1]:
        raise ValueError(f"segmentations: expected runs that fill {size}, got {describe(dict(rle))}")
    ends = list(accumulate(counts))
    if 0 not in counts[1:]:
        return ends
    merged: list[int] = []
    for index, end in enumerate(ends):
        if index % 2 == len(merged) % 2:
            merged.append(end)
        else:  # the run before was empty and left out, and this one continues the one before that
            merged[-1] = end
        if len(merged) > 1 and merged[-1] == merged[-2]:
            merged.pop()
    return merged


def _decompress(text: bytes) -> Iterator[int]:
    """The counts in COCO's compressed string.

    Each character holds 5 bits of a number, the lowest first, a sixth that is set if more follow, and 48. The last
    bit of a number is its sign. From the fourth on, each is the difference from the last but one.
    """
    counts = [0, 0]
    value = bits = number = 0
    for code in text:
        code -= 48
        if not 0 <= code < 64 or bits >= 5 * _CODES_PER_COUNT:
            raise ValueError(f"segmentations: expected COCO's compressed counts, got {describe(text)}")
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            value -= (code & 16) << (bits - 4)
            if number > 2:
                value += counts[0]
            counts = [counts[1], value]
            yield value
            value, bits, number = 0, 0, number + 1
    if bits or not number:
        raise ValueError(f"segmentations: expected COCO's compressed counts, got {describe(text)}")
