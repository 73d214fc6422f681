"""Groups that move between ranks: each arrives once, whole, where it was assigned; and training sees no difference."""

import json

import pytest
import torch
from balanced_rows import CASES, rows, scored
from ranks import gradient, launch

from gspo.distributed.world import World
from gspo.packing.balance import balance
from gspo.packing.micro_batches import assign

RANKS = 3


@pytest.fixture(scope="module")
def moved(tmp_path_factory, run_program):
    out = tmp_path_factory.mktemp("balance") / "rows.json"
    launch(run_program, RANKS, "tests/programs/balanced_rows.py", out)
    return json.loads(out.read_text())


def group_sizes(case):
    prompts, lengths, _ = CASES[case]
    return [p + sum(n) for p, n in zip(prompts, lengths, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_every_group_arrives_once_and_whole_where_it_was_assigned(moved, case):
    owners = assign(group_sizes(case), CASES[case][2], RANKS)
    for rank, (places, *_) in enumerate(moved[case]):
        assert places == [p for p, owner in enumerate(owners) if owner == rank], "in the order of the batch"
    everything = range(len(owners))
    alone = rows(everything, *scored(case, list(everything)))
    arrived = {place: row for _, part, *_ in moved[case] for place, row in part}
    assert arrived == alone


@pytest.mark.parametrize("case", CASES)
def test_calls_and_faults_stay_with_the_rank_that_made_them(moved, case):
    for rank, (*_, counters, _) in enumerate(moved[case]):
        places = list(range(len(CASES[case][0])))[rank::RANKS]
        assert counters == [f"from {places}", len(places), 1, 10 * len(places)]


def test_how_even_the_shares_are_by_hand(moved):
    """ragged: 24, 20 + 4, 11 + 5 + 5 + 4 of 73. mini-batches: 19, 18, 4 + 3, then 17, 5, 4 + 3; 73 as well."""
    expected = {"ragged": 25 * 3 / 73, "mini-batches": (19 + 17) * 3 / 73, "one long": 81 * 3 / 93, "one group": 3.0}
    for case, share in expected.items():
        assert [x[-1] for x in moved[case]] == [pytest.approx(share)] * RANKS


def test_one_process_keeps_its_rows_as_they_are():
    places, (rollout, scores) = [0, 1, 2], scored("ragged", [0, 1, 2])
    mine = balance(places, rollout, scores, 2, World(0, 1, torch.device("cpu"), None))
    assert mine[0] is places and mine[1] is rollout and mine[2] is scores and mine[3] == 1.0


@pytest.mark.slow
def test_three_ranks_with_mini_batches_differentiate_as_one(run_program, tmp_path):
    """7 prompts in 3 mini-batches; a rank is idle in the last. Its gradients, to 1e-5 of their largest entry."""
    overrides = ("optim.minibatches=3", "optim.epochs_per_rollout=1")
    one, samples = gradient(run_program, tmp_path, 1, *overrides)
    three, same = gradient(run_program, tmp_path, 3, *overrides)
    assert same == samples
    for name in one:
        scale = one[name].abs().max()
        assert scale > 0 and (one[name] - three[name]).abs().max() <= 1e-5 * scale, name
