"""Small calls of every variant of the kernels (dtype, layout, sampling, algorithm) against torchvision or an oracle."""

import pytest

from benchmarks.harness.operators import operators

VARIANTS = [(name, variant) for name, operator in operators().items() for variant in operator.variants]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_variant_agrees(name, variant, device):
    operators()[name].variants[variant](device)
