"""Define the records that pass between the stages of a step, and the words for them.

group        a prompt and its N responses
response     what the policy samples for a prompt, or a row's gold solution (`Rollout.sampled` tells them apart)
fork         the token at which two responses of a group first differ
trunk        in a group that is a tree, a response sampled as a whole; a branch of it copies the tokens before its
             place and is sampled from there. Both are leaves: the group's N responses
pair         two responses of which one beats the other: its reward is larger by more than the margin
anchor       log-probs subtracted from the policy's in the objective: the opponent's, the initial model's, or none
opponent     the policy as it was when the self-play round began
reference    the model that the KL term is measured to: the opponent or the initial model
place        a group's index in the global batch, over all ranks
slot         holds a response while it is decoded (gspo/rollout/slots.py)
page         a block of the KV cache: keys and values of some tokens (gspo/rollout/kv_pages.py)
pack         responses behind one prompt in one sequence, so that the prompt is computed once (gspo/packing/)
micro-batch  rows of one forward and backward on a rank; mini-batch: groups of one optimizer step, over all ranks

Shapes: G groups (prompts) of N responses, L the longest response, R = G * N rows. A worked example:
2 prompts with N = 4 and at most 16 new tokens give `tokens [2, 4, 16]`, `lengths [2, 4]`, `rewards [2, 4]`
and `beats [2, 4, 4]`, where `beats[g, i, j]` says that response i is preferred to response j.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredResponses:
    """The N responses that a row of data holds for its prompt."""

    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    finished: tuple[bool, ...]  # ended by itself (not cut off)


@dataclass(frozen=True)
class Prompt:
    """A row of data, ready for the model."""

    id: int  # row number in its data set; keys the randomness of its samples
    ids: tuple[int, ...]  # token ids, chat template applied
    text: str  # what the user asked, for tables
    ground_truth: Any  # a text, numbers included; for a reward function of the user's, whatever the row holds; None:
    # unknown, as a row that holds responses needs none
    data_source: str
    extra_info: dict[str, Any] = field(default_factory=dict)
    stored: StoredResponses | None = None  # where responses are read from the rows


def finish_reasons(finished: Tensor) -> list[str]:
    """Return why responses ended, from `finished` [N]: by an end token or a stop string, or at their limit."""
    return ["stop" if ended else "length" for ended in finished.tolist()]


@dataclass(frozen=True)
class Rollout:
    """N responses to each of G prompts."""

    prompts: list[Prompt]  # G
    tokens: Tensor  # [G, N, L] int64, right-padded
    lengths: Tensor  # [G, N] int64, tokens of the response, end-of-sequence included
    logprobs: Tensor  # [G, N, L] float32, the sampler's, at the sampling temperature; 0 in the padding
    entropy: Tensor  # [G, N, L] float32, nats, of softmax(logits / T) before top_p, top_k, min_p; 0 in the padding
    finished: Tensor  # [G, N] bool, ended by itself (not cut off at max_new_tokens)
    texts: list[list[str]]  # G x N
    sampled: Tensor | None = None  # [G, N] bool, sampled by the policy, not a gold solution; by default all are
    copied: Tensor | None = None  # [G, N] int64, tokens that a branch has from its trunk; all, where it found no place
    prefilled: Tensor | None = None  # [G] int64, tokens that the sampler computed as prompts; by default the prompt's

    def __post_init__(self) -> None:
        if self.sampled is None:
            object.__setattr__(self, "sampled", torch.ones_like(self.lengths, dtype=torch.bool))
        if self.copied is None:
            object.__setattr__(self, "copied", torch.zeros_like(self.lengths))
        if self.prefilled is None:
            sizes = torch.tensor([len(p.ids) for p in self.prompts], dtype=torch.long, device=self.lengths.device)
            object.__setattr__(self, "prefilled", sizes)

    @property
    def mask(self) -> Tensor:
        """[G, N, L] bool, true on real tokens."""
        return torch.arange(self.tokens.shape[2], device=self.lengths.device) < self.lengths[..., None]

    @property
    def sampled_mask(self) -> Tensor:
        """[G, N, L] bool, true on the real tokens of sampled responses: those the KL term and the metrics are about."""
        return self.mask & self.sampled[..., None]

    @property
    def samples_per_group(self) -> int:
        """Sampled responses of a group, the same number in every group; N where there is no group."""
        return int(self.sampled[0].sum()) if self.prompts else self.sampled.shape[1]

    @property
    def finish_reasons(self) -> list[list[str]]:
        """G x N: `stop`, by an end token or a stop string, or `length`."""
        return [finish_reasons(group) for group in self.finished]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together."""
        widest = self.lengths.amax(1).tolist()
        return max((len(prompt.ids) + n for prompt, n in zip(self.prompts, widest, strict=True)), default=0)

    def select(self, groups: list[int]) -> "Rollout":
        """Return some of the groups, no wider than they need."""
        lengths = self.lengths[groups]
        width = int(lengths.max()) if groups else 0
        tokens, logprobs, entropy = (x[groups, :, :width] for x in (self.tokens, self.logprobs, self.entropy))
        fixed = (x[groups] for x in (self.sampled, self.copied, self.prefilled))
        prompts, texts = [self.prompts[g] for g in groups], [self.texts[g] for g in groups]
        return Rollout(prompts, tokens, lengths, logprobs, entropy, self.finished[groups], texts, *fixed)


