import pytest

import spectral_core as sc
from spectral_core._select import by_name

NAMES = ["encoder.in", "encoder.out", "head", "block[0]"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"head": 1}, {"head": 1}),
        ({"encoder.*": 1}, {"encoder.in": 1, "encoder.out": 1}),
        ({"encoder.*": 1, "encoder.out": 2}, {"encoder.in": 1, "encoder.out": 2}),
        ({"*.in": 1, "*": 2}, {"encoder.in": 1, "encoder.out": 2, "head": 2, "block[0]": 2}),
        ({"*": 2, "*.in": 1}, dict.fromkeys(NAMES, 2)),
        ({"block[0]": 3}, {"block[0]": 3}),
    ],
    ids=str,
)
def test_own_name_wins_over_the_first_pattern(settings, expected):
    assert by_name(settings, NAMES, "factor") == expected


@pytest.mark.parametrize("pattern", ["heads", "Head", "encoder", "decoder.*"])
def test_pattern_that_matches_nothing_raises(pattern):
    with pytest.raises(
        sc.NamesError, match=r"factor: .*matches none of the names.*'head'"
    ) as error:
        by_name({"head": 1, pattern: 2}, NAMES, "factor")
    assert repr(pattern) in str(error.value)
