"""The committed table of launches, bytes and synchronisations."""

import pytest
import torch

from models.marks import mark
from models.stage_times import OTHER

launches = pytest.importorskip("benchmarks.reporting.launches")

pytestmark = [pytest.mark.reference_only, pytest.mark.unpoisoned]


@pytest.fixture(scope="module")
def inference():
    return launches.count_inference(launches.PRESET)


@pytest.fixture(scope="module")
def training():
    return launches.count_training(launches.PRESET)


def test_inference_synchronises_once_to_copy_its_results(inference):
    assert inference.launches <= 800
    assert inference.stages.pop(OTHER).synchronisations.total() == 1
    assert not inference.synchronisations


def test_a_training_step_does_not_synchronise(training):
    assert not training.synchronisations
    assert training.stages["backward"].launches > 300


def test_the_table_is_the_committed_one():
    assert launches.DOCUMENT.read_text() == launches.document(), f"run `{launches.COMMAND}` and review its diff"


def test_what_synchronises_is_counted_where_it_happens():
    with launches.counting("cuda") as counter:
        x = torch.ones(8, device="cuda")
        with mark("RPN"):
            x.cpu()
            torch.ones(8).to("cuda")
            torch.ones(8).to("cuda", non_blocking=True)
        with mark("heads"), pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            x.sum().item()
    assert counter.stages["RPN"].synchronisations.total() == 2
    assert counter.stages["RPN"].launches == 3
    assert counter.stages["RPN"].bytes == 3 * 32
    assert counter.stages["heads"].launches == 1


def test_operators_are_counted_as_their_kernels():
    with launches.counting("cuda") as counter:
        x = torch.empty(2, 8, 6, 6, device="cuda", dtype=torch.bfloat16)
        counter.reset()
        torch.nn.functional.conv2d(x, torch.empty_like(x), torch.empty(2, device="cuda", dtype=torch.bfloat16))
        x.mT.reshape(2, -1).topk(5)
    assert counter.kernels == {"convolution": 2, "clone": 1, "topk": 3}