@dataclass(frozen=True)
class Scores:
    """What the reward function returned for a rollout."""

    rewards: Tensor  # [G, N] float32, finite, on the CPU
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> [G, N], its further numbers; NaN where none
    predictions: list[list[str | None]] = field(default_factory=list)  # G x N, the final answers it read (`pred`)
    skipped: list[int] = field(default_factory=list)  # groups left out because the function failed; they score 0
    first_fault: str = ""  # `raised ValueError: ... (line 3)`
    errors: int = 0  # calls that raised, returned no score, or took their process with them
    timeouts: int = 0  # calls that took too long
    calls: int = 0
    faulty: Tensor | None = None  # [G, N] bool, responses whose call failed; None where all were scored

    @property
    def faults(self) -> int:
        """Calls that failed."""
        return self.errors + self.timeouts


Collected = tuple[list[int], Rollout, Scores]  # places in the global batch, ascending, and the groups there


@dataclass(frozen=True)
class Groups:
    """What the objective needs of G groups of N responses, besides the policy's log-probs; fixed during an update."""

    anchors: Tensor  # [G, N, L] log-probs; zeros where the anchor is `none` or `old`
    rewards: Tensor  # [G, N]
    beats: Tensor  # [G, N, N] bool
    forks: Tensor  # [G, N, N] int64: the token at which two responses part
    lengths: Tensor  # [G, N]
    weights: Tensor | None = None  # [G, N, L]: how much each token's gradient counts; by default 1
    advantages: Tensor | None = None  # [G, N, L], of tokens, by a critic (PPO)

    def __post_init__(self) -> None:
        if self.weights is None:
            object.__setattr__(self, "weights", torch.ones_like(self.anchors))

    def select(self, groups: list[int], width: int) -> "Groups":
        """Return some of the groups, `width` tokens wide."""
        fixed = (self.rewards, self.beats, self.forks, self.lengths)
        anchors, weights = (x[groups][..., :width] for x in (self.anchors, self.weights))
        advantages = None if self.advantages is None else self.advantages[groups][..., :width]
        return Groups(anchors, *(x[groups] for x in fixed), weights, advantages)


@dataclass(frozen=True)
class ValueTargets:
    """What a critic learns of a rollout."""

    old: Tensor  # [G, N, L], its values before the update
    returns: Tensor  # [G, N, L], what they should be
    batch_tokens: int  # tokens of the global batch


@dataclass(frozen=True)
class Experience:
    """All that one update needs; nothing in it carries a gradient."""

    rollout: Rollout
    groups: Groups
    reference_logprobs: Tensor  # [G, N, L], for the KL term
    places: list[int]  # G, places in the global batch: they decide a group's mini-batch, however many ranks there are
    batch_groups: int  # groups in the global batch
    batch_pairs: int  # pairs in the global batch
    values: ValueTargets | None = None  # where there is a critic


@dataclass
class Update:
    """What an update did, on this rank."""

    logprobs: Tensor  # [G, N, L], the policy's before the update
    terms: dict[str, float] = field(default_factory=dict)  # this rank's share of each loss term, before the update
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0  # optimizer steps not taken because the gradient was not finite
    not_finite: str = ""  # what was not finite first in the first of these, on any rank
    clipped: float = 0.0  # tokens of later optimizer steps, summed over them, whose gain the clip holds
    ratios: int = 0  # ... of which there were so many
    empty: int = 0  # optimizer steps not taken for want of a pair: AdamW would make full steps of the KL term alone
