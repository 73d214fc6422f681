"""Compute the objective, of Group Self-Play Preference Optimization or another algorithm, from log-probs and rewards.

Pure functions; they know neither models nor ranks.

Notation: l_it = log pi_T(y_it | x, y_i<t), each token's log-probability at the sampling temperature, [G, N, L];
a_it its frozen anchor; D_ij = 1 where r_i - r_j > margin. Two responses i and j are alike up to the token t_ij at which
they part, the fork. The tokens they share say nothing about which is better. The implicit reward of i against j is

    s_ij = beta / n_i * sum_{t >= t_ij} w_t (l_it - a_it),   w = 1 at the fork, `after_fork` behind it,

and the loss depends only on the gap s_ij - s_ji. With `after_fork` 1 it is DPO's gap, of whole responses.
All normalisers are counted over the whole mini-batch before it is cut into micro-batches or ranks (`Counts`), so the
parts add up to the same loss however it is cut.

To add an algorithm: write one pure function of the signature `Loss` and one line of `ALGORITHMS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo import config
from gspo.algorithm.gaps import Counts, gaps, prefix_values, whole_gaps
from gspo.errors import UserError
from gspo.kernels.ops import PairSettings, PairwiseLoss, pairwise_loss
from gspo.kernels.pair_settings import PARTS
from gspo.types import Groups


def pair_weights(groups: Groups, kind: str) -> Tensor | None:
    """Return w_ij [G, N, N], what each pair counts for in the preference loss; None: 1.

    `branch`: V_i - V_j behind their fork, the mean reward of those that went the way of i there, less that of those
    that went the way of j. Where j's way is the better one on average, i's victory says nothing for its token at the
    fork: such a pair counts 0.
    """
    if kind == "one":
        return None
    if kind == "gap":
        return groups.rewards[:, :, None] - groups.rewards[:, None, :]
    values = prefix_values(groups)
    branch = values.gather(-1, (groups.forks + 1).clamp_max(values.shape[-1] - 1))  # of i where it leaves j
    return (branch - branch.mT).clamp_min(0)


def pair_normalizer(beats: Tensor, kind: str, pairs_per_group: float) -> Tensor:
    """Return Z_g [G], what a group's pair losses are divided by. Never zero."""
    n = beats.shape[-1]
    own = beats.sum((1, 2)).double().clamp_min(1.0)
    constant = torch.full_like(own, max(n * (n - 1) / 2, 1.0))
    return {
        "constant": constant,
        "batch": torch.full_like(own, max(pairs_per_group, 1e-12)),
        "group": own,
        "sqrt": (constant * own).sqrt(),
    }[kind]


