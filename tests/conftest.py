import os

import pytest
from hypothesis import HealthCheck, settings

from backends import BACKENDS, get

# The same examples on every run, and no judgement of a slow machine. `backend` may be set up once
# for all examples of a test: it holds no state.
_COMMON = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("default", max_examples=50, **_COMMON)
settings.register_profile("ci", max_examples=50, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    """Each backend of the table in turn; skips, with the reason, what is not here."""
    chosen = get(request.param.name)
    with chosen.flags():
        yield chosen


def pytest_terminal_summary(terminalreporter):
    """Say once for each backend whether it ran, not once for each test."""
    terminalreporter.section("backends")
    for one in BACKENDS:
        terminalreporter.line(f"{one.name}: {one.skip_reason() or 'tested'}")
