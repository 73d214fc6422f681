"""Batched sampling with cached keys and values: N answers to each prompt.

`Sampler` is what users and the other stages call. Each prompt is computed once (engine.py is the loop, slots.py the
memory, attention.py the attention); answers that end make room for those that wait. Randomness is keyed (see
sampling.py), so how the work is cut into batches does not show.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.architecture import check_length
from gspo.models.loading import generation_ids
from gspo.rollout.attention import check_slots
from gspo.rollout.decoder_stack import stacked
from gspo.rollout.engine import STEPS, Engine
from gspo.rollout.kv_budget import SHARE, answer_page_size, free_bytes, plan_slots
from gspo.rollout.sampling import Sampling, sample_keys
from gspo.rollout.slots import Slots
from gspo.rollout.stop_strings import StopStrings
from gspo.rollout.weight_layout import prepared
from gspo.system.console import watch
from gspo.types import Prompt, Rollout

TRAIN, EVAL, GREEDY = 0, 1, 2  # purposes: samples for one never equal those for another
OnGroup = Callable[[int, Prompt, list[str]], None]


class Sampler:
    """Generates with one model; `tp` ranks may share its weights, and then `agree` on every token drawn.

    At most `max_slots` answers are generated at the same time, and no more than `kv_memory_gib` (auto: half of what is
    free) holds keys and values for, in pages of `page` tokens (None: as the answers' length asks for). None of these
    changes an answer. Raises UserError where the model's attention is not one that slots compute exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        *,
        max_slots: int | Literal["auto"] = 256,
        kv_memory_gib: float | Literal["auto"] = "auto",
        seed: int = 0,
        tp: int = 1,
        agree: Callable[[Tensor], Tensor] | None = None,
        page: int | None = None,
    ):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.max_slots, self.kv_memory_gib, self.page = max_slots, kv_memory_gib, page
        self.seed, self.tp, self.agree = seed, tp, agree
        self.end_ids, self.pad_id = generation_ids(model, tokenizer)
        own = tokenizer.eos_token_id
        self.end_id = own if own in self.end_ids else min(self.end_ids)  # what a given text ends with
        self.layout = check_slots(model, device, fixed=device.type in STEPS)
        self._stops: dict[tuple[str, ...], StopStrings] = {}

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        n: int,
        sampling: Sampling,
        *,
        purpose: int = TRAIN,
        step: int = 0,
        on_group: OnGroup | None = None,
        limits: Tensor | None = None,
    ) -> Rollout:
        """Sample n answers to each prompt: a Rollout [G, n, L] on the sampler's device, in the prompts' order.

        `on_group(place, prompt, texts)` is called as soon as the n answers to a prompt have ended, while others go on.
        `limits` [G, n] cuts single answers earlier than `sampling.max_new_tokens`. A line on the terminal shows answers
        done and tokens a second. Raises UserError where the model cannot tell positions so far from batch mates'.
        """
        self._check_length(prompts, sampling)
        texts: dict[int, list[str]] = {}
        if not prompts:
            return self._collect(prompts, n, None, texts)
        engine = self._engine(prompts, n, sampling, purpose, step, limits)

        def so_far() -> tuple[int, int]:
            return len(prompts) * n - int(engine.left.sum()), int(engine.lengths.sum())

        with (
            prepared(self.model, engine.max_slots) as laid_out,
            stacked(self.model, laid_out, engine.slots),
            watch("sampling", len(prompts) * n, so_far) as tick,
        ):
            for g in engine.run(tick):
                rows = slice(g * n, (g + 1) * n)
                texts[g] = self._texts(engine.tokens[rows], engine.lengths[rows])
                if on_group:
                    on_group(g, prompts[g], texts[g])
        return self._collect(prompts, n, engine, texts)

    def generate_share(
        self,
        prompts: list[Prompt],
        n: int,
        sampling: Sampling,
        world: World,
        *,
        purpose: int = TRAIN,
        step: int = 0,
        on_group: OnGroup | None = None,
    ) -> tuple[list[int], Rollout]:
        """This rank's share of the prompts, as places in the list, and its answers to them.

        Ranks that share one tensor-parallel model generate the share of all of them together; `on_group` hears of
        this rank's own, with their places in its Rollout.
        """
        self._check_length(prompts, sampling)  # of all ranks, so that none fails alone
        together, mine = world.positions(len(prompts), self.tp), world.positions(len(prompts))

        def own(i: int, prompt: Prompt, texts: list[str]) -> None:
            if together[i] in mine:
                on_group(mine.index(together[i]), prompt, texts)

        rollout = self.generate(
            [prompts[p] for p in together], n, sampling, purpose=purpose, step=step, on_group=own if on_group else None
        )
        return mine, rollout if together == mine else rollout.select([together.index(p) for p in mine])

    def _check_length(self, prompts: list[Prompt], sampling: Sampling) -> None:
        longest = max((len(p.ids) for p in prompts), default=0)
        check_length(self.model.config, longest + sampling.max_new_tokens)

    def _engine(
        self, prompts: list[Prompt], n: int, sampling: Sampling, purpose: int, step: int, limits: Tensor | None
    ) -> Engine:
        """The loop over these prompts, with slots and pages for as many answers as the memory holds."""
        longest = sampling.max_new_tokens
        most = None if self.max_slots == "auto" else self.max_slots
        if self.kv_memory_gib == "auto":
            budget = int(SHARE * free_bytes(self.device))
        else:
            budget = int(self.kv_memory_gib * 2**30)
        if self.agree is not None:  # all ranks of a group must cut the work alike
            budget = int(self.agree(torch.tensor([budget], device=self.device)))
        sizes = [len(p.ids) for p in prompts]
        plan = plan_slots(self.layout, sizes, n, longest, most, budget, self.page or answer_page_size(longest))
        slots = Slots(self.layout, plan, self.device)

        ids = torch.tensor([p.id for p in prompts], device=self.device).repeat_interleave(n)
        keys = sample_keys(self.seed, purpose, step, ids, torch.arange(n, device=self.device).repeat(len(prompts)))
        ends = torch.tensor(sorted(self.end_ids), device=self.device, dtype=torch.long)
        if limits is None:
            limits = torch.full((len(keys),), longest)
        limits = limits.flatten().clamp(1, longest).to(self.device)
        return Engine(
            self.model,
            slots,
            plan.slots,
            [p.ids for p in prompts],
            n,
            sampling,
            keys,
            ends,
            limits,
            self._stop_strings(sampling.stop),
            self.agree,
            self.pad_id,
        )

    def _stop_strings(self, stops: tuple[str, ...]) -> StopStrings | None:
        if stops and stops not in self._stops:
            size = self.model.config.get_text_config().vocab_size
            self._stops[stops] = StopStrings(self.tokenizer, stops, size, self.device)
        return self._stops.get(stops)

    def _texts(self, tokens: Tensor, lengths: Tensor) -> list[str]:
        """Answers [n, L] as text, without end-of-sequence tokens."""
        answers = zip(tokens.tolist(), lengths.tolist(), strict=True)
        kept = [[t for t in answer[:length] if t not in self.end_ids] for answer, length in answers]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]

    def _collect(self, prompts: list[Prompt], n: int, engine: Engine | None, texts: dict[int, list[str]]) -> Rollout:
        if engine is None:
            empty = torch.zeros(0, n, 0, device=self.device)
            none = torch.zeros(0, n, dtype=torch.long, device=self.device)
            return Rollout([], empty.long(), none, empty, empty, none.bool(), [])
        width = int(engine.lengths[:-1].max())
        tokens, logprobs, entropy = (
            x[:-1, :width].clone().view(-1, n, width) for x in (engine.tokens, engine.logprobs, engine.entropy)
        )
        lengths, finished = engine.lengths[:-1].view(-1, n), engine.finished[:-1].view(-1, n)
        return Rollout(prompts, tokens, lengths, logprobs, entropy, finished, [texts[g] for g in range(len(prompts))])


def shares_weights(weights: str, sharded: bool, dtype: torch.dtype) -> tuple[bool, str]:
    """-> whether the sampler reads the policy's own parameters (`rollout.weights`), and why it cannot, if so.

    It may: the policy changes in updates only, when nobody samples. It cannot read shards, nor sample in another type
    than the parameters'. Sharing takes neither memory nor time, so `auto` shares where it can. Raises UserError where
    `share` cannot.
    """
    why, cure = "", ""
    if sharded:
        why, cure = "the policy is in shards, to be gathered anew for every token", "start one process"
    elif dtype != torch.float32:
        why, cure = f"the policy is kept in float32 and samples in {str(dtype)[6:]}", "set model.precision=fp32"
    if why and weights == "share":
        raise UserError(f"rollout.weights = 'share' is not possible: {why}. Use copy, or auto, or {cure}.")
    return not why and weights != "copy", why
