"""Sampling of matched boxes for the losses: a fixed number per image, positives first (Ren et al. 2015, §3.1.3).

P of an image's boxes are positive and Q negative. k = min(P, fraction * number) positives and min(Q, number - k)
negatives are drawn, every subset of that size with equal probability. B images, N boxes, S = min(number, N) samples.

The draws are the first steps of a Fisher-Yates shuffle of the ranks 0..P-1 (and of 0..Q-1): step t swaps the items at t
and t + floor(u[t] * (P - t)), u uniform in [0, 1), and draws what is then at t. That takes S random numbers, where
selecting by random keys takes N and sorts them. The sample of a step is found without the array: follow the latest
earlier step that swapped something into the place, until there is none.

The device needs three launches: random numbers, the numbers of positives and negatives in each tile of boxes, and a
program for each sample, which reads the labels of one tile. The peers' samplers take about thirty and synchronise.
Deterministic for given random numbers: no atomics, one writer per element.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from fastmask.kernels._launch import Launch
from fastmask.kernels._runtime import ceil_div, jit, next_power_of_2, on_device_of, overridable, register, tl
from fastmask.kernels._validation import check_fraction, check_int, check_tensor, describe

BLOCK = 512  # labels in a tile
TILES = 512  # whose counts a program reads at a time
STEPS = 256  # whose random numbers a program reads at a time


def _draw_ranks(draws: Tensor, size: int) -> list[int]:
    """Ranks in [0, size) of one random subset, from a uniform random number for each."""
    step = torch.arange(len(draws), device=draws.device)
    left = size - step
    places = (step + (draws * left).long().clamp(min=0).minimum(left - 1)).tolist()
    items: dict[int, int] = {}  # by place, where the item is not the place's own
    ranks = []
    for place_of_step, place in enumerate(places):
        ranks.append(items.get(place, place))
        items[place] = items.get(place_of_step, place_of_step)
    return ranks


def sample_matches_reference(labels: Tensor, draws: Tensor, max_positives: int) -> tuple[Tensor, Tensor]:
    """Image by image."""
    samples = draws.shape[1]
    indices = torch.zeros(draws.shape, dtype=torch.int64, device=labels.device)
    valid = torch.zeros(draws.shape, dtype=torch.bool, device=labels.device)
    for image, label in enumerate(labels):
        drawn = 0
        for kind, most in ((1, max_positives), (0, samples)):
            candidates = (label == kind).nonzero()[:, 0]
            number = min(len(candidates), most, samples - drawn)
            ranks = _draw_ranks(draws[image, drawn : drawn + number], len(candidates))
            indices[image, drawn : drawn + number] = candidates[
                torch.tensor(ranks, dtype=torch.int64, device=labels.device)
            ]
            drawn += number
        valid[image, :drawn] = True
    return indices, valid


@jit(do_not_specialize=["num_boxes", "tiles"])
def count_labels_kernel(
    labels,  # [B, N]
    counts,  # [B, 2, tiles]: negatives, positives
    num_boxes,
    tiles,
    BLOCK: tl.constexpr,
):
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    index = tile * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + image * num_boxes + index, mask=index < num_boxes, other=-1)
    counts += image * 2 * tiles + tile
    tl.store(counts, tl.sum((label == 0).to(tl.int32), 0))
    tl.store(counts + tiles, tl.sum((label == 1).to(tl.int32), 0))


@jit()
def _place(draw, step, size):
    """What a step swaps with: a place in [step, size), whatever the random number is."""
    left = size - step
    return step + tl.maximum(tl.minimum((draw * left.to(tl.float64)).to(tl.int32), left - 1), 0)


@jit()
def _sum(counts, size, TILES: tl.constexpr):
    total = tl.zeros((TILES,), tl.int32)
    for first in range(0, size, TILES):
        position = first + tl.arange(0, TILES)
        total += tl.load(counts + position, mask=position < size, other=0)
    return tl.sum(total, 0)


@jit(do_not_specialize=["num_boxes", "tiles", "samples", "max_positives"])
def draw_samples_kernel(
    labels,  # [B, N]
    draws,  # [B, S] float64
    counts,  # [B, 2, tiles]: negatives, positives
    indices,  # [B, S]
    valid,  # [B, S]
    num_boxes,
    tiles,
    samples,  # S
    max_positives,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    STEPS: tl.constexpr,
):
    image = (tl.program_id(0) // samples).to(tl.int64)
    sample = tl.program_id(0) % samples
    counts += image * 2 * tiles
    num_negatives, num_positives = _sum(counts, tiles, TILES), _sum(counts + tiles, tiles, TILES)
    positives = tl.minimum(num_positives, max_positives)
    drawn = positives + tl.minimum(num_negatives, samples - positives)
    index = tl.full((), 0, tl.int32)
    if sample < drawn:
        kind = tl.where(sample < positives, 1, 0)
        first_sample = tl.where(kind != 0, 0, positives)
        size = tl.where(kind != 0, num_positives, num_negatives)
        counts += kind * tiles
        draws += image * samples + first_sample

        # The item that step `end` finds at `place`: what the latest earlier step swapped into it, if there is one.
        end = sample - first_sample
        place = _place(tl.load(draws + end), end, size)
        moved = 1
        while moved > 0:
            latest = -1
            for first in range(0, end, STEPS):
                step = first + tl.arange(0, STEPS)
                other = _place(tl.load(draws + step, mask=step < end, other=0.0), step, size)
                latest = tl.maximum(latest, tl.max(tl.where((other == place) & (step < end), step, -1), 0))
            moved = tl.where(latest >= 0, 1, 0)
            place = tl.where(latest >= 0, latest, place)
            end = tl.maximum(latest, 0)

        # The tile that has the place-th label of this kind, and how many come before it.
        tile = 0
        before = 0
        total = 0
        for first in range(0, tiles, TILES):
            position = first + tl.arange(0, TILES)
            count = tl.load(counts + position, mask=position < tiles, other=0)
            earlier = total + tl.cumsum(count, 0) <= place
            tile += tl.sum((earlier & (position < tiles)).to(tl.int32), 0)
            before += tl.sum(tl.where(earlier, count, 0), 0)
            total += tl.sum(count, 0)
        position = tile * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(labels + image * num_boxes + position, mask=position < num_boxes, other=-1)
        of_kind = (label == kind).to(tl.int32)
        chosen = (of_kind != 0) & (tl.cumsum(of_kind, 0) == place - before + 1)
        index = tl.sum(tl.where(chosen, position, 0), 0)
    output = image * samples + sample
    tl.store(indices + output, index.to(tl.int64))
    tl.store(valid + output, sample < drawn)


@lru_cache(maxsize=256)
def _prepared(
    num_boxes: int, samples: int, max_positives: int, block: int, most_tiles: int, most_steps: int
) -> tuple[Launch, Launch]:
    tiles = ceil_div(num_boxes, block)
    return (
        Launch(count_labels_kernel, num_boxes, tiles, BLOCK=block, num_warps=1),
        Launch(
            draw_samples_kernel,
            num_boxes,
            tiles,
            samples,
            min(max_positives, samples),
            BLOCK=block,
            TILES=min(most_tiles, max(32, next_power_of_2(tiles))),
            STEPS=min(most_steps, max(32, next_power_of_2(samples))),
            num_warps=1,
        ),
    )


def _launch_sample_matches(labels: Tensor, draws: Tensor, max_positives: int) -> tuple[Tensor, Tensor]:
    (batch, num_boxes), samples = labels.shape, draws.shape[1]
    indices = torch.empty(batch, samples, dtype=torch.int64, device=labels.device)
    valid = torch.empty(batch, samples, dtype=torch.bool, device=labels.device)
    if not indices.numel():
        return indices, valid
    count, draw = _prepared(num_boxes, samples, max_positives, BLOCK, TILES, STEPS)
    tiles = ceil_div(num_boxes, BLOCK)
    counts = torch.empty(batch, 2, tiles, dtype=torch.int32, device=labels.device)
    labels = labels.contiguous()
    with on_device_of(labels):
        count((batch * tiles,), labels, counts)
        draw((batch * samples,), labels, draws.contiguous(), counts, indices, valid.view(torch.uint8))
    return indices, valid


def _fake_sample_matches(labels: Tensor, draws: Tensor, _max_positives: int) -> tuple[Tensor, Tensor]:
    return labels.new_empty(draws.shape, dtype=torch.int64), labels.new_empty(draws.shape, dtype=torch.bool)


_sample_matches = register(
    "sample_matches(Tensor labels, Tensor draws, SymInt max_positives) -> (Tensor, Tensor)",
    reference=sample_matches_reference,
    launch=_launch_sample_matches,
    fake=_fake_sample_matches,
)


@overridable
def sample_matches(
    labels: Tensor, number: int, positive_fraction: float, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Sample boxes of each image at random by their labels; it never synchronises.

    Args:
        labels: `[B, N]`, integers: 1 positive, 0 negative; boxes with any other label are never sampled.
        number: how many boxes to sample in each image. Negatives replace missing positives; there are fewer samples
            if there are not enough negatives.
        positive_fraction: the largest fraction of `number` that is positive, rounded down; in [0, 1].
        generator: of random numbers, on the device of `labels`; None uses the device's default one. The same state
            gives the same samples.

    Returns:
        indices: `[B, S]` int64, S = min(number, N), of different boxes: positives, then negatives, then 0.
        valid: `[B, S]` boolean, which of them are samples.

    Raises:
        ValueError: `labels` has another shape, `number` is negative, `positive_fraction` is outside [0, 1], or
            `generator` is on another device.
        TypeError: `labels` is not a dense tensor of integers, `number` is not an int, `positive_fraction` is not a
            number, or `generator` is not a `torch.Generator`.

    Source: Ren et al. 2015, Faster R-CNN, §3.1.3.
    """
    check_tensor("labels", labels, integer=True)
    if labels.ndim != 2:
        raise ValueError(f"labels: expected [B, N], got {list(labels.shape)}")
    number = check_int("number", number, least=0)
    max_positives = int(number * check_fraction("positive_fraction", positive_fraction))
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {describe(generator)}")
        if generator.device.type != labels.device.type:
            raise ValueError(f"generator: expected on {labels.device} like labels, got {generator.device}")
    size = labels.shape[0], min(number, labels.shape[1])
    random = (
        torch.rand if generator is None else partial(torch.rand, generator=generator)
    )  # None takes no symbolic size
    draws = random(size, dtype=torch.float64, device=labels.device)
    return _sample_matches(labels, draws, max_positives)
