"""Sample N responses to each prompt: `Sampler` turns prompts into an engine's requests, and its results into a Rollout.

Which engine does the sampling is a name in engines.py; ours is paged_engine.py. Randomness is keyed (draw_tokens.py):
a response does not depend on how the work is cut into batches.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.attention_support import check_length
from gspo.models.loading import end_and_pad_ids
from gspo.rollout.draw_tokens import Sampling, sample_keys
from gspo.rollout.engine_interface import EngineOptions, Requests, Results
from gspo.rollout.engines import engine_class
from gspo.rollout.kept_keys import KeptKeys
from gspo.rollout.response_text import GroupTexts, decode, special_tags, tags_note
from gspo.rollout.stop_strings import StopStrings
from gspo.rollout.tree import Tree, grow_branches
from gspo.system.console import say, track_sampling
from gspo.types import Prompt, Rollout, finish_reasons

TRAIN, EVAL, GREEDY = 0, 1, 2  # purposes: samples for one never equal those for another
OnGroup = Callable[[int, Prompt, list[str], list[str]], None]  # ... texts, finish reasons


class Sampler:
    """Sample with one model, on one rank or with `tp` ranks that share its weights and `agree` on every token drawn.

    `engine` is a name of engines.py; `max_slots`, `kv_memory_gib` and `page` are its `EngineOptions` and change no
    response. `skip_special_tokens` leaves all special tokens out of the texts, not only end and padding; one line says
    where the tokenizer marks tags as special. Raises UserError where the engine would give the model other log-probs
    than its own.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        *,
        engine: str = "paged",
        max_slots: int | Literal["auto"] = "auto",
        kv_memory_gib: float | Literal["auto"] = "auto",
        seed: int = 0,
        tp: int = 1,
        agree: Callable[[Tensor], Tensor] | None = None,
        page: int | None = None,
        skip_special_tokens: bool = False,
    ):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.seed, self.tp, self.skip_special_tokens = seed, tp, skip_special_tokens
        self.end_ids, self.pad_id = end_and_pad_ids(model, tokenizer)
        own = tokenizer.eos_token_id
        self.agree = agree
        self.end_id = own if own in self.end_ids else min(self.end_ids)  # ends a text that was not sampled
        self.engine = engine_class(engine)(model, device, EngineOptions(max_slots, kv_memory_gib, page, agree))
        if note := tags_note(special_tags(tokenizer, self.end_ids | {self.pad_id}), skip_special_tokens):
            say(note)
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
        tree: Tree | None = None,
    ) -> Rollout:
        """Sample n responses to each prompt: a Rollout [G, n, L] on the sampler's device, in the prompts' order.

        `on_group(place, prompt, texts, reasons)` is called as soon as the n responses to a prompt have ended, by an
        end token (`stop`) or at their limit (`length`), while others go on. `limits` [G, n] ends single responses
        earlier than `sampling.max_new_tokens`. With a `tree` the n responses are its leaves, trunks first sampled as a
        whole. A line on the terminal shows responses done and tokens a second. Raises UserError where the model's
        positions would depend on batch mates at this length.
        """
        self._check_length(prompts, sampling)
        if not prompts:
            return self._empty(n)
        requests = self.requests(prompts, n, sampling, purpose=purpose, step=step, limits=limits)
        texts: dict[int, list[str]] = {}
        reasons: dict[int, list[str]] = {}

        def group_ended(g: int, results: Results) -> None:
            rows = slice(g * n, (g + 1) * n)
            reasons[g] = finish_reasons(results.finished[rows])
            decoded.add(g, results.tokens[rows].cpu().numpy(), results.lengths[rows].cpu().numpy())

        def group_decoded(g: int, decoded: list[str]) -> None:
            texts[g] = decoded
            if on_group:
                on_group(g, prompts[g], decoded, reasons[g])

        with GroupTexts(self._text, group_decoded, beside=self.device.type == "cuda") as decoded:
            if tree is not None:
                assert tree.leaves == n and limits is None
                found = self._sample_tree(tree, requests, group_ended)
            else:
                found = self._sample("sampling", requests, group_ended), None, None
        return self._rollout(prompts, n, *found, texts)

    def _sample(self, what: str, requests: Requests, ended: Callable[[int, Results], None]) -> Results:
        """Run the engine; call `ended(g, results)` when the last response to prompt g of the requests has ended."""
        generation = self.engine.start(requests)
        with (
            track_sampling(what, len(requests.keys), generation.progress) as tick,
            closing(generation.run(tick)) as finished_prompts,
        ):
            for g in finished_prompts:
                ended(g, generation.results())
        return generation.results()

    def _sample_tree(
        self, tree: Tree, whole: Requests, group_ended: Callable[[int, Results], None]
    ) -> tuple[Results, Tensor, Tensor]:
        """Sample trunks, then what their branches do not copy -> all leaves, the tokens each leaf copied [R], and the
        tokens computed as prompts for each group [G]."""
        whole = replace(whole, kept=KeptKeys())
        groups, leaves = len(whole.prompts), Results.begin(whole, self.device)
        trunks = tree.trunk_rows(groups).to(self.device)
        requests = replace(
            whole,
            counts=[tree.trunks] * groups,
            begun=[0] * len(trunks),
            keys=whole.keys[trunks],
            limits=whole.limits[trunks],
        )
        found = self._sample("sampling trunks", requests, lambda g, results: None)
        leaves.put(trunks, found, slice(None))

        places = tree.places(found.entropy, found.lengths)
        if self.agree is not None:  # ranks of a tensor-parallel model may differ in an entropy's last digit
            places = self.agree(places.contiguous())
        branches = grow_branches(tree, whole, leaves, places)
        copied = leaves.lengths.clone()
        copied[trunks] = 0
        prefilled, to_come = [len(ids) for ids in whole.prompts], [0] * groups
        for g in branches.group:
            to_come[g] += 1

        def branch_ended(k: int, results: Results) -> None:
            rows, g = branches.requests.rows(k), branches.group[k]
            span = slice(rows.start, rows.stop)
            leaves.put(branches.rows[span], results, span)
            to_come[g] -= 1
            if to_come[g] == 0:
                group_ended(g, leaves)

        for g in [g for g in range(groups) if to_come[g] == 0]:
            group_ended(g, leaves)
        if branches.group:
            self._sample("sampling branches", branches.requests, branch_ended)
        for g, ids, trunk in zip(branches.group, branches.requests.prompts, branches.requests.trunks, strict=True):
            prefilled[g] += 0 if trunk in whole.kept.used else len(ids)
        return leaves, copied, torch.tensor(prefilled, device=self.device)

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
        tree: Tree | None = None,
    ) -> tuple[list[int], Rollout]:
        """Sample this rank's share of the prompts -> their places in the list, and the Rollout.

        Ranks that share one tensor-parallel model sample the share of all of them together; `on_group` is called for
        this rank's own prompts only, with their places in its Rollout.
        """
        self._check_length(prompts, sampling)  # of all ranks, so that none fails alone
        together, mine = world.places(len(prompts), self.tp), world.places(len(prompts))

        def own(i: int, prompt: Prompt, texts: list[str], reasons: list[str]) -> None:
            if together[i] in mine:
                on_group(mine.index(together[i]), prompt, texts, reasons)

        shared, told = [prompts[p] for p in together], own if on_group else None
        rollout = self.generate(shared, n, sampling, purpose=purpose, step=step, on_group=told, tree=tree)
        return mine, rollout if together == mine else rollout.select([together.index(p) for p in mine])

    def _check_length(self, prompts: list[Prompt], sampling: Sampling) -> None:
        longest = max((len(p.ids) for p in prompts), default=0)
        check_length(self.model.config, longest + sampling.max_new_tokens)

    def requests(
        self,
        prompts: list[Prompt],
        n: int,
        sampling: Sampling,
        *,
        purpose: int = TRAIN,
        step: int = 0,
        limits: Tensor | None = None,
    ) -> Requests:
        """Return what an engine needs to know of these prompts, on the sampler's device."""
        longest = sampling.max_new_tokens
        ids = torch.tensor([p.id for p in prompts], device=self.device).repeat_interleave(n)
        keys = sample_keys(self.seed, purpose, step, ids, torch.arange(n, device=self.device).repeat(len(prompts)))
        if limits is None:
            limits = torch.full((len(keys),), longest)
        return Requests(
            [p.ids for p in prompts],
            [n] * len(prompts),
            [0] * len(keys),
            sampling,
            keys,
            limits.flatten().clamp(1, longest).to(self.device),
            torch.tensor(sorted(self.end_ids), device=self.device, dtype=torch.long),
            self.pad_id,
            self._stop_strings(sampling.stop),
        )

    def _stop_strings(self, stops: tuple[str, ...]) -> StopStrings | None:
        if stops and stops not in self._stops:
            size = self.model.config.get_text_config().vocab_size
            self._stops[stops] = StopStrings(self.tokenizer, stops, size, self.device)
        return self._stops.get(stops)

    def _text(self, ids: list[int]) -> str:
        """Decode one response, without its end and padding tokens."""
        return decode(self.tokenizer, ids, self.end_ids | {self.pad_id}, self.skip_special_tokens)

    def _empty(self, n: int) -> Rollout:
        """Return the rollout of no prompts."""
        empty = torch.zeros(0, n, 0, device=self.device)
        none = torch.zeros(0, n, dtype=torch.long, device=self.device)
        return Rollout([], empty.long(), none, empty, empty, none.bool(), [])

    def _rollout(
        self,
        prompts: list[Prompt],
        n: int,
        results: Results,
        copied: Tensor | None,
        prefilled: Tensor | None,
        texts: dict[int, list[str]],
    ) -> Rollout:
        """Shape results [R, ...] into groups [G, n, ...], no wider than the longest response."""
        width = int(results.lengths.max())
        tokens, logprobs, entropy = (
            x[:, :width].clone().view(-1, n, width) for x in (results.tokens, results.logprobs, results.entropy)
        )
        lengths, finished = results.lengths.view(-1, n), results.finished.view(-1, n)
        copied = None if copied is None else copied.view(-1, n)
        by_group = [texts[g] for g in range(len(prompts))]
        return Rollout(
            prompts, tokens, lengths, logprobs, entropy, finished, by_group, copied=copied, prefilled=prefilled
        )


def shares_weights(weights: str, sharded: bool, dtype: torch.dtype, adapters: bool = False) -> tuple[bool, str]:
    """Decide `rollout.weights` -> whether the sampler reads the policy's own parameters, and if not, why.

    It may, as the policy changes only in updates, while nothing is sampled. It cannot read shards, nor sample in
    another dtype than the parameters have, nor without a copy that `adapters` are merged into. Sharing costs neither
    memory nor time, so `auto` shares where it can.
    Raises UserError where `share` is not possible.
    """
    why, cure = "", ""
    if sharded:
        why, cure = "the policy is sharded, and would have to be gathered for every token", "start one process"
    elif adapters:
        why, cure = "the adapter of model.lora is merged into the weights that sample", "leave model.lora empty"
    elif dtype != torch.float32:
        why, cure = f"the policy is kept in float32 and samples in {str(dtype)[6:]}", "set model.precision=fp32"
    if why and weights == "share":
        raise UserError(f"rollout.weights = 'share' is not possible: {why}. Use copy, or auto, or {cure}.")
    return not why and weights != "copy", why
