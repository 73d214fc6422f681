"""Rows for files of data, and their text as JSONL."""

import json

GOOD = {"prompt": "1 + 1?", "ground_truth": "2", "data_source": "sums"}


def lines_of(*prompts):
    return "".join(json.dumps({**GOOD, "prompt": p}) + "\n" for p in prompts)
