"""Score responses by a reward model (`reward.model_path`), in batches on the rank's device."""

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gspo.errors import UserError

BATCH, LONGEST = 16, 4096  # texts at a time; tokens of one, its end is kept


class RewardModel:
    """A Hugging Face model for sequence classification with one label."""

    def __init__(self, path: str, device: torch.device | str = "cpu"):
        """Open the model from a folder or the hub. Raise UserError where it is none, or needs code of its own."""
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                path, trust_remote_code=False, use_safetensors=True, dtype="auto"
            )
        except (OSError, ValueError, KeyError, ImportError) as e:
            said = " ".join(str(e).split())[:300]
            raise UserError(
                f"reward.model_path = {path!r} cannot be opened as a sequence-classification model: {said}. It must be "
                "a Hugging Face folder or hub name with safetensors weights and a tokenizer."
            ) from e
        if self.model.config.num_labels != 1:
            raise UserError(
                f"reward.model_path = {path!r} has {self.model.config.num_labels} labels; a reward model has one, the "
                "reward."
            )
        self.device = torch.device(device)
        self.model.to(self.device).eval()
        positions = getattr(self.model.config, "max_position_embeddings", LONGEST) or LONGEST
        self.longest = min(LONGEST, positions)
        self.pad_id = self.model.config.get_text_config().pad_token_id

    @torch.no_grad()
    def score(self, prompts: list[str], texts: list[list[str]]) -> Tensor:
        """Score N responses to each of G prompts: [G, N] float32 on the CPU."""
        rows = [self._ids(prompt, text) for prompt, group in zip(prompts, texts, strict=True) for text in group]
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.zeros(len(rows))
        for start in range(0, len(rows), BATCH):
            batch = by_length[start : start + BATCH]
            scores[batch] = self._forward([rows[i] for i in batch])
        if not scores.isfinite().all():
            raise UserError("the reward model (reward.model_path) returned a score that is not finite.")
        return scores.view(len(texts), -1)

    def _ids(self, prompt: str, text: str) -> list[int]:
        """Return the tokens of a prompt and a response, as the model's chat template has them, if it has one."""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        if self.tokenizer.chat_template:
            whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(f"{prompt}\n{text}")["input_ids"]
        return ids[-self.longest :]

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """Return the scores of rows padded on the right [B]: the model reads each at its last token but padding."""
        width, pad_id = max(map(len, rows)), self.pad_id
        if pad_id is None:  # one that no row holds
            used = {token for row in rows for token in row}
            pad_id = next(token for token in range(len(used) + 1) if token not in used)
            self.model.config.get_text_config().pad_token_id = pad_id
        ids = torch.full((len(rows), width), pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
        return logits[:, 0].float().cpu()
