"""Every guard, on rows made by hand (its failure really happens in faults/test_provoked_failures.py)."""

import json
import random
import re

import pytest

from gspo.config import Health, parameters
from gspo.metrics.health import GUARDS, ROUND_GRACE, HealthCheck, advice, limit_of
from gspo.metrics.run_log import GLOSSARY

WELL = {
    "reward_mean": 0.5,
    "preference_accuracy": 0.8,
    "kl_divergence": 0.02,
    "mismatch": 1e-4,
    "response/length_mean": 20.0,
    "response/cutoff": 0.0,
    "pairs/groups_without": 0.3,
    "pairs/gap_std": 0.3,
    "winner_logprob": -0.5,
    "entropy": 0.8,
    "skipped_updates": 0.0,
    "reward/faults": 0.04,
    "round": 0.0,
}
ILL = {  # metric: (value out of range, words of the warning; the seed's FAQ is in the first two)
    "preference_accuracy": (0.59, ["0.6", "reward function", "raise objective.margin", "lower optim.learning_rate"]),
    "kl_divergence": (0.11, ["0.1", "raise objective.kl_coef", "lower optim.learning_rate"]),
    "mismatch": (0.03, ["0.02", "model.precision=fp32"]),
    "response/cutoff": (0.11, ["10%", "raise rollout.max_new_tokens"]),
    "reward/faults": (0.06, ["5%", "reward function", "reward.timeout_s"]),
    "pairs/groups_without": (0.81, ["20%", "raise rollout.n", "lower objective.margin", "harder"]),
    "pairs/gap_std": (0.71, ["0.7", "objective.anchor=opponent", "lower objective.preference_beta"]),
    "response/length_mean": (31.0, ["1.5 times", "objective.length_norm=mean", "reward function"]),
    "winner_logprob": (-0.71, ["0.2 nats", "objective.nll_coef=0.05", "lower optim.learning_rate"]),
    "entropy": (0.23, ["0.3", "lower optim.learning_rate", "objective.kl_coef"]),
}
AT_ONCE = {
    "skipped_updates": (1.0, ["not finite", "skipped", "lower optim.learning_rate", "model.precision=fp32"]),
    "response/cutoff": (0.79, ["79% of the responses are cut off", "raise rollout.max_new_tokens"]),
    "pairs/within_margin": (0.6, ["60% of the differing responses", "objective.margin", "lower objective.margin"]),
}
ALARMS = {"kl_divergence": 0.51, "pairs/gap_std": 1.51, "mismatch": 0.11}


def told(cfg, rows, healthy_first=ROUND_GRACE, full_reward=1.0):
    """-> for each row, what is told; "initial" is healthy."""
    check = HealthCheck(cfg, full_reward=full_reward)
    for _ in range(healthy_first):
        assert check.check(WELL) == []
    return [check.check({**WELL, **row}) for row in rows]


def levels(news):
    return [[n.level for n in step] for step in news]


# ---- the table ----


def test_the_table_is_whole():
    limits = {name.removeprefix("health.") for name in parameters() if name.startswith("health.")}
    named = {name for g in GUARDS for name in (g.warn, g.alarm) if name}
    assert limits - named == {
        "risen_reward",
        "solved_reward",
        "patience",
        "alarm_patience",
        "on_alarm",
        "max_bad_steps",
    }
    assert len({g.kind for g in GUARDS}) == len(GUARDS)
    assert {g.metric for g in GUARDS} - set(GLOSSARY) == {"pairs/groups_with"}  # 1 - pairs/groups_without
    for g in GUARDS:  # a cure names a setting, or what to do with the reward function
        words = [word.split("=")[0].strip(",()") for word in g.cure.split()]
        assert {w for w in words if "." in w} <= {*parameters(), "samples.jsonl"}
        assert {w for w in words if "." in w}


