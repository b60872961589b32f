import os

import pytest
from hypothesis import HealthCheck, settings

from backends import BACKENDS, get

# SPECTRAL_PROFILE=thorough runs the slow tests too, and more examples of each property.
PROFILE = os.environ.get("SPECTRAL_PROFILE", "default")

# The same examples on every run, and no judgement of a slow machine. `backend` may be set up once
# for all examples of a test: it holds no state.
_COMMON = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("default", max_examples=20, **_COMMON)
settings.register_profile("thorough", max_examples=100, **_COMMON)
settings.load_profile(PROFILE)  # an error for a profile that does not exist


def pytest_report_header():
    """Show the profile, which decides what is skipped."""
    return f"profile: {PROFILE} (SPECTRAL_PROFILE=default or thorough)"


def pytest_collection_modifyitems(items):
    """Skip slow tests, unless the profile is the thorough one."""
    if PROFILE == "thorough":
        return
    skip = pytest.mark.skip(reason="slow: runs with SPECTRAL_PROFILE=thorough")
    for item in items:
        if any(_names(mark, item) for mark in item.iter_markers("thorough")):
            item.add_marker(skip)


def _names(mark, item):
    """Return whether the mark holds for this item: always, or on the backends that it names."""
    backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    return not mark.args or str(backend) in mark.args


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
