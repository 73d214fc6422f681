"""Score a response where the user names no function: by its final answer, its stated calculations and its form.

| the response                                                                      | score |
|-----------------------------------------------------------------------------------|-------|
| answer right, and every stated calculation holds                                  | 1.0   |
| answer right, but a stated calculation is false; or the gold answer is a list and | 0.5   |
| at least half of it is given, nothing wrong beside it                             |       |
| answer wrong (or less than half of a list), but clearly marked                    | 0.1   |
| otherwise                                                                         | 0.0   |

Copy this file, change `compute_score`, and pass it with `--reward_func ./my_reward.py`. docs/answers.md has the rules
by which answers are found and compared: final_answer.py finds them, compare_answers.py compares them, calculations.py
checks the calculations. No `eval`, no signals: any thread may call it. A response, however long or odd, costs
milliseconds, because only its end is read and every pattern is linear in it. The one thing that may hang, comparing
LaTeX by math-verify, runs in a process that is ended after seconds (latex_process.py); without math-verify
(pip install 'math-verify[antlr4_13_2]') LaTeX is compared as text.
"""

from decimal import Decimal

from gspo.reward.answer_text import end_of
from gspo.reward.calculations import verdicts
from gspo.reward.compare_answers import correctness_of
from gspo.reward.final_answer import final_answer

# ---- the functions that the original description names ----


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    """Return 1.0, 0.5, 0.1 or 0.0, by the table above."""
    return score_parts(data_source, solution_str, ground_truth, extra_info)["score"]


def score_parts(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None
) -> dict[str, float]:
    """Return the score and its components: {"score", "acc", "correct", "reasoning", "format"}.

    `acc` is what accuracy counts: 1.0 for a right answer, whatever stands beside it. Where
    `extra_info["finish_reason"]` is "length", the response was cut off, and its end may be half an answer.
    """
    cut_off = (extra_info or {}).get("finish_reason") == "length"
    correct = correctness(solution_str, ground_truth, cut_off)
    reasoning, marked = reasoning_quality(solution_str), format_quality(solution_str, cut_off)
    score = 0.5 if correct > 0.0 else 0.1 * marked
    if correct == 1.0 and reasoning == 1.0:
        score = 1.0
    acc = float(correct == 1.0)
    return {"score": score, "acc": acc, "correct": correct, "reasoning": reasoning, "format": marked}


def rank_responses(responses: list[str], ground_truth: str, data_source: str) -> list[tuple[int, float]]:
    """Return [(index, score), ...], best first, equal scores in the order given."""
    scores = [compute_score(data_source, response, ground_truth) for response in responses]
    return sorted(enumerate(scores), key=lambda ranked: -ranked[1])


def get_preference_pairs(
    responses: list[str], ground_truth: str, data_source: str, margin: float = 0.1
) -> list[tuple[str, str, float]]:
    """Return [(chosen, rejected, score_diff), ...] for every two scores more than `margin` apart, widest gap first."""
    ranking = rank_responses(responses, ground_truth, data_source)
    pairs = [
        (responses[better], responses[worse], high - low)
        for place, (better, high) in enumerate(ranking)
        for worse, low in ranking[place + 1 :]
        # In floats 0.8 - 0.7 > 0.1 but 1.0 - 0.9 < 0.1; the slack makes a gap of exactly `margin` no pair in both.
        if high - low > max(margin, 0.0) + 1e-6
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def extract_answer(solution_str: str) -> str:
    """Return the final answer as written, without outer whitespace and closing period: what a majority vote counts."""
    return final_answer(end_of(solution_str)).text.strip().rstrip(".")


# ---- the three components ----


def correctness(solution_str: str, ground_truth: str, cut_off: bool = False) -> float:
    """Return 1.0 if the final answer is the gold one, 0.5 if it is at least half of a gold list, else 0.0."""
    if isinstance(ground_truth, bool) or not isinstance(ground_truth, str | int | float | Decimal):
        raise TypeError(
            f"ground_truth is a {type(ground_truth).__name__} ({ground_truth!r:.60}), but this function compares texts "
            "and numbers: write it as text, or use another reward function"
        )
    return correctness_of(solution_str, str(ground_truth), cut_off)


def reasoning_quality(solution_str: str) -> float:
    """Return the share of the stated calculations (`48 / 2 = 24`, `x = 7 - 10 = -3`) that hold; 1.0 for none."""
    judged = verdicts(end_of(solution_str))
    return sum(judged) / len(judged) if judged else 1.0


def format_quality(solution_str: str, cut_off: bool = False) -> float:
    r"""Return 1.0 if the answer is marked (`\boxed{}`, `####`, "answer is", 答案：) or is the whole text, else 0.0."""
    answer = final_answer(end_of(solution_str), cut_off=cut_off)
    return float(answer.marked and bool(answer.text.strip(" .")))