def test_warnings_and_alarms_have_limits_in_their_order():
    default = Health()
    for g in GUARDS:
        if g.alarm:
            assert g.bad == "above"
            assert all(limit_of(g.alarm, default, p) > limit_of(g.warn, default, p) for p in ("fp32", "bf16"))


# ---- warnings ----


@pytest.mark.parametrize("metric", ILL)
def test_a_warning_comes_once_after_patience_with_its_cure(metric):
    value, words = ILL[metric]
    news = told(Health(patience=3), [{metric: value}] * 8)
    assert levels(news) == [[], [], ["warning"], [], [], [], [], []]
    assert [word for word in words if word not in news[2][0].text] == []


@pytest.mark.parametrize("metric", ILL)
def test_one_good_step_starts_the_count_again(metric):
    bad, good = {metric: ILL[metric][0]}, {}
    news = told(Health(patience=3), [bad, bad, good, bad, bad, good, bad, bad, bad])
    assert [len(n) for n in news] == [0] * 8 + [1]


@pytest.mark.parametrize("metric", AT_ONCE)
def test_what_is_slow_or_never_harmless_is_told_at_once(metric):
    value, words = AT_ONCE[metric]
    news = told(Health(), [{}, {metric: value}, {}, {metric: value}])
    assert levels(news) == [[], ["warning"], [], []]
    assert [word for word in words if word not in news[1][0].text] == []


def test_winners_of_other_prompts_are_no_displacement():
    """With few prompts a step their winners' log-probs differ by more than 0.2 nats, as in a run whose KL was 0.002."""
    drops = [0.0, -0.30, 0.14, 0.29, -0.06, 0.12, 0.54, 0.42, 0.05]
    assert not any(told(Health(), [{"winner_logprob": -0.5 - drop} for drop in drops]))


def test_the_ranges_bounds_are_healthy_and_so_is_a_step_without_pairs():
    edge = {"preference_accuracy": 0.6, "kl_divergence": 0.1, "mismatch": 0.02, "response/cutoff": 0.1,
            "pairs/groups_without": 0.8, "pairs/gap_std": 0.7, "response/length_mean": 30.0, "reward/faults": 0.05,
            "winner_logprob": -0.7 + 1e-9, "entropy": 0.3 * 0.8 + 1e-9}  # fmt: skip
    assert told(Health(patience=1), [edge]) == [[]]
    check = HealthCheck(Health(patience=1))
    assert check.check({"kl_divergence": 0.02}) == [] and check.derived == {}


def test_the_accuracy_of_the_last_few_pairs_is_no_illness():
    """When hardly a group pairs, the warning is about that; what is left is what the policy gets wrong."""
    (news,) = told(Health(patience=1), [{"preference_accuracy": 0.1, "pairs/groups_without": 0.9}])
    assert len(news) == 1 and "give a pair" in news[0].text


def test_what_rounding_costs_is_allowed_for():
    row = [{"mismatch": 0.028}] * 9
    for precision, warned in (("fp32", 1), ("bf16", 0)):
        check = HealthCheck(Health(), precision)
        assert sum(len(check.check({**WELL, **step})) for step in row) == warned
    check = HealthCheck(Health(mismatch_max=0.02, patience=1), "bf16")
    assert check.check({**WELL, "mismatch": 0.028}), "a limit that is set holds"


def test_a_margin_that_swallows_the_last_small_differences_of_a_solved_task_is_no_illness():
    assert not any(told(Health(), [{"pairs/within_margin": 0.9, "reward_mean": 0.95}] * 9))


@pytest.mark.parametrize(("reward", "healthy"), [(0.61, True), (0.59, False), (0.2, False)])
def test_the_order_of_pairs_is_no_illness_once_rewards_have_risen(reward, healthy):
    check = HealthCheck(Health(patience=1))
    for first in (0.3, 0.5, 0.4, *[0.4] * ROUND_GRACE):
        assert check.check({**WELL, "reward_mean": first}) == []
    news = check.check({**WELL, "reward_mean": reward, "preference_accuracy": 0.3})
    assert [n.text.split(" is ")[0] for n in news] == ([] if healthy else ["preference_accuracy"])