def preference_loss(gap: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> Tensor:
    """Return the mean of -log sigma(gap) over all pairs (DPO, eq. 7), gap [G, N, N].

    L_p = (1/B) sum_g (1/Z_g) sum_ij w_ij D_ij softplus(s_ji - s_ij).
    """
    losses, weights = groups.beats * F.softplus(-gap), pair_weights(groups, cfg.pair_weight)
    if weights is not None:
        losses = losses * weights.to(gap)
    z = pair_normalizer(groups.beats, cfg.normalizer, counts.pairs_per_group).to(gap)
    return (losses.sum((1, 2)) / z).sum() / counts.groups


def ranking_loss(gap: Tensor, groups: Groups, counts: Counts) -> Tensor:
    """Return the negative log of a margin-gated Plackett-Luce likelihood, safe with ties, gap [G, N, N].

    L_r = (1/B) sum_g (1/|I|) sum_{i in I} logsumexp(0, {s_ji - s_ij : D_ij = 1}), I = those that beat another.
    """
    winners = groups.beats.any(-1).sum(-1).clamp_min(1)
    return (ranking_terms(gap, groups.beats).sum(-1) / winners).sum() / counts.groups


def ranking_terms(gap: Tensor, beats: Tensor) -> Tensor:
    """Return each response's part of the ranking loss, gap and beats [G, N, N] -> [G, N]; 0 for one that beats none."""
    behind = (-gap).masked_fill(~beats, -torch.inf)
    return torch.cat([torch.zeros_like(gap[..., :1]), behind], -1).logsumexp(-1)


def relative_ranking_terms(gap: Tensor, beats: Tensor) -> Tensor:
    """Return `ranking_terms` of the W winners as shares of their value at gaps of 0, log(1 + responses beaten): [W].

    That is 1 for a policy equal to its anchor, however many pairs there are, and below 1 where winners lead.
    """
    winners = beats.any(-1)
    return ranking_terms(gap, beats)[winners] / beats.sum(-1)[winners].to(gap).log1p()


def winner_nll(logprobs: Tensor, groups: Groups, counts: Counts) -> Tensor:
    """Return the mean negative log-likelihood per token of the responses that beat another; it counters likelihood
    displacement."""
    wins = groups.beats.any(-1).to(logprobs)
    per_token = -logprobs.sum(-1) / groups.lengths.clamp_min(1)
    return ((wins * per_token).sum(-1) / wins.sum(-1).clamp_min(1)).sum() / counts.groups


def gspo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """Return GSPO's weighted terms {name: scalar}, whose sum is minimised; logprobs [G, N, L]."""
    gap = gaps(logprobs, groups, cfg)
    terms = {"preference": preference_loss(gap, groups, cfg, counts)}
    if cfg.use_ranking_loss:
        terms["ranking"] = cfg.ranking_coef * ranking_loss(gap, groups, counts)
    if cfg.nll_coef:
        terms["nll"] = cfg.nll_coef * winner_nll(logprobs, groups, counts)
    return terms


def policy_gradient(logprobs: Tensor, advantages: Tensor, counts: Counts) -> dict[str, Tensor]:
    """Return REINFORCE's surrogate -(1/(B N)) sum_git A_it l_it: linear in l, so c_it = -A_it / (B N).

    Advantages [G, N] of responses, or [G, N, L] of tokens.
    """
    per_token = advantages if advantages.ndim == 3 else advantages[..., None]
    return {"policy": -(per_token.to(logprobs) * logprobs).sum() / (counts.groups * logprobs.shape[1])}


def rloo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """RLOO: A_i = r_i - mean of the others' rewards (leave-one-out; arXiv 2402.14740, section 3.3).

    That is N / (N - 1) times the advantage of `dr_grpo`, from which it differs by this constant alone.
    """
    r, n = groups.rewards.to(logprobs), logprobs.shape[1]
    others = (r.sum(1, keepdim=True) - r) / (n - 1)
    return policy_gradient(logprobs, r - others, counts)


def grpo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """GRPO: A_i = (r_i - mean) / std, mean over the tokens of the response: 1 / |y_i| (arXiv 2402.03300, eq. 3)."""
    r = groups.rewards.to(logprobs)
    advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-4)
    return policy_gradient(logprobs, advantages / groups.lengths.clamp_min(1), counts)


def dr_grpo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """Dr. GRPO, GRPO without its two biases: A_i = r_i - mean, summed over tokens (arXiv 2503.20783, section 3.2).

    The paper's constant 1 / max_tokens belongs to the learning rate. (N - 1) / N times `rloo`, the same method.
    """
    r = groups.rewards.to(logprobs)
    return policy_gradient(logprobs, r - r.mean(1, keepdim=True), counts)


