"""Batched, KV-cached sampling: N answers to each prompt.

Each prompt is prefilled once; its cache is then repeated for the N answers, which are decoded together. Answers that
have ended leave the batch. Randomness is keyed (see sampling.py), so how the work is cut into batches does not show.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gspo.distributed import World
from gspo.model import generation_ids
from gspo.progress import track
from gspo.sampling import Sampling, choose, sample_keys, uniforms
from gspo.types import Prompt, Rollout

TRAIN, EVAL, GREEDY = 0, 1, 2  # purposes: samples for one never equal those for another
OnGroup = Callable[[int, Prompt, list[str]], None]
COMPACT_BELOW = 0.6  # finished answers are dropped from the batch when the living ones are fewer than this share


class Sampler:
    """Generates with one model; `tp` ranks may share its weights, and then `agree` on every token drawn."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        *,
        max_slots: int = 256,
        seed: int = 0,
        tp: int = 1,
        agree: Callable[[Tensor], Tensor] | None = None,
    ):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.max_slots, self.seed, self.tp, self.agree = max_slots, seed, tp, agree
        self.end_ids, self.pad_id = generation_ids(model, tokenizer)
        own = tokenizer.eos_token_id
        self.end_id = own if own in self.end_ids else min(self.end_ids)  # what a given text ends with

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
    ) -> Rollout:
        """Sample n answers to each prompt: a Rollout [G, n, L] on the sampler's device, in the prompts' order.

        `on_group(place, prompt, texts)` is called as soon as the n answers to a prompt have ended, while others go on.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))  # alike lengths pad least
        per_batch = max(1, self.max_slots // n)
        batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
        rows: dict[int, tuple[Tensor, ...]] = {}
        texts: dict[int, list[str]] = {}
        for batch in track(batches, "sampling"):

            def ended(k: int, tokens: Tensor, lengths: Tensor, batch: list[int] = batch) -> None:
                i = batch[k]
                texts[i] = self._texts(tokens, lengths)
                if on_group:
                    on_group(i, prompts[i], texts[i])

            parts = self._generate_batch([prompts[i] for i in batch], n, sampling, purpose, step, ended)
            for k, i in enumerate(batch):
                rows[i] = tuple(part[k * n : (k + 1) * n] for part in parts)
        return self._collect(
            prompts, n, [rows[i] for i in range(len(prompts))], [texts[i] for i in range(len(prompts))]
        )

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
        together, mine = world.positions(len(prompts), self.tp), world.positions(len(prompts))

        def own(i: int, prompt: Prompt, texts: list[str]) -> None:
            if together[i] in mine:
                on_group(mine.index(together[i]), prompt, texts)

        rollout = self.generate(
            [prompts[p] for p in together], n, sampling, purpose=purpose, step=step, on_group=own if on_group else None
        )
        return mine, rollout if together == mine else rollout.select([together.index(p) for p in mine])

    def _generate_batch(
        self,
        prompts: list[Prompt],
        n: int,
        sampling: Sampling,
        purpose: int,
        step: int,
        ended: Callable[[int, Tensor, Tensor], None],
    ) -> tuple[Tensor, ...]:
        """-> tokens, logprobs, entropy [B * n, max_new_tokens], lengths [B * n], finished [B * n].

        `ended(k, tokens [n, max_new_tokens], lengths [n])` is called once for each prompt.
        """
        logits, cache, mask = self._prefill(prompts)
        cache.batch_repeat_interleave(n)
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        count, longest = logits.shape[0], sampling.max_new_tokens
        prompt_ids = torch.tensor([p.id for p in prompts], device=self.device).repeat_interleave(n)
        index = torch.arange(n, device=self.device).repeat(len(prompts))
        keys = sample_keys(self.seed, purpose, step, prompt_ids, index)
        ends = torch.tensor(sorted(self.end_ids), device=self.device)

        tokens = torch.full((count, longest), self.pad_id, device=self.device)
        logprobs = torch.zeros(count, longest, device=self.device)
        entropy = torch.zeros(count, longest, device=self.device)
        lengths = torch.zeros(count, dtype=torch.long, device=self.device)
        finished = torch.zeros(count, dtype=torch.bool, device=self.device)
        told = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        slots = torch.arange(count, device=self.device)  # row of each sequence still in the batch
        for position in range(longest):
            u = None if sampling.temperature == 0 else uniforms(keys[slots], position)
            token, logprob, h = choose(logits, u, sampling)
            if self.agree is not None:
                token = self.agree(token)
            alive = ~finished[slots]
            living = slots[alive]
            tokens[living, position], logprobs[living, position] = token[alive], logprob[alive]
            entropy[living, position] = h[alive]
            lengths[living] += 1
            finished[slots] |= torch.isin(token, ends)
            keep = ~finished[slots]
            still = int(keep.sum())
            if still < len(living):
                for k in (finished.view(-1, n).all(1) & ~told).nonzero().flatten().tolist():
                    ended(k, tokens[k * n : (k + 1) * n], lengths[k * n : (k + 1) * n])
                    told[k] = True
            if still == 0 or position == longest - 1:
                break
            if still < COMPACT_BELOW * len(slots):
                cache.batch_select_indices(keep.nonzero().squeeze(-1))
                slots, token, mask = slots[keep], token[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(slots), 1)], 1)
            logits = self._decode(token, mask, cache)
        for k in (~told).nonzero().flatten().tolist():  # cut off
            ended(k, tokens[k * n : (k + 1) * n], lengths[k * n : (k + 1) * n])
        return tokens, logprobs, entropy, lengths, finished

    def _prefill(self, prompts: list[Prompt]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Left-padded prompts -> last logits [B, V], the cache, the attention mask [B, P]."""
        width = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, p in enumerate(prompts):
            ids[i, width - len(p.ids) :] = torch.tensor(p.ids)
            mask[i, width - len(p.ids) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        cache = DynamicCache(config=self.model.config)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], cache, mask

    def _decode(self, token: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """One more token a row: token [S], mask [S, K] -> logits [S, V]."""
        out = self.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits[:, -1]

    def _texts(self, tokens: Tensor, lengths: Tensor) -> list[str]:
        """Answers [n, L] as text, without end-of-sequence tokens."""
        answers = zip(tokens.tolist(), lengths.tolist(), strict=True)
        kept = [[t for t in answer[:length] if t not in self.end_ids] for answer, length in answers]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]

    def _collect(
        self, prompts: list[Prompt], n: int, rows: list[tuple[Tensor, ...]], texts: list[list[str]]
    ) -> Rollout:
        if not prompts:
            empty = torch.zeros(0, n, 0, device=self.device)
            none = torch.zeros(0, n, dtype=torch.long, device=self.device)
            return Rollout([], empty.long(), none, empty, empty, none.bool(), [])
        tokens, logprobs, entropy, lengths, finished = (torch.stack(parts) for parts in zip(*rows, strict=True))
        width = int(lengths.max())
        tokens, logprobs, entropy = (x[..., :width].clone() for x in (tokens, logprobs, entropy))
        return Rollout(prompts, tokens, lengths, logprobs, entropy, finished, texts)
