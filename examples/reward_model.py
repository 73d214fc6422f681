"""Score a response by a Hugging Face reward model (sequence classification with one label), in the worker processes.

    ./train.sh --reward_func examples/reward_model.py reward.reward_kwargs.path=OWNER/REWARD-MODEL reward.workers=1 \
        reward.memory_gib=32 reward.timeout_s=60

Every worker process loads the model once, at its first call, and scores one response at a time. To add a reward model
to another function instead, in batches on the rank's device: reward.model_path=OWNER/REWARD-MODEL
reward.model_weight=0.5.
"""

import functools

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@functools.lru_cache(maxsize=1)
def load(path):
    """Return the model and its tokenizer."""
    torch.set_num_threads(1)  # several workers share the cores
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def compute_score(data_source, solution_str, ground_truth, extra_info=None, path=""):
    """Return the model's score, as it is: any finite number is a reward."""
    model, tokenizer = load(path)
    question = (extra_info or {}).get("question", "")
    ids = tokenizer(f"{question}\n{solution_str}", truncation=True, max_length=1024, return_tensors="pt")
    logits = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
    return float(logits[0, 0])
