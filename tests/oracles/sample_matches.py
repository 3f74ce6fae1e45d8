"""Samples by a shuffle of whole lists, and checks of samples for each variant of the kernels."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import torch

import fastmask
from fastmask.kernels import sample_matches


def draw_labels(shape, positives, negatives, seed):
    """Labels with these numbers of positives and negatives in each row, in random places; the others are -1."""
    labels = torch.full(shape, -1, dtype=torch.int8)
    g = torch.Generator().manual_seed(seed)
    for row, p, q in zip(labels, positives, negatives, strict=True):
        place = torch.randperm(len(row), generator=g)
        row[place[:p]] = 1
        row[place[p : p + q]] = 0
    return labels


def assert_sampled(indices, valid, labels, number, fraction):
    """Exact numbers of different boxes with the right labels, positives first."""
    indices, valid = indices.cpu(), valid.cpu()
    size = len(labels), min(number, labels.shape[1])
    assert indices.shape == valid.shape == size
    assert (indices.dtype, valid.dtype) == (torch.int64, torch.bool)
    for index, is_valid, label in zip(indices, valid, labels, strict=True):
        positives = min(int((label == 1).sum()), int(number * fraction))
        total = positives + min(int((label == 0).sum()), number - positives)
        assert is_valid.tolist() == [True] * total + [False] * (size[1] - total)
        assert (index[total:] == 0).all()
        assert label[index[:total]].tolist() == [1] * positives + [0] * (total - positives)
        assert len(index[:total].unique()) == total


def shuffle_oracle(labels, draws, max_positives):
    """Samples of one image by a Fisher-Yates shuffle of whole lists."""
    samples = []
    for kind, most in ((1, max_positives), (0, len(draws))):
        items = [box for box, label in enumerate(labels.tolist()) if label == kind]
        for step in range(min(len(items), most, len(draws) - len(samples))):
            place = step + int(draws[len(samples)].item() * (len(items) - step))
            items[step], items[place] = items[place], items[step]
            samples.append(items[step])
    return samples


def check_sampled(device, shape, positives, negatives, number, fraction, seed=0, dtype=torch.int8):
    """Samples are those of the shuffle, and the same for the same state of the generator."""
    labels = draw_labels(shape, positives, negatives, seed).to(dtype)
    results = []
    for _ in range(2):
        generator = torch.Generator(device).manual_seed(seed)
        results.append(fastmask.sample_matches(labels.to(device), number, fraction, generator=generator))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    indices, valid = results[0]
    assert_sampled(indices, valid, labels, number, fraction)
    generator = torch.Generator(device).manual_seed(seed)
    draws = torch.rand(indices.shape, dtype=torch.float64, generator=generator, device=device).cpu()
    for index, label, draw in zip(indices.tolist(), labels, draws, strict=True):
        expected = shuffle_oracle(label, draw, int(number * fraction))
        assert index == expected + [0] * (len(index) - len(expected))


def check_in_parts(device, **options):
    """With loops over parts of the tiles, and of the random numbers."""
    with patch.multiple(sample_matches, BLOCK=16, TILES=4, STEPS=8):
        check_sampled(device, **options)


VARIANTS = {
    "in parts": partial(check_in_parts, shape=(1, 210), positives=(40,), negatives=(150,), number=36, fraction=0.5),
    "few positives": partial(
        check_sampled, shape=(2, 200), positives=(3, 20), negatives=(150, 90), number=32, fraction=0.5
    ),
    "several tiles": partial(
        check_sampled, shape=(1, 4500), positives=(9,), negatives=(4000,), number=16, fraction=0.25
    ),
    "collisions": partial(check_sampled, shape=(1, 60), positives=(25,), negatives=(30,), number=48, fraction=0.5),
    "not enough": partial(
        check_sampled, shape=(3, 40), positives=(0, 30, 0), negatives=(4, 0, 0), number=20, fraction=0.25
    ),
    "more samples than boxes": partial(
        check_sampled, shape=(2, 3), positives=(1, 3), negatives=(1, 0), number=10**6, fraction=0.5
    ),
    "int64": partial(
        check_sampled, shape=(1, 50), positives=(9,), negatives=(21,), number=7, fraction=1.0, dtype=torch.int64
    ),
}
