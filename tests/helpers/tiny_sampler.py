"""A sampler for models without a tokenizer, prompts for it, and a look at its slots."""

from contextlib import contextmanager

import pytest
import torch
from transformers import GenerationConfig

from gspo.rollout.sampler import Sampler
from gspo.rollout.slots import Slots
from gspo.types import Prompt


def prompts_of(sizes, offset=5):
    return [Prompt(10 + i, tuple(range(offset + i, offset + i + size)), "", "", "") for i, size in enumerate(sizes)]


class Tokens:
    """A tokenizer for models without one: ids as words."""

    eos_token_id, pad_token_id, chat_template = 1, 0, None

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


def sampler_for(model, **kwargs):
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    return Sampler(model, Tokens(), torch.device("cpu"), **kwargs)


@contextmanager
def watched_seats(live):
    """Notes how many answers are under way whenever slots are filled."""
    seat = Slots.seat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slots, "seat", lambda slots, *a: live.append(len(slots)) or seat(slots, *a))
        yield


LIMITS = torch.tensor([[14, 1, 7], [2, 14, 4], [14, 3, 9], [5, 14, 1]])