def test_neither_rewards_that_rose_nor_few_pairs_explain_held_out_pairs_away():
    """They are the same pairs for the whole round."""
    better = {"preference_accuracy": 0.3, "heldout/pairs": 90.0, "reward_mean": 0.95, "pairs/groups_without": 0.9}
    (news,) = told(Health(patience=1), [better])
    assert sorted(n.text.split(" is ")[0] for n in news if "preference_accuracy" in n.text) == ["preference_accuracy"]


@pytest.mark.parametrize(("pairs", "warned"), [(20.0, True), (19.0, False)])
def test_a_handful_of_held_out_pairs_is_no_ground_for_a_warning(pairs, warned):
    (news,) = told(Health(patience=1), [{"preference_accuracy": 0.3, "heldout/pairs": pairs}])
    assert bool(news) == warned


def test_at_the_beginning_of_a_round_a_half_is_no_illness():
    row = {"preference_accuracy": 0.5, "heldout/pairs": 90.0}
    begun = [row | {"round": float(r)} for r in range(4) for _ in range(ROUND_GRACE)]
    assert not any(told(Health(patience=1), begun, healthy_first=0))
    assert levels(told(Health(patience=1), [row] * 21, healthy_first=0))[-1] == ["warning"]


def test_who_has_learned_the_answers_needs_no_entropy():
    sure = {"entropy": 0.01}
    assert told(Health(patience=1), [sure | {"reward_mean": 0.9}] * 9) == [[]] * 9
    assert levels(told(Health(patience=1), [sure | {"reward_mean": 0.89}])) == [["warning"]]


def test_solved_is_a_share_of_what_a_right_response_gets():
    health = Health(patience=1)
    rows = [{"entropy": 0.01, "reward_mean": 1.7}]
    assert told(health, rows) == [[]], "of 1"
    assert levels(told(health, rows, full_reward=2.0)) == [["warning"]], "1.7 of 2 is 0.85"


def test_held_out_answers_tell_as_well_that_the_task_is_solved():
    """Wrong gold answers among the training prompts keep their rewards low."""
    rows = [{"reward_mean": 0.8, "heldout/accuracy": 0.95}] + [{"reward_mean": 0.8, "entropy": 0.01}] * 9
    assert not any(told(Health(patience=1), rows))
    rows[0]["heldout/accuracy"] = 0.89
    assert sum(map(len, told(Health(patience=1), rows))) == 1


@pytest.mark.parametrize("held_out", [{}, {"heldout/pairs": 90.0}, {"heldout/pairs": 3.0}])
def test_few_pairs_are_no_illness_once_the_answers_are_learned(held_out):
    few = {"pairs/groups_without": 0.95} | held_out
    assert not any(told(Health(patience=1), [few | {"reward_mean": 0.95}] * 9))
    (news,) = told(Health(patience=1), [few | {"reward_mean": 0.75}])
    assert "easier ones if it is near 0, unless their gold answers are wrong" in news[0].text
    first = {**WELL, "reward_mean": 0.8}  # it rose by less than health.risen_reward
    check = HealthCheck(Health(patience=1))
    assert not any(check.check(row) for row in [first] * 3 + [{**first, **few, "reward_mean": 0.95}] * 9)
    never_hard = [WELL | few | {"reward_mean": 0.95}] * 3
    check = HealthCheck(Health(patience=1))
    assert any("give a pair" in n.text for row in never_hard for n in check.check(row)), "choose harder ones"


def test_a_policy_that_does_not_move_is_told_but_not_at_the_start_of_a_round():
    still = {"kl_divergence": 1e-5}
    rounds = [still | {"round": float(r)} for r in range(4) for _ in range(20)]
    assert not any(told(Health(), rounds, healthy_first=0))  # the reference is new: no distance yet
    news = told(Health(), [still] * 60)
    assert [n for step in news for n in step if "raise optim.learning_rate" in n.text and "0.001" in n.text]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda g: g.kind)
