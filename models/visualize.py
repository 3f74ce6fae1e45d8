"""Drawing of detections on their image: masks with contours, boxes, keypoints with skeletons, names and scores."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_segmentation_masks

from models.structures import Category, Detections

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

# In pixels. Images with a smaller geometric mean of height and width are enlarged, so that text is legible.
LEGIBLE_SIZE = 480

MASK_ALPHA = 0.45


def draw(image: Tensor, detections: Detections, categories: Sequence[Category]) -> Tensor:
    """Draw detections on a copy of their image, the highest-scoring on top.

    Args:
        image: `[3, H, W]` uint8 RGB.
        detections: in pixels of the image; all of them are drawn.
        categories: label k is `categories[k - 1]`.

    Returns:
        `[3, zoom * H, zoom * W]` uint8 RGB on the CPU; `zoom` is 1, or a larger integer for small images.

    Raises:
        ValueError: the image is not uint8 `[3, H, W]`, or not of the size that the detections are for.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise ValueError(f"image: expected uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    if image.shape[1:] != detections.image_size:
        raise ValueError(f"detections: expected image_size {tuple(image.shape[1:])}, got {detections.image_size}")
    canvas, detections = _enlarge(image.cpu(), detections.to("cpu"))
    height, width = canvas.shape[1:]
    line = max(2, round(math.sqrt(height * width) / 400))

    colours = [_colour(index) for index in range(len(detections))]
    if detections.mask_probabilities is not None:
        for index in reversed(range(len(detections))):  # one at a time: a mask is as large as the image
            _draw_mask(canvas, detections[index : index + 1].masks()[0], colours[index], line)

    drawing = to_pil_image(canvas)
    pen = ImageDraw.Draw(drawing)
    boxes, labels = detections.boxes.tolist(), detections.labels.tolist()
    for index in reversed(range(len(detections))):
        x1, y1, x2, y2 = boxes[index]
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colours[index], width=line)
    for index in reversed(range(len(detections))):
        category = categories[labels[index] - 1]
        if detections.keypoints is not None and category.keypoints:
            points = [(x, y) for x, y, _ in detections.keypoints[index].tolist()]
            _draw_keypoints(pen, points, category.skeleton, colours[index], line)

    font = ImageFont.load_default(size=max(12, round(math.sqrt(height * width) / 40)))
    taken: list[Rectangle] = []
    for box, label, score, colour in zip(boxes, labels, detections.scores.tolist(), colours, strict=True):
        text = f"{categories[label - 1].name} {score:.0%}"
        taken.append(_draw_label(pen, text, box, colour, font, taken))
    return pil_to_tensor(drawing)


def _enlarge(image: Tensor, detections: Detections) -> tuple[Tensor, Detections]:
    """A copy of the image, enlarged by an integer if it is small, and the detections in its pixels."""
    height, width = image.shape[1:]
    zoom = math.ceil(LEGIBLE_SIZE / math.sqrt(height * width))
    if zoom == 1:
        return image.clone(), detections
    size = (zoom * height, zoom * width)
    keypoints = detections.keypoints
    if keypoints is not None:
        keypoints = keypoints * keypoints.new_tensor([zoom, zoom, 1])
    larger = replace(detections, boxes=detections.boxes * zoom, keypoints=keypoints, image_size=size)
    return resize(image, list(size)), larger


def _colour(index: int) -> Colour:
    """A colour. From one index to the next, the hue turns by the golden angle, so that neighbours in rank differ."""
    red, green, blue = colorsys.hsv_to_rgb(index * (math.sqrt(5) - 1) / 2 % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _draw_mask(canvas: Tensor, mask: Tensor, colour: Colour, line: int) -> None:
    """Tint a mask and draw its inner contour, in place; only the mask's bounding box is processed."""
    if not mask.any():
        return
    x1, y1, x2, y2 = masks_to_boxes(mask[None])[0].long().tolist()
    y, x = slice(max(y1 - line, 0), y2 + 1 + line), slice(max(x1 - line, 0), x2 + 1 + line)
    mask = mask[y, x]
    near = (~mask).float()[None]  # max_pool2d pads with -infinity: the image's border is no contour
    for kernel in ((2 * line - 1, 1), (1, 2 * line - 1)):
        near = max_pool2d(near, kernel, 1, (kernel[0] // 2, kernel[1] // 2))
    contour = mask & near[0].bool()
    tinted = draw_segmentation_masks(canvas[:, y, x], mask, MASK_ALPHA, colors=[colour])
    canvas[:, y, x] = draw_segmentation_masks(tinted, contour, 1.0, colors=[colour])


def _draw_keypoints(
    pen: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float]],
    skeleton: Sequence[tuple[int, int]],
    colour: Colour,
    line: int,
) -> None:
    """Draw limbs and joints in the instance's colour, with black edges to stand out from its mask."""
    for width, fill in ((2 * line, "black"), (line, colour)):
        for start, end in skeleton:
            pen.line((*points[start], *points[end]), fill=fill, width=width)
    for point in points:
        pen.circle(point, 1.5 * line, fill="white", outline="black", width=line // 2)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: Rectangle,
    colour: Colour,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Write text on a plate in the box's colour: above, inside or below the box, so that it covers no other plate.

    Returns:
        The plate.
    """
    image_width, image_height = pen.im.size
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    margin = max(1, round((bottom - top) / 6))
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x = min(max(box[0], 0), max(image_width - width, 0))
    places = [y for y in (box[1] - height, box[1], box[3], box[3] - height) if 0 <= y <= image_height - height]
    plates = [(x, y, x + width, y + height) for y in places or [0]]
    plate = next((p for p in plates if not any(_overlap(p, other) for other in taken)), plates[0])
    pen.rectangle(plate, fill=colour)
    red, green, blue = colour
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    fill = "black" if luminance > 128 else "white"
    pen.text((x + margin - left, plate[1] + margin - top), text, font=font, fill=fill)
    return plate


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
