"""Classes of modules are replaced and restored."""

import copy
import pickle

import torch
from torch import nn

from fastmask.integrations._swap import ClassSwap


class Double(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class CustomLinear(nn.Linear):
    pass


SWAP = ClassSwap({nn.Linear: Double})


def classes(model):
    return [type(module) for module in model.modules()]


def test_exact_classes_are_replaced_and_restored():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), CustomLinear(3, 3)))
    before, state, x = classes(model), copy.deepcopy(model.state_dict()), torch.rand(2, 3)
    first = model[0](x)
    SWAP.apply(model)
    SWAP.apply(model)
    assert classes(model) == [Double if cls is nn.Linear else cls for cls in before]
    assert torch.equal(model[0](x), 2 * first)
    SWAP.restore(model)
    assert classes(model) == before
    assert torch.equal(model[0](x), first)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_model_itself_and_copies_are_restored():
    model = nn.Linear(3, 3)
    SWAP.apply(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert type(copied) is Double
        SWAP.restore(copied)
        assert type(copied) is nn.Linear
