"""Random cases of every operator against an oracle or torchvision, by Hypothesis; skipped where it is missing."""

import pytest

from benchmarks.harness.operators import operators
from fastmask.kernels._runtime import INTERPRETED

# Not an import statement: a machine with a GPU may have no Hypothesis.
hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# Lanes outside a tile hold boxes without area; the interpreter divides in NumPy, which warns of 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# The interpreter takes about 40 ms for each program of a kernel: fewer examples, and no shrinking.
hypothesis.settings.register_profile(
    "reference",
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.register_profile(
    "interpreted",
    hypothesis.settings.get_profile("reference"),
    max_examples=24,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("interpreted" if INTERPRETED else "reference")


class HypothesisDraw:
    """The protocol `benchmarks.harness.operators.Draw`, by Hypothesis."""

    def __init__(self, data):
        self.data = data

    def integer(self, low, high):
        return self.data.draw(st.integers(low, high))

    def number(self, low, high):
        return self.data.draw(st.floats(low, high))

    def choice(self, options):
        return self.data.draw(st.sampled_from(options))


@pytest.mark.parametrize("name", operators())
@hypothesis.given(data=st.data())
def test_random_cases_agree_with_an_oracle(name, device, data):
    operators()[name].check_random(HypothesisDraw(data), device)
