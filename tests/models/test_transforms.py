"""Flips and sizes: boxes, masks, keypoints and pixels stay together."""

from dataclasses import replace

import pytest
import torch

from fastmask import Masks
from models.data.transforms import Augmentation, flip, mirrored_keypoints, resize
from models.structures import Target
from tests.oracles.mask_targets import bitmaps

pytestmark = pytest.mark.reference_only

NAMES = ("nose", "left_eye", "right_eye", "tail")


def sample(height=40, width=64):
    """An image whose bright pixels are the keypoints of its one object, and its target."""
    pixels = torch.tensor([[30, 12], [24, 8], [37, 9], [0, 0]])  # x, y; the last one is unlabelled
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, pixels[:3, 1], pixels[:3, 0]] = 255
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[:, 5:21, 10:42] = 1
    visibility = torch.tensor([2.0, 1.0, 2.0, 0.0])
    keypoints = torch.cat([(pixels + 0.5) * (visibility > 0)[:, None], visibility[:, None]], 1)[None]
    target = Target(
        boxes=torch.tensor([[10.0, 5.0, 42.0, 21.0]]),
        labels=torch.tensor([3]),
        crowds=torch.tensor([[0.0, 1.0, 7.5, 9.0]]),
        masks=Masks.from_bitmaps(masks),
        keypoints=keypoints,
        image_id=7,
    )
    return image, target


def box_of(mask):
    y, x = mask.nonzero().unbind(1)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def assert_consistent(image, target, tolerance):
    torch.testing.assert_close(target.boxes[0], box_of(bitmaps(target.masks)[0]), atol=tolerance, rtol=0)
    labelled = target.keypoints[0, target.keypoints[0, :, 2] > 0]
    for x, y, _ in labelled.floor().long().tolist():
        assert image[0, y, x] > 0


def test_a_flip_changes_everything_alike():
    image, target = sample()
    flipped_image, flipped = flip(image, target, mirrored_keypoints(NAMES))
    assert torch.equal(flipped_image, image.flip(2))
    assert torch.equal(bitmaps(flipped.masks), bitmaps(target.masks).flip(2))
    assert_consistent(flipped_image, flipped, 0)
    assert flipped.crowds.tolist() == [[56.5, 1.0, 64.0, 9.0]]
    # The left eye, at pixel 24, becomes the right eye, at pixel 63 - 24; it is still occluded.
    assert flipped.keypoints[0, NAMES.index("right_eye")].tolist() == [39.5, 8.5, 1]
    assert flipped.keypoints[0, NAMES.index("nose")].tolist() == [33.5, 12.5, 2]
    assert flipped.keypoints[0, NAMES.index("tail")].tolist() == [0, 0, 0]
    assert (flipped.labels, flipped.image_id) == (target.labels, 7)


def test_two_flips_are_none():
    image, target = sample()
    mirrored = mirrored_keypoints(NAMES)
    again_image, again = flip(*flip(image, target, mirrored), mirrored)
    assert torch.equal(again_image, image)
    assert torch.equal(bitmaps(again.masks), bitmaps(target.masks))
    for name in ("boxes", "crowds", "keypoints"):
        assert torch.equal(getattr(again, name), getattr(target, name)), name


@pytest.mark.parametrize(
    ("min_size", "max_size", "shape"), [(80, 1000, (80, 128)), (80, 96, (60, 96)), (20, 99, (20, 32))]
)
def test_a_resize_changes_everything_alike(min_size, max_size, shape):
    image, target = sample()
    resized_image, resized = resize(image, target, min_size, max_size)
    assert resized_image.shape == (3, *shape)
    assert resized_image.dtype == torch.uint8
    assert (len(resized.masks), resized.masks.size) == (1, shape)
    assert_consistent(resized_image, resized, 0.51)
    scale = shape[0] / 40
    torch.testing.assert_close(resized.crowds, target.crowds * scale)
    assert torch.equal(resized.keypoints[..., 2], target.keypoints[..., 2])


def test_a_mask_of_a_third_of_the_size_has_the_middle_of_three_pixels():
    image, target = sample(height=42, width=66)
    masks = torch.randint(2, (2, 42, 66), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    _, resized = resize(image, replace(target, masks=Masks.from_bitmaps(masks)), 14, 1000)
    assert torch.equal(bitmaps(resized.masks), masks[:, 1::3, 1::3])


def test_sizes_round_each_side_and_boxes_follow():
    image, target = sample(height=41, width=63)
    whole = replace(target, boxes=torch.tensor([[0.0, 0.0, 63.0, 41.0]]))
    resized_image, resized = resize(image, whole, 29, 1000)
    assert resized_image.shape == (3, 29, 45)  # 44.56
    torch.testing.assert_close(resized.boxes, torch.tensor([[0.0, 0.0, 45.0, 29.0]]))


def test_an_image_without_objects():
    image, target = sample()
    empty = replace(
        target, boxes=target.boxes[:0], labels=target.labels[:0], masks=target.masks[:0], keypoints=target.keypoints[:0]
    )
    _, result = resize(*flip(image, empty, mirrored_keypoints(NAMES)), 20, 1000)
    assert result.boxes.shape == (0, 4)
    assert (len(result.masks), result.masks.size) == (0, (20, 32))
    assert result.keypoints.shape == (0, 4, 3)


def test_boxes_alone():
    image, target = sample()
    _, result = resize(*flip(image, replace(target, masks=None, keypoints=None)), 20, 1000)
    assert result.masks is None
    assert result.keypoints is None
    torch.testing.assert_close(result.boxes, torch.tensor([[11.0, 2.5, 27.0, 10.5]]))


def test_keypoints_without_their_other_side():
    with pytest.raises(ValueError, match=r"names: .*'right_ear'"):
        mirrored_keypoints(["left_ear", "nose"])


def test_an_augmentation_depends_on_its_seed_alone():
    augmentation = Augmentation((20, 30, 40), 1000, 0.5, mirrored_keypoints(NAMES))
    image, target = sample()
    outcomes = []
    for seed in range(60):
        first_image, first = augmentation(image, target, seed)
        torch.rand(seed)  # the global generator is not used
        second_image, second = augmentation(image, target, seed)
        assert torch.equal(first_image, second_image)
        assert torch.equal(first.keypoints, second.keypoints)
        outcomes.append((first_image.shape[1], bool(first.keypoints[0, 0, 0] > first_image.shape[2] / 2)))
    # All six combinations of three sizes, with and without a flip, occur.
    assert {size for size, _ in outcomes} == {20, 30, 40}
    assert len(set(outcomes)) == 6


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flips_never_or_always(probability):
    image, target = sample()
    augmentation = Augmentation((40,), 1000, probability, mirrored_keypoints(NAMES))
    for seed in range(8):
        assert torch.equal(augmentation(image, target, seed)[0], image.flip(2) if probability else image)
