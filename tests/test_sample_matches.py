"""sample_matches: exact numbers, the samples of a shuffle, equal probabilities; wrong arguments."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmask.kernels.sample_matches import sample_matches
from tests.oracles.sample_matches import assert_sampled, check_sampled, draw_labels


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (10, 90, (4, 12)),  # a quarter of 16 is positive
        (2, 90, (2, 14)),  # negatives replace missing positives
        (10, 5, (4, 5)),  # positives do not replace missing negatives
        (0, 90, (0, 16)),
        (0, 0, (0, 0)),
    ],
)
def test_numbers_of_samples(device, positives, negatives, expected):
    labels = draw_labels((2, 100), (positives, 0), (negatives, 0), 0)
    indices, valid = sample_matches(labels.to(device), 16, 0.25)
    assert_sampled(indices, valid, labels, 16, 0.25)
    drawn = labels[0, indices[0][valid[0]].cpu()]
    assert ((drawn == 1).sum(), (drawn == 0).sum()) == expected
    assert not valid[1].any()


@pytest.mark.parametrize("number", [1, 5, 40])
def test_samples_are_those_of_a_shuffle(device, number):
    check_sampled(device, (2, 70), (11, 3), (40, 30), number, 0.5, seed=number)


def assert_equally_often(counts):
    """Pearson's statistic is within five standard deviations of its mean."""
    freedom, mean = len(counts) - 1, counts.double().mean()
    assert ((counts - mean) ** 2 / mean).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.reference_only
@pytest.mark.parametrize(("count", "number"), [(10, 4), (5, 4), (4, 2), (50, 49)])
def test_every_subset_is_as_probable(count, number):
    """Boxes, and pairs of boxes, are drawn equally often: in 4000 images."""
    labels = torch.zeros(4000, count, dtype=torch.int8)
    generator = torch.Generator().manual_seed(count)
    indices, valid = sample_matches(labels, number, 0.5, generator=generator)
    assert valid.all()
    for step in range(number):
        assert_equally_often(indices[:, step].bincount(minlength=count))
    if number > 1:
        pairs = indices[:, 0] * count + indices[:, 1]
        expected = torch.ones(count, count).fill_diagonal_(0).flatten()
        drawn = pairs.bincount(minlength=count * count)
        assert not drawn[expected == 0].any()
        assert_equally_often(drawn[expected > 0])


def test_positives_and_negatives_are_drawn_independently(device):
    """With as many of both, the same ranks would be drawn if both used the same random numbers."""
    labels = torch.cat([torch.ones(1, 1000), torch.zeros(1, 1000)], 1).to(torch.int8)
    indices, _ = sample_matches(labels.to(device), 20, 0.5)
    assert indices[0, :10].tolist() != (indices[0, 10:] - 1000).tolist()


def test_a_generator_gives_the_same_samples(device):
    labels = draw_labels((2, 200), (20, 30), (100, 90), 1).to(device)
    state = torch.Generator(device).manual_seed(5)
    first, second = (sample_matches(labels, 12, 0.5, generator=state)[0] for _ in range(2))
    again, _ = sample_matches(labels, 12, 0.5, generator=state.manual_seed(5))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    default, _ = sample_matches(labels, 12, 0.5)
    torch.manual_seed(7)
    assert torch.equal(default, sample_matches(labels, 12, 0.5)[0])


def test_random_numbers_out_of_range_stay_in_bounds(device):
    """Whatever the operator is given draws some box."""
    labels = draw_labels((1, 60), (20,), (30,), 1)
    for value in (1.0, 2.0, -3.0, float("nan"), float("inf")):
        draws = torch.full((1, 16), value, dtype=torch.float64, device=device)
        indices, valid = torch.ops.fastmask.sample_matches(labels.to(device), draws, 8)
        assert valid.all()
        assert ((indices >= 0) & (indices < 60)).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs(device, shape):
    indices, valid = sample_matches(torch.zeros(shape, dtype=torch.int8, device=device), 3, 0.5)
    assert indices.shape == valid.shape == (shape[0], min(3, shape[1]))


def test_no_samples(device):
    indices, valid = sample_matches(torch.ones(2, 9, dtype=torch.int8, device=device), 0, 0.5)
    assert indices.shape == valid.shape == (2, 0)
    indices, valid = sample_matches(torch.ones(2, 9, dtype=torch.int8, device=device), 4, 0.2)
    assert not valid.any()
    assert not indices.any()


def test_memory_layouts(device):
    labels = draw_labels((2, 200), (20, 30), (100, 90), 1)
    results = []
    for given in (labels.to(device), labels.t().contiguous().t().to(device)):
        generator = torch.Generator(device).manual_seed(0)
        results.append(sample_matches(given, 16, 0.5, generator=generator))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_is_registered_in_full(device):
    labels = draw_labels((2, 60), (9, 3), (20, 30), 1).to(device)
    draws = torch.rand(2, 16, dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.fastmask.sample_matches.default, (labels, draws, 8))


def test_compiles_to_one_graph(device):
    compiled = torch.compile(lambda labels: sample_matches(labels, 16, 0.5), fullgraph=True, backend="aot_eager")
    for size in (60, 90):
        labels = draw_labels((2, size), (9, 3), (20, 30), size)
        indices, valid = compiled(labels.to(device))
        assert_sampled(indices, valid, labels, 16, 0.5)


def test_runs_on_fake_tensors(device):
    with FakeTensorMode():
        labels = torch.zeros(2, 60, dtype=torch.int8, device=device)
        indices, valid = sample_matches(labels, 16, 0.5)
    assert (indices.shape, indices.dtype, valid.shape, valid.dtype) == ((2, 16), torch.int64, (2, 16), torch.bool)
    assert indices.device.type == torch.device(device).type


LABELS = torch.zeros(2, 9, dtype=torch.int8)


@pytest.mark.parametrize(
    ("error", "named", "arguments", "options"),
    [
        (ValueError, r"labels: expected \[B, N\], got \[9\]", (LABELS[0], 4, 0.5), {}),
        (TypeError, "labels: expected an integer dtype, got torch.float32", (LABELS.float(), 4, 0.5), {}),
        (TypeError, "labels: expected a Tensor, got None", (None, 4, 0.5), {}),
        (ValueError, "number: expected at least 0, got -1", (LABELS, -1, 0.5), {}),
        (TypeError, "number: expected an int, got 2.5", (LABELS, 2.5, 0.5), {}),
        (ValueError, r"positive_fraction: expected in \[0, 1\], got 2", (LABELS, 4, 2), {}),
        (TypeError, "positive_fraction: expected a number, got None", (LABELS, 4, None), {}),
        (TypeError, "generator: expected a torch.Generator, got 5", (LABELS, 4, 0.5), {"generator": 5}),
        (
            ValueError,
            "generator: expected on meta like labels, got cpu",
            (LABELS.to("meta"), 4, 0.5),
            {"generator": torch.Generator()},
        ),
    ],
)
def test_bad_arguments_are_named(error, named, arguments, options):
    with pytest.raises(error, match=f"^{named}"):
        sample_matches(*arguments, **options)