def test_limits_come_from_the_configuration(guard):
    """What is healthy by default is not when the limit is another; and the other guards do not mind."""
    row = {
        **WELL,
        "winner_logprob": -0.51,
        "response/cutoff": 0.01,
        "pairs/within_margin": 0.2,
        "heldout/accuracy": 0.5,
        "win_rate": 0.5,
    }
    rows = [{**WELL, "heldout/accuracy": 0.6, "win_rate": 0.5}] * 21 + [{**row, "reward_mean": 0.6}]
    limit = {"skipped_updates_max": -1, "within_margin_max": 0.1, "diverging_rounds_max": 0}.get(
        guard.warn, 1e-6 if guard.bad == "above" else 2
    )
    checks = [HealthCheck(Health(patience=1, **changed)) for changed in ({}, {guard.warn: limit})]
    default, changed = ([n.text for row in rows for n in check.check(row)] for check in checks)
    assert default == [] and len(changed) == 1 and changed[0].endswith(guard.cure)


# ---- what is measured against the run's own past ----


def test_initial_is_the_mean_of_the_first_three_steps():
    check, ratios = HealthCheck(Health()), []
    for length, entropy in [(10, 3.0), (20, 2.0), (30, 1.0), (40, 1.0), (20, 0.5)]:
        check.check({**WELL, "response/length_mean": float(length), "entropy": entropy})
        ratios.append((check.derived["response/length_ratio"], check.derived["entropy_ratio"]))
    assert ratios == [(1.0, 1.0), (4 / 3, 0.8), (1.5, 0.5), (2.0, 0.5), (1.0, 0.25)]


def test_displacement_is_counted_from_the_rounds_first_step_with_pairs():
    none = {k: v for k, v in WELL.items() if k != "winner_logprob"}
    check, drops = HealthCheck(Health()), []
    for r, value in [(0, None), (0, -0.5), (0, -0.6), (0, None), (0, -0.4), (1, None), (1, -0.9), (1, -1.05)]:
        check.check({**none, "round": float(r)} | ({} if value is None else {"winner_logprob": value}))
        drops.append(check.derived.get("winner_logprob_drop"))
    assert drops == [None, 0.0, pytest.approx(0.1), None, pytest.approx(-0.1), None, 0.0, pytest.approx(0.15)]


def rounds(measured, steps=3):
    """Steps of rounds in which (training reward, held-out accuracy) are these; it is looked at in between, too."""
    for r, (reward, accuracy) in enumerate(measured):
        for step in range(steps):
            row = {**WELL, "round": float(r), "reward_mean": reward + 0.1 * (step - 1)}
            end = {"heldout/accuracy": accuracy, "win_rate": 0.5} if step == steps - 1 else {"heldout/accuracy": 0.0}
            yield row | end


@pytest.mark.parametrize(
    "measured, counts",
    [
        ([(0.3, 0.6), (0.4, 0.5), (0.5, 0.4), (0.6, 0.3)], [0, 1, 2, 3]),
        ([(0.3, 0.6), (0.4, 0.5), (0.5, 0.5), (0.6, 0.4)], [0, 1, 0, 1]),  # held
        ([(0.3, 0.6), (0.4, 0.5), (0.4, 0.4), (0.5, 0.3)], [0, 1, 0, 1]),  # both are worse: no hacking
        ([(0.3, 0.3), (0.4, 0.4), (0.5, 0.5), (0.6, 0.6)], [0, 0, 0, 0]),
    ],
)
def test_hacking_is_reward_up_and_held_out_accuracy_down_twice_running(measured, counts):
    check, news, seen = HealthCheck(Health()), [], []
    for row in rounds(measured):
        news.append(check.check(row))
        seen += [check.derived["heldout/diverging"]] if "heldout/diverging" in check.derived else []
    assert seen == counts
    assert [len(n) for n in news] == [int(2 in counts and i == 3 * counts.index(2) + 2) for i in range(len(news))]
    for n in (n for step in news for n in step):
        assert "held-out accuracy falls" in n.text and "fix the reward function" in n.text


