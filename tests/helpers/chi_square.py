"""How far counts are from what was expected of them."""

import math


def chi_square(counts, expected):
    """The statistic in standard deviations above its mean; cells that expect nothing must be empty."""
    counts, expected = counts.double(), expected.double()
    assert (counts[expected == 0] == 0).all()
    cells = expected > 0
    freedom = int(cells.sum()) - 1
    statistic = ((counts - expected)[cells].square() / expected[cells]).sum()
    return float((statistic - freedom) / math.sqrt(2 * max(1, freedom)))
