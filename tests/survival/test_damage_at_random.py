"""A few trials of `damage.py`, which runs any number of them."""

import pytest

from tests.survival import damage


@pytest.mark.parametrize(("content_alone", "trials"), [(False, 40), (True, 25)])
def test_damage_at_random_is_found_or_harmless(content_alone, trials):
    counts = damage.run(trials, seed=1, content_alone=content_alone)
    results = {result for _, _, result in counts}
    assert "found" in results and results <= {"found", "harmless"}, counts
    assert content_alone or results == {"found"}  # no flipped bit passes the sums of the files
