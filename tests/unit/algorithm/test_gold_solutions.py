"""Gold solutions beside the samples: what SPIN learns from, and what they must not touch."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gspo.algorithm.gold_solutions import add_solutions, solution_ids
from gspo.algorithm.self_play_models import SelfPlayModels
from gspo.algorithm.update import Updater, make_optimizer
from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.metrics.group_rows import sample_rows
from gspo.metrics.step_metrics import Meter, observe
from gspo.models.loading import load_tokenizer
from gspo.packing.logprobs import response_logprobs
from gspo.packing.pack import pack, pack_rows
from gspo.read_config import load_config
from gspo.rollout.draw_tokens import Sampling
from gspo.rollout.sampler import Sampler
from gspo.types import Prompt, Scores
from train import gather_experience

WORLD = World(0, 1, torch.device("cpu"), None)


def prompts(tokenizer, solutions=("x = 12 - 5 = 7\nAnswer: 7", "x = 3 + 4 = 7\nAnswer: 7")):
    texts = ["<|user|>Solve: x + 5 = 12<|assistant|>", "<|user|>Solve: x - 4 = 3<|assistant|>"]
    ids = [tuple(tokenizer(t)["input_ids"]) for t in texts]
    return [Prompt(i, ids[i], texts[i], "7", "", {"solution": s} if s else {}) for i, s in enumerate(solutions)]


@pytest.fixture()
def setting():
    """Two groups of three samples, the gold texts beside them, and all that an update needs."""
    tokenizer = load_tokenizer(None)

    def make(*overrides):
        cfg = load_config(None, ["objective.algorithm=spin", "objective.preference_beta=0.5", *overrides])
        models = SelfPlayModels(cfg, WORLD)
        sampler = Sampler(models.sampler, tokenizer, WORLD.device)
        rollout = sampler.generate(prompts(tokenizer), 3, Sampling(0.9, max_new_tokens=16))
        scores = Scores(torch.tensor([[1.0, 0.0, 0.1], [0.0, 0.0, 0.0]]))
        joined = add_solutions(rollout, tokenizer, sampler.end_id, models.policy.config, WORLD)
        exp = gather_experience(joined, [0, 1], scores, models, 2, cfg, WORLD)
        return cfg, models, sampler, rollout, scores, exp

    return make


def test_the_gold_text_stands_last_ended_scored_and_preferred(setting):
    _, models, sampler, rollout, scores, exp = setting()
    tokenizer = load_tokenizer(None)
    for g, prompt in enumerate(rollout.prompts):
        n = int(exp.rollout.lengths[g, 3])
        ids = exp.rollout.tokens[g, 3, :n].tolist()
        assert ids[-1] == sampler.end_id and tokenizer.decode(ids[:-1]) == prompt.extra_info["solution"]
        mine = response_logprobs(
            models.policy, models.head, pack([prompt], [0], torch.tensor([ids]), torch.tensor([n])), 0.9
        )
        mine = mine.detach()
        torch.testing.assert_close(exp.reference_logprobs[g, 3, :n], mine[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(exp.groups.anchors[g, 3, :n], mine[0], rtol=1e-4, atol=1e-5)
    assert exp.rollout.copied.tolist() == [[0, 0, 0, 0]] * 2
    assert exp.rollout.sampled.tolist() == [[True, True, True, False]] * 2 and exp.rollout.finished[:, 3].all()
    assert exp.groups.rewards.tolist() == [[*rewards, 1.0] for rewards in scores.rewards.tolist()]
    assert exp.groups.beats[:, 3, :3].all() and exp.batch_pairs == 6 + 2, "1.0 beats 0.1 and 0.0"
    assert not exp.groups.beats[:, :, 3].any()
    width = rollout.tokens.shape[2]
    assert exp.rollout.tokens[:, :3, :width].equal(rollout.tokens)
    assert (
        exp.rollout.sampled_mask[:, :3, :width].equal(rollout.mask)
        and exp.rollout.sampled_mask.sum() == rollout.mask.sum()
    )


def test_metrics_and_samples_show_the_sampled_responses_only(setting):
    """What a step shows is what it would show without the solutions."""
    cfg, models, _, rollout, scores, exp = setting()
    updater = Updater(models.policy, models.head, make_optimizer(models.policy, cfg), cfg, WORLD)
    update = updater.run(exp, 0.0)
    assert update.logprobs.shape[:2] == (2, 4)
    width = rollout.tokens.shape[2]
    alone = gather_experience(rollout, [0, 1], scores, models, 2, cfg, WORLD)
    short = replace(update, logprobs=update.logprobs[:, :3, :width])
    shown, wanted = (
        Meter.merge([observe(e, scores, u, cfg.objective).state()]) for e, u in ((exp, update), (alone, short))
    )
    assert shown == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    shown, wanted = (sample_rows(e, scores, 2, load_tokenizer(None)) for e in (exp, alone))
    assert shown == wanted and len(shown[0]["lengths"]) == 3


@pytest.mark.parametrize(
    "steps", [(), ("optim.epochs_per_rollout=2",), ("optim.micro_batch_responses=3",)], ids=["live", "frozen", "cut"]
)
def test_the_first_gradient_is_spins_with_the_kl_on_samples_only(setting, steps):
    """... against autograd on the formula, whichever way the update takes."""
    cfg, models, _, _, _, exp = setting("objective.kl_coef=0.5", "optim.grad_clip=1e9", *steps)
    for p in models.policy.parameters():  # away from the reference, or the KL has no gradient
        p.data.add_(0.01 * torch.randn_like(p))
    packed = pack_rows(exp.rollout, [(g, i) for g in range(2) for i in range(4)])
    logprobs = response_logprobs(models.policy, models.head, packed, 0.9).view(2, 4, -1)
    s = 0.5 * (logprobs - exp.groups.anchors).sum(-1)
    loss = F.softplus(s[:, :3] - s[:, 3:]).mean()
    d = (logprobs - exp.reference_logprobs)[:, :3]
    loss = loss + 0.5 * (0.5 * d.square().sum() / 6)
    expected = torch.autograd.grad(loss, list(models.policy.parameters()))

    seen = []
    updater = Updater(models.policy, models.head, make_optimizer(models.policy, cfg), cfg, WORLD)
    updater._step = lambda exp, update, coefs: seen.append([p.grad.clone() for p in models.policy.parameters()])
    exp.rollout.logprobs[:, :3] = logprobs[:, :3].detach()
    updater.run(exp, 0.0)
    for got, wanted in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-5)


def test_a_solution_longer_than_the_models_frequencies_allow_is_refused(setting):
    _, models, sampler, rollout, _, exp = setting()
    sizes, config = [len(p.ids) for p in rollout.prompts], models.policy.config
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config.max_position_embeddings = int((torch.tensor(sizes) + exp.rollout.lengths[:, 3]).max())
    add_solutions(rollout, load_tokenizer(None), sampler.end_id, config, WORLD)
    config.max_position_embeddings -= 1
    with pytest.raises(UserError, match="with spin, the rows' solutions"):
        add_solutions(rollout, load_tokenizer(None), sampler.end_id, config, WORLD)


def test_a_row_without_a_solution_is_a_users_mistake():
    with pytest.raises(UserError, match="spin learns from gold texts: the row of .* has no field 'solution'"):
        solution_ids(Prompt(0, (1,), "Solve", "7", ""), load_tokenizer(None), 0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["spin", "rloo", "grpo", "dr_grpo", "online_dpo"])
def test_every_algorithm_trains(run_program, tmp_path, algorithm):
    done = run_program(
        "train.py", "--config", "configs/quick.yaml", f"objective.algorithm={algorithm}", "trainer.max_steps=2",
        "data.train_batch_size=8", "selfplay.rounds=1", "eval.before_and_after=false", "eval.round_prompts=0",
        f"trainer.output_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "quick" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 and row["kl_divergence"] >= 0 for row in rows) and rows[1]["kl_divergence"] > 0