def maxrl(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """MaxRL: A_i = (r_i - mean) / mean, 0 where the mean is 0 (arXiv 2602.02710).

    With K right responses of N these are N / K - 1 and -1, and the gradient's expectation is that of the first N - 1
    terms of log p = -sum_k (1 - p)^k / k, p the chance of a right response: hard prompts weigh more than in `dr_grpo`.
    UserError for a negative reward: the mean is no chance then.
    """
    r = groups.rewards.to(logprobs)
    if bool((r < 0).any()):
        raise UserError(
            f"objective.algorithm = maxrl divides by the mean reward of a group, and a reward is {float(r.min()):g}. "
            "Return no negative ones (0 for wrong, 1 for right), or choose an algorithm that takes any, such as rloo."
        )
    mean = r.mean(1, keepdim=True)
    return policy_gradient(logprobs, (r - mean) / torch.where(mean > 0, mean, 1.0), counts)


def tempo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """TEMPO: A_it = (r_i - mean + V_i(t + 1) - V_i(t)) / std, V the `prefix_values`, mean over the tokens of the
    response (arXiv 2509.18314).

    It is `grpo` plus the change of value at each fork; these changes add up to r_i - mean along a response.
    """
    r, changes = groups.rewards.to(logprobs), prefix_values(groups).diff(dim=-1).to(logprobs)
    scale = (r.std(1, keepdim=True, correction=0) + 1e-4) * groups.lengths.clamp_min(1)
    advantages = (r - r.mean(1, keepdim=True))[..., None] + changes
    return policy_gradient(logprobs, advantages / scale[..., None], counts)


def ppo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """PPO (arXiv 1707.06347): the advantages of tokens are a critic's, by GAE (critic.py)."""
    return policy_gradient(logprobs, groups.advantages, counts)


def online_dpo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """Online DPO: -log sigma(s_best - s_worst) of whole responses, one pair a group, none within the margin
    (arXiv 2402.04792)."""
    losses = F.softplus(-whole_gaps(logprobs, groups, cfg)[best_and_worst(groups)])
    return {"preference": losses.sum() / counts.groups}


def all_pairs(groups: Groups) -> Tensor:
    """Return every pair, [G, N, N] bool."""
    return groups.beats


def best_and_worst(groups: Groups) -> Tensor:
    """Return each group's pair of its best and its worst response, where it has a pair: [G, N, N] bool."""
    # The first among equals; argmax promises no order.
    best, worst = (groups.rewards.sort(dim=1, descending=d, stable=True).indices[:, 0] for d in (True, False))
    pairs = torch.zeros_like(groups.beats)
    pairs[torch.arange(len(pairs), device=pairs.device), best, worst] = groups.beats.any((1, 2))
    return pairs


def gold_pairs(groups: Groups) -> Tensor:
    """Return the pairs of the gold solution, the last of its group, and each sample: [G, N, N] bool."""
    pairs = torch.zeros_like(groups.beats)
    pairs[:, -1:, :-1] = True
    return pairs


def spin(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """SPIN: -log sigma(s_gold - s_i) over the group's samples i; the gold solution is last (arXiv 2401.01335,
    eq. 4.7). Unlike in the paper, the samples are the current policy's, not the opponent's."""
    gap = whole_gaps(logprobs, groups, cfg)
    return {"preference": F.softplus(-gap[:, -1, :-1]).mean(1).sum() / counts.groups}


def dpo(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> dict[str, Tensor]:
    """DPO, IPO or SimPO (`dpo_loss`), the mean over a group's pairs, of which a row of chosen and rejected has one.

    sigmoid: -(1 - e) log sigma(g) - e log sigma(-g), g the `dpo_gaps`, e the label smoothing (DPO, arXiv 2305.18290,
    eq. 7); simpo: the same of g less `simpo_gamma` (arXiv 2405.14734, eq. 6); ipo: (g / beta - 1 / (2 beta))^2 (arXiv
    2310.12036, eq. 17).
    """
    gap, beta, smooth = dpo_gaps(logprobs, groups, cfg), cfg.preference_beta, cfg.label_smoothing
    if cfg.dpo_loss == "ipo":
        losses = (gap / beta - 1 / (2 * beta)).square()
    else:
        lead = gap - cfg.simpo_gamma if cfg.dpo_loss == "simpo" else gap
        losses = (1 - smooth) * F.softplus(-lead) + smooth * F.softplus(lead)
    pairs = groups.beats.sum((1, 2)).clamp_min(1)
    return {"preference": ((groups.beats * losses).sum((1, 2)) / pairs).sum() / counts.groups}


def dpo_gaps(logprobs: Tensor, groups: Groups, cfg: config.Objective) -> Tensor:
    """Return the gaps of whole responses [G, N, N]; for SimPO of mean log-probs, with nothing subtracted."""
    if cfg.dpo_loss == "simpo":
        groups, cfg = replace(groups, anchors=torch.zeros_like(groups.anchors)), replace(cfg, length_norm="mean")
    return whole_gaps(logprobs, groups, cfg)


def gspo_on_cuda(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> "Evaluation":
    """`gspo` with its coefficients in closed form: one kernel, in the log-probs' dtype."""
    found = gspo_in_closed_form(logprobs, groups, cfg, counts)
    used = {"preference": True, "ranking": cfg.use_ranking_loss, "nll": bool(cfg.nll_coef)}
    terms = dict(zip(PARTS, found.parts.sum(0), strict=True))
    return Evaluation({name: terms[name] for name, on in used.items() if on}, found.coefficients)


def gspo_in_closed_form(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> PairwiseLoss:
    """Run the pairwise kernel, or its plain PyTorch equivalent, on these groups."""
    settings = PairSettings(
        beta=cfg.preference_beta,
        groups=counts.groups,
        pairs_per_group=counts.pairs_per_group,
        after_fork=cfg.after_fork,
        length_norm=cfg.length_norm,
        normalizer=cfg.normalizer,
        ranking_coef=cfg.ranking_coef if cfg.use_ranking_loss else 0.0,
        nll_coef=cfg.nll_coef,
    )
    weights = pair_weights(groups, cfg.pair_weight)
    return pairwise_loss(logprobs, groups.anchors, groups.beats, weights, groups.forks, groups.lengths, settings)


Loss = Callable[[Tensor, Groups, config.Objective, Counts], dict[str, Tensor]]


class Evaluation(NamedTuple):
    """The objective at the policy's log-probs."""

    terms: dict[str, Tensor]  # the weighted terms, scalars whose sum is the loss
    coefficients: Tensor  # [G, N, L], c_it = dL/dl_it: all that the loss tells the network


@dataclass(frozen=True)
class Algorithm:
    """One line of `ALGORITHMS`."""

    loss: Loss
    needs_solutions: bool = False  # each group ends in its row's gold solution, preferred to all others
    needs_critic: bool = False  # advantages of tokens are a critic's
    from_rows: bool = False  # learns from stored responses, unless rollout.source says otherwise
    uses_margin: bool = True  # learns from rewards further apart than objective.margin; false: from any difference
    on_cuda: Callable[[Tensor, Groups, config.Objective, Counts], Evaluation] | None = None  # the same, by a kernel
    # What the curves of pairs are about: [G, N, N] gaps of implicit rewards, and bool which of them are pairs.
    gaps: Callable[[Tensor, Groups, config.Objective], Tensor] = gaps
    pairs: Callable[[Groups], Tensor] = all_pairs


ALGORITHMS = {
    "gspo": Algorithm(gspo, on_cuda=gspo_on_cuda),
    "rloo": Algorithm(rloo, uses_margin=False),
    "grpo": Algorithm(grpo, uses_margin=False),
    "dr_grpo": Algorithm(dr_grpo, uses_margin=False),
    "maxrl": Algorithm(maxrl, uses_margin=False),
    "tempo": Algorithm(tempo, uses_margin=False),
    "ppo": Algorithm(ppo, needs_critic=True, uses_margin=False),
    "online_dpo": Algorithm(online_dpo, gaps=whole_gaps, pairs=best_and_worst),
    "dpo": Algorithm(dpo, from_rows=True, gaps=dpo_gaps),
    "spin": Algorithm(spin, needs_solutions=True, gaps=whole_gaps, pairs=gold_pairs),
}


def find_algorithm(name: str) -> Algorithm:
    """Return the line of the table for `objective.algorithm`; UserError where there is none."""
    if name not in ALGORITHMS:
        raise UserError(
            f"objective.algorithm = {name!r} is not one of {', '.join(ALGORITHMS)}. To add one, write its function and "
            "its line of ALGORITHMS in gspo/algorithm/objective.py."
        )
    return ALGORITHMS[name]


def learns_from_rows(cfg: config.Config) -> bool:
    """Return whether the responses to learn from are stored in the training rows, and not sampled by the policy."""
    source = cfg.rollout.source
    return find_algorithm(cfg.objective.algorithm).from_rows if source == "auto" else source == "rows"


def as_trained(cfg: config.Config) -> config.Config:
    """Return the configuration as the models and the update take it: for stored responses at temperature 1, as they
    were not sampled at any, and without a KL term, which is an expectation over samples of the policy; nor with one
    where the KL is part of the reward (`kl_in`)."""
    if cfg.objective.kl_in == "reward":
        return replace(cfg, objective=replace(cfg.objective, kl_coef=0.0))
    if not learns_from_rows(cfg):
        return cfg
    rollout, objective = replace(cfg.rollout, temperature=1.0), replace(cfg.objective, kl_coef=0.0)
    return replace(cfg, rollout=rollout, objective=objective)


def evaluate(logprobs: Tensor, groups: Groups, cfg: config.Objective, counts: Counts) -> Evaluation:
    """Evaluate the objective and its derivative at log-probs [G, N, L]: by the algorithm's kernel on CUDA, where it has
    one, else by autograd in float64. A token's derivative counts as `groups.weights` says."""
    algorithm = find_algorithm(cfg.algorithm)
    if logprobs.is_cuda and algorithm.on_cuda:
        found = algorithm.on_cuda(logprobs, groups, cfg, counts)
        return found._replace(coefficients=found.coefficients * groups.weights.to(found.coefficients))
    leaf = logprobs.detach().double().requires_grad_()
    with torch.enable_grad():
        terms = algorithm.loss(leaf, groups, cfg, counts)
        slope = torch.autograd.grad(sum(terms.values()), leaf)[0]
    weighted = (slope * groups.weights.to(slope)).to(logprobs)
    return Evaluation({name: term.detach() for name, term in terms.items()}, weighted)


def anything_to_learn(coefficients: Tensor) -> bool:
    """Whether the objective prefers any response of these groups to another; [G, N, L]."""
    return bool(coefficients.any())


def kl_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, n: int, counts: Counts) -> Tensor:
    """Return k2 per token, (1/(B N)) sum_i sum_t 0.5 d^2, d = log pi - log pi_ref; its gradient is the reverse KL's.

    logprobs, reference, mask of one shape; source: joschu.net/blog/kl-approx.html, arXiv 2506.09477 on k2 in the loss.
    """
    d = torch.where(mask, logprobs - reference, 0.0)
    return 0.5 * d.square().sum() / (counts.groups * n)


def frozen_loss(logprobs: Tensor, old: Tensor, coefs: Tensor, weights: Tensor, cfg: config.Objective) -> Tensor:
    """Return PPO's clipped loss, -sum_t w_t min(rho_t A, clip(rho_t, 1 - low, 1 + high) A), with A = -c, c frozen.

    rho_t = pi / pi_old. All of one shape, one element a token; A is 0 in a padding.
    At rho = 1 and w = 1 its gradient is exactly sum_it c_it grad l_it. Source: PPO, arXiv 1707.06347, eq. 7.
    """
    advantage = -coefs
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    return -(gain * weights).sum()


def is_clipped(logprobs: Tensor, old: Tensor, coefs: Tensor, cfg: config.Objective) -> Tensor:
    """Return at which tokens `frozen_loss` is flat: the ratio has left the clip's range the way it should go; bool."""
    drift = (logprobs - old).exp() - 1
    return ((coefs < 0) & (drift > cfg.clip_high)) | ((coefs > 0) & (drift < -cfg.clip_low))


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return the k3 estimate of KL(pi || pi_ref) per token, exp(-d) - 1 + d >= 0. The metric, not the loss.

    Its mean over tokens of pi is the KL. Over tokens of pi truncated to a share z of its probability, it is at most
    KL / z, and nothing of what moved among the tokens cut off.
    """
    d = logprobs - reference
    return torch.exp(-d) - 1 + d


def pair_accuracy(gap: Tensor, beats: Tensor) -> float:
    """Count the pairs that the gaps [G, N, N] of implicit rewards order as the rewards do; an exact tie is one half."""
    return float((beats * ((gap > 0).double() + 0.5 * (gap == 0).double())).sum())