# ---- alarms ----


@pytest.mark.parametrize("metric", ALARMS)
def test_an_alarm_comes_after_two_steps_and_its_warning_is_no_news_then(metric):
    value = ALARMS[metric]
    news = told(Health(patience=3), [{metric: value}, {}, {metric: value}, {metric: value}, *[{metric: value}] * 9])
    assert levels(news)[:5] == [[], [], [], ["alarm"], []] and not any(news[4:])
    assert f"now {value:g}; what is learned from here on is likely lost: " in news[3][0].text


def test_an_alarm_comes_although_its_warning_has():
    bad = [{"kl_divergence": 0.2}] * 4 + [{"kl_divergence": 0.6}] * 2
    assert levels(told(Health(patience=3), bad)) == [[], [], ["warning"], [], [], ["alarm"]]


def test_an_alarm_stops_the_run_only_when_asked_to():
    for wish in ("warn", "stop"):
        check = HealthCheck(Health(on_alarm=wish))
        for _ in range(2):
            assert check.alarmed is None
            check.check({**WELL, "kl_divergence": 0.9, "mismatch": 0.9})
        for _ in range(9):
            check.check(WELL | {"pairs/gap_std": 9.0})  # another alarm changes nothing
        assert bool(check.alarmed) == (wish == "stop")
    assert check.alarmed.startswith("kl_divergence is above 0.5, now 0.9")
    assert "raise objective.kl_coef" in check.alarmed and "health.on_alarm=warn" in check.alarmed


def test_a_warning_stops_nothing():
    check = HealthCheck(Health(on_alarm="stop", patience=1))
    assert check.check({**WELL, "kl_divergence": 0.4}) and check.alarmed is None


# ---- a resumed run ----


@pytest.mark.parametrize("seed", range(20))
def test_replaying_what_was_seen_leaves_the_same_check(seed):
    """Through JSON, as from metrics.jsonl, with the derived curves in the rows."""
    rng, cfg = random.Random(seed), Health(patience=2, on_alarm="stop")
    whole, rows, news = HealthCheck(cfg), [], []
    for step in range(30):
        row = {k: v * rng.choice([1, 1, 1, 1.6, 12, 0.2]) for k, v in WELL.items() if rng.random() < 0.9}
        row["round"] = float(step // 8)
        row |= {"heldout/accuracy": rng.random(), "win_rate": 0.5} if step % 8 == 7 else {}
        news.append(whole.check(row))
        rows.append(row | {"step": step + 1} | whole.derived)
    assert any(news)
    cut = rng.randrange(30)
    resumed = HealthCheck(cfg)
    replayed = [resumed.check(json.loads(json.dumps(row))) for row in rows[:cut]]
    assert replayed + [resumed.check(row) for row in rows[cut:]] == news
    assert vars(resumed) == vars(whole)


def test_a_warning_is_in_chinese_from_its_first_word_to_its_last(monkeypatch):
    """But for the names of settings and curves, and the words that the Chinese documentation has in English, too."""
    monkeypatch.setenv("GSPO_LANG", "zh")
    names = (
        r"[a-z_]+[./=][\w./=]*|[a-z]+_[a-z_]+|sigmoid|nats|prompt|token|chosen|rejected|fp32|gold|reward|margin|entropy"
    )
    for guard in GUARDS:
        said = advice(guard.says.format(limit=0.5, value=0.5), guard.cure)
        assert "：" in said and re.findall(r"[A-Za-z]{2,}", re.sub(names, "", said)) == [], said
    alarm = advice("kl_divergence is above 1, now 3; what is learned from here on is likely lost", GUARDS[5].cure)
    assert alarm.startswith("kl_divergence 高于 1，现在是 3；")
