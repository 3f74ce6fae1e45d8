"""Random shapes: each operator against torchvision or the oracle of its test file. Skipped without Hypothesis."""

import pytest
import torch
import torchvision
from test_nms import assert_same, padded_oracle
from test_paste_masks import ORACLES, assert_probabilities
from test_paste_masks import draw as draw_masks
from test_roi_align import draw_pyramid
from test_roi_pool import assert_like_torchvision
from test_roi_pool import draw as draw_features

from fastmask import roi_align
from fastmask.kernels import nms
from fastmask.kernels._runtime import INTERPRETED
from fastmask.kernels.paste_masks import CONVENTIONS, paste_masks

# Not an import statement: a machine with a GPU may have no Hypothesis.
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# The interpreter takes some 40 ms for each program of a kernel: fewer examples, and none to find a smaller one.
hypothesis.settings.register_profile("reference", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "interpreted",
    hypothesis.settings.get_profile("reference"),
    max_examples=6,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("interpreted" if INTERPRETED else "reference")


# Lanes outside a tile hold boxes without area; the interpreter divides in NumPy, which warns of 0 / 0.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    batch=st.integers(1, 3),
    n=st.integers(1, 140),
    max_output=st.integers(0, 50),
    threshold=st.floats(0, 1),
    few=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nms_padded_is_greedy(batch, n, max_output, threshold, few, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(-6, 6, (batch, n, 2), generator=g)  # coarse, so that IoUs and areas repeat
    boxes = torch.cat([corner, corner + torch.randint(-1, 8, (batch, n, 2), generator=g)], 2).float()
    scores = torch.randint(0, 20, (batch, n), generator=g) / 10
    classes = torch.randint(0, 3, (batch, n), generator=g)
    counts = torch.randint(0, n + 2, (batch,), generator=g)
    options = {"classes": classes, "counts": counts, "score_threshold": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "FEW", 50 if few else -1)
        patch.setattr(nms, "CHUNK", 64)
        actual = nms.nms_padded(boxes, scores, threshold, max_output, **options)
    assert_same(actual, padded_oracle(boxes, scores, threshold, max_output, **options))


@pytest.mark.parametrize("convention", CONVENTIONS)
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    n=st.integers(0, 3),
    m=st.integers(1, 30),
    height=st.integers(1, 30),
    width=st.integers(1, 50),
    seed=st.integers(0, 10**6),
)
def test_paste_masks_matches_the_oracle(convention, n, m, height, width, seed):
    masks, boxes = draw_masks(max(n, 1), m, height, width, seed)
    masks, boxes = masks[:n], boxes[:n]
    exact = ORACLES[convention](masks, boxes, height, width)
    assert_probabilities(paste_masks(masks, boxes, (height, width), None, convention=convention), exact, m)


@hypothesis.given(data=st.data())
def test_roi_align_is_torchvisions(data):
    n, c, h, w, k, ph, pw, ratio = (
        data.draw(st.integers(low, high))
        for low, high in ((1, 2), (1, 20), (1, 9), (1, 9), (0, 3), (1, 3), (1, 3), (-1, 3))
    )
    aligned, scale = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 0.5, 0.3]))
    coordinate = st.floats(-20, 40, width=32)
    boxes = [[data.draw(st.integers(0, n - 1)), *data.draw(st.tuples(*[coordinate] * 4))] for _ in range(k)]
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 5)
    if aligned and ratio <= 0:  # of an inverted box torchvision would want a negative number of samples, and throw
        boxes = torch.cat([boxes[:, :1], boxes[:, 1:].view(-1, 2, 2).sort(1).values.flatten(1)], 1)
    (feature,) = draw_pyramid([(h, w)], images=n, channels=c)
    theirs = torchvision.ops.roi_align(feature, boxes, (ph, pw), scale, ratio, aligned)
    torch.testing.assert_close(roi_align(feature, boxes, (ph, pw), scale, ratio, aligned), theirs, rtol=1e-5, atol=1e-5)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 5, 9, 9))),
    count=st.integers(0, 4),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scale=st.floats(0.05, 4),
    seed=st.integers(0, 1 << 30),
)
def test_roi_pool_is_torchvisions(device, shape, count, size, scale, seed):
    features, boxes = draw_features(*shape, boxes=count, seed=seed)
    features = (features * 2).round()  # ties
    boxes[:, 1:] /= scale
    assert_like_torchvision(device, features, boxes, size, scale)
