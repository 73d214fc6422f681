"""Groups for the pairwise loss, shared by the CPU's tests, the interpreter's and the GPU's, and how far off one is.

The measure is gspo/algorithm/objective.py in float64. An error may be what the objective itself makes in float32, plus
a little.
"""

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from gspo.algorithm.objective import Counts, Groups, gspo, gspo_in_closed_form
from gspo.algorithm.pairs import forks, preferences
from gspo.config import Objective
from gspo.kernels.pair_settings import PARTS

MARGIN = 4  # between two right ways to round
SLACK = {torch.float64: 1e-11, torch.float32: 4e-7}  # beyond 20, PyTorch makes softplus a straight line
COUNTS = Counts(groups=7, pairs_per_group=4.5)  # of a batch that the groups here are a part of
SETTINGS = [
    Objective(preference_beta=0.3, length_norm=norm, pair_weight=w, normalizer=z, use_ranking_loss=rank, nll_coef=nll)
    for norm, w, z, rank, nll in product(
        ("sum", "mean"), ("one", "branch"), ("constant", "batch", "group", "sqrt"), (True, False), (0.0, 0.5)
    )
]
EVERYTHING = Objective(
    pair_weight="gap", length_norm="mean", normalizer="sqrt", nll_coef=0.5, preference_beta=2.0, after_fork=0.3
)


class Case(NamedTuple):
    n: int
    width: int
    cfg: Objective
    draws: int = 1
    sure: bool = False  # one group whose every pair is in order by a wide gap: losses of 1e-6

    def name(self) -> str:
        c = self.cfg
        said = [f"{self.n}x{self.width}", c.length_norm, c.pair_weight, c.normalizer]
        said += [f"after {c.after_fork}", f"beta {c.preference_beta}"]
        return " ".join(said + ["sure"] * self.sure + ["ranking"] * c.use_ranking_loss + ["nll"] * bool(c.nll_coef))


def cases() -> list[Case]:
    """Every setting on a small group, with what is behind the fork at 0, 1 and between; each size of group, several
    times where it is a few numbers; gaps of hundreds."""
    small = [Case(3, 7, replace(cfg, after_fork=(0.0, 0.3, 1.0)[k % 3])) for k, cfg in enumerate(SETTINGS)]
    sizes = [(2, 1), (2, 65), (3, 130), (8, 67), (12, 21), (33, 9), (64, 5)]
    large = [Case(n, width, cfg, 1 + 12 // n) for n, width in sizes for cfg in (Objective(), EVERYTHING)]
    steep = [Case(8, 30, replace(cfg, preference_beta=60.0)) for cfg in (Objective(), EVERYTHING)]
    return small + large + steep + [Case(8, 30, Objective(after_fork=0.3), 6, sure=True)]


def draw(case: Case, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Groups]:
    """Four groups in float32: one without a pair; one whose second response is the first again; one at its anchors,
    where every gap is a tie; one as it comes. Behind a response's end there are numbers, too."""
    g = torch.Generator().manual_seed(seed)
    n, width = case.n, case.width
    tokens = torch.randint(3, (4, n, width), generator=g)
    lengths = torch.randint(width + 1, (4, n), generator=g)
    logprobs = -3 * torch.rand(4, n, width, generator=g)
    anchors = logprobs + torch.randn(4, n, width + 2, generator=g)[..., :width]  # a slice
    rewards = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64)[torch.randint(4, (4, n), generator=g)]
    rewards[0] = 0.5
    for x in (tokens, lengths, logprobs, anchors):
        x[1, 1] = x[1, 0]
    rewards[1, :2] = torch.tensor([1.0, 0.0])  # a reward function of moods
    anchors[2] = logprobs[2]
    rewards[2, :2] = torch.tensor([0.0, 1.0])
    groups = Groups(anchors, rewards, preferences(rewards, case.cfg.margin), forks(tokens, lengths), lengths)
    if case.sure:
        logprobs = anchors + 40 * rewards[..., None].float()
    picked = slice(3, 4) if case.sure else slice(None)
    return logprobs[picked].to(device), Groups(
        **{k: v[picked].to(device) for k, v in vars(groups).items() if v is not None}
    )


def by_objective(logprobs: Tensor, groups: Groups, cfg: Objective, counts: Counts = COUNTS) -> dict[str, Tensor]:
    """The coefficients by autograd and the parts of each group, in the dtype of logprobs."""
    leaf = logprobs.clone().requires_grad_()
    coefs = torch.autograd.grad(sum(gspo(leaf, groups, cfg, counts).values()), leaf)[0]
    rows = []
    for g in range(len(logprobs)):
        own = Groups(**{k: v[g : g + 1] for k, v in vars(groups).items() if v is not None})
        terms = gspo(logprobs[g : g + 1], own, cfg, counts)
        rows.append([float(terms.get(name, 0.0)) for name in PARTS])
    return {"coefficients": coefs} | dict(zip(PARTS, torch.tensor(rows, dtype=torch.float64).T, strict=True))


def by_closed_form(logprobs: Tensor, groups: Groups, cfg: Objective, counts: Counts = COUNTS) -> dict[str, Tensor]:
    """The same of `gspo.kernels.ops.pairwise_loss`."""
    found = gspo_in_closed_form(logprobs, groups, cfg, counts)
    assert found.coefficients.dtype == found.parts.dtype == logprobs.dtype
    return {"coefficients": found.coefficients} | dict(zip(PARTS, found.parts.double().cpu().T, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def too_far(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """What is further from the objective in float64 than the objective in `dtype` is, in words; the root mean square
    over the case's draws."""
    errors, allowances = {}, {}
    for seed in range(case.draws):
        logprobs, groups = draw(case, device, seed)
        exact = by_objective(logprobs.double(), groups, case.cfg)
        plain = by_objective(logprobs.to(dtype), groups, case.cfg)
        ours = by_closed_form(logprobs.to(dtype), groups, case.cfg)
        for key, true in exact.items():
            errors[key] = errors.get(key, 0.0) + distance(ours[key], true) ** 2 / case.draws
            allowances[key] = allowances.get(key, 0.0) + distance(plain[key], true) ** 2 / case.draws
    wrong = []
    for key, error in errors.items():
        allowed = MARGIN * allowances[key] ** 0.5 + SLACK[dtype]
        if not error**0.5 <= allowed:
            wrong.append(f"{case.name()} {key}: {error**0.5:.2e} > {allowed:.2e}")
    return wrong
