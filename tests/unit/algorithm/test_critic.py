"""PPO's critic: GAE by hand on a small chain, its values and gradient against a plain model, its resume."""

from dataclasses import replace

import pytest
import torch
from architectures import tiny_model

from gspo.algorithm.critic import Critic, CriticUpdater, advantages_by_gae, token_rewards, value_loss
from gspo.algorithm.objective import Counts, Groups, evaluate
from gspo.algorithm.pairs import forks, preferences
from gspo.checkpoint.checkpoints import Checkpoints, State
from gspo.checkpoint.restore import restore
from gspo.checkpoint.run_folder import open_run
from gspo.config import Objective
from gspo.distributed.world import World
from gspo.models.loading import load_model
from gspo.read_config import load_config
from gspo.types import Experience, Prompt, Rollout

WORLD = World(0, 1, torch.device("cpu"), None)
LENGTHS = torch.tensor([[3, 1], [2, 4]])
FINISHED = torch.tensor([[True, True], [False, True]])
G, N, L = 2, 2, 4


def test_gae_on_a_chain_of_three_by_hand():
    """Values 0.5, 0.2, 0.4; reward 1 at the end; gamma 0.9, lambda 0.8: from the last token back."""
    rewards, values = torch.tensor([[[0.0, 0.0, 1.0]]]), torch.tensor([[[0.5, 0.2, 0.4, 0.0]]])
    changes = [0.9 * 0.2 - 0.5, 0.9 * 0.4 - 0.2, 1.0 - 0.4]  # -0.32, 0.16, 0.6
    expected = [changes[0] + 0.72 * (changes[1] + 0.72 * changes[2]), changes[1] + 0.72 * changes[2], changes[2]]
    found = advantages_by_gae(rewards, values, torch.tensor([[3]]), 0.9, 0.8)
    torch.testing.assert_close(found, torch.tensor([[expected]]))
    cut_off = advantages_by_gae(rewards, values + torch.tensor([0, 0, 0, 0.7]), torch.tensor([[3]]), 0.9, 0.8)
    torch.testing.assert_close(cut_off[0, 0, 2], torch.tensor(0.6 + 0.9 * 0.7))  # the value behind it counts


def test_gae_without_discount_is_what_followed_less_the_value_and_0_in_the_padding():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(G, N, L, generator=generator), torch.rand(G, N, L + 1, generator=generator)
    mask = torch.arange(L) < LENGTHS[..., None]
    rewards, values = rewards * mask, values * (torch.arange(L + 1) < LENGTHS[..., None])
    found = advantages_by_gae(rewards, values, LENGTHS, 1.0, 1.0)
    following = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(found, torch.where(mask, following - values[..., :-1], 0.0))


def test_the_reward_stands_at_the_last_token_and_the_kl_at_each():
    mask = torch.arange(L) < LENGTHS[..., None]
    logprobs, reference = torch.full((G, N, L), -1.0), torch.full((G, N, L), -1.5)
    found = token_rewards(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), LENGTHS, logprobs, reference, mask, 0.2)
    assert found[0, 0].tolist() == pytest.approx([-0.1, -0.1, 0.9, 0.0])
    assert found[:, :, :].sum(-1).flatten().tolist() == pytest.approx([0.7, 1.9, 2.8, 3.6])


def test_a_value_gains_nothing_by_moving_beyond_the_clip():
    old, returns = torch.zeros(4), torch.ones(4)
    values = torch.tensor([0.1, 0.5, -0.5, 1.0]).requires_grad_()
    loss = value_loss(values, old, returns, 0.2)
    assert loss.tolist() == pytest.approx([0.405, 0.32, 1.125, 0.32])  # 0.5 x 0.9^2, 0.8^2, 1.5^2, 0.8^2
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5, 0.0])


def test_the_policy_gradient_is_of_the_tokens_advantages():
    advantages = torch.rand(G, N, L, dtype=torch.float64)
    rewards, nothing = torch.rand(G, N), torch.zeros(G, N, L)
    groups = Groups(nothing, rewards, preferences(rewards, 0.1), torch.zeros(G, N, N).long(), LENGTHS, None, advantages)
    found = evaluate(-torch.rand(G, N, L, dtype=torch.float64), groups, Objective(algorithm="ppo"), Counts(G, 1.0))
    torch.testing.assert_close(found.coefficients, -advantages / (G * N))


def experience(values=None):
    generator = torch.Generator().manual_seed(1)
    prompts = [Prompt(i, tuple(range(4, 4 + size)), "", "", "") for i, size in enumerate((5, 2))]
    mask = torch.arange(L) < LENGTHS[..., None]
    tokens = torch.randint(2, 90, (G, N, L), generator=generator) * mask
    logprobs, reference = (-torch.rand(G, N, L, generator=generator) * mask for _ in range(2))
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.7]])
    rollout = Rollout(prompts, tokens, LENGTHS, logprobs, torch.zeros(G, N, L), FINISHED, [[""] * N] * G)
    beats = preferences(rewards, 0.1)
    groups = Groups(torch.zeros(G, N, L), rewards, beats, forks(tokens, LENGTHS), LENGTHS)
    return Experience(rollout, groups, reference, [0, 1], G, int(beats.sum()))


def updater(shared=False, *overrides):
    model, body = tiny_model("llama"), tiny_model("llama")
    cfg = load_config("configs/ppo.yaml", [f"critic.shared={shared}", "critic.normalize_advantages=false", *overrides])
    critic = Critic(None if shared else body, model.config.hidden_size, WORLD.device)
    with torch.no_grad():
        critic.value.weight.normal_(generator=torch.Generator().manual_seed(2))
        critic.value.bias.fill_(0.3)
    return CriticUpdater(critic, model, cfg, WORLD), model if shared else body


def plain_values(updater, body, exp, length):
    """V before each of `length` tokens of each response, [G, N, L + 1], sequence by sequence."""
    rows = []
    for prompt, group, sizes in zip(exp.rollout.prompts, exp.rollout.tokens, length.tolist(), strict=True):
        for tokens, size in zip(group.tolist(), sizes, strict=True):
            hidden = body.base_model(input_ids=torch.tensor([[*prompt.ids, *tokens[:size]]])).last_hidden_state[0]
            states = hidden[len(prompt.ids) - 1 : len(prompt.ids) - 1 + size]
            values = (states @ updater.critic.value.weight[0]) + updater.critic.value.bias
            rows.append(torch.cat([values, values.new_zeros(L + 1 - size)]))
    return torch.stack(rows).view(G, N, L + 1)


@pytest.mark.parametrize("shared", [False, True])
def test_values_are_a_plain_models_also_behind_what_was_cut_off(shared):
    critic, body = updater(shared)
    exp = experience()
    expected = plain_values(critic, body, exp, LENGTHS + (~FINISHED).long())
    torch.testing.assert_close(critic.values(exp.rollout), expected.detach(), rtol=1e-4, atol=1e-5)
    assert expected[1, 0, 2] != 0 and expected[0, 0, 3] == 0  # cut off; ended


@pytest.mark.parametrize("rows", [1, 3, None])
@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_is_a_plain_models_whatever_the_micro_batches(shared, rows):
    settings = ("optim.minibatches=1", "optim.epochs_per_rollout=1", "optim.grad_clip=1e9")
    critic, body = updater(shared, *settings, *([f"optim.micro_batch_responses={rows}"] if rows else []))
    exp, found = critic.judge(experience()), {}
    assert exp.values.returns.abs().sum() > 0
    with torch.no_grad():
        critic.critic.value.bias.add_(0.1)  # the critic is not as it was when it judged
    named = dict(critic.critic.named_parameters())
    critic.optimizer.step = lambda: found.update({n: p.grad for n, p in named.items() if p.grad is not None})
    curves = critic.run(exp, 0)
    assert not shared or all(p.grad is None for p in body.parameters()), "the policy is left alone"
    mask = exp.rollout.mask
    critic.critic.zero_grad()
    values = plain_values(critic, body, exp, LENGTHS)[..., :-1][mask]
    near = exp.values.old[mask] + (values - exp.values.old[mask]).clamp(-0.2, 0.2)
    returns = exp.values.returns[mask]
    loss = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
    loss.backward()
    assert curves["critic/loss"] == pytest.approx(loss.item(), rel=1e-4)
    names = {"value.weight", "value.bias"}
    assert (found.keys() == names) if shared else (names < found.keys())
    for name, grad in found.items():
        plain = critic.critic.get_parameter(name).grad
        assert (grad - plain).abs().max() <= 1e-4 * plain.abs().max() + 1e-7, name


def test_advantages_are_normalized_over_the_batch_and_the_mean_length_divides_them():
    critic, _ = updater(False)
    raw = critic.judge(experience()).groups.advantages
    critic.cfg = replace(critic.cfg, critic=replace(critic.cfg.critic, normalize_advantages=True))
    found, mask = critic.judge(experience()).groups.advantages, torch.arange(L) < LENGTHS[..., None]
    mean_length = LENGTHS.double().mean()
    a, b = (found * mean_length)[mask], (raw * mean_length)[mask]
    torch.testing.assert_close(a, (b - b.mean()) / b.std(correction=0))
    assert found[~mask].abs().sum() == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_checkpoint_brings_the_critic_and_its_optimizer_back_bit_for_bit(tokenizer, tmp_path, shared):
    cfg = load_config("configs/ppo.yaml", [f"trainer.output_dir={tmp_path}"])
    folder, _ = open_run(cfg, WORLD)
    policy = load_model(None)

    def a_critic():
        body = None if shared else load_model(None)
        return CriticUpdater(Critic(body, policy.config.hidden_size, WORLD.device), policy, cfg, WORLD)

    one, other = a_critic(), a_critic()
    one.run(one.judge(experience()), 5)
    optimizer = torch.optim.AdamW(policy.parameters())
    checkpoints = Checkpoints(folder, cfg, tokenizer, WORLD)
    saved = {"critic": (one.critic, one.optimizer)}
    checkpoints.save(State(step=1), policy, optimizer, {}, {}, True, saved)
    step = folder / "checkpoints" / "step_000001"
    restore(step, policy, optimizer, {}, State(), {"critic": (other.critic, other.optimizer)})
    assert one.critic.value.weight.abs().max() > 0
    for (name, p), q in zip(one.critic.named_parameters(), other.critic.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert one.optimizer.state[p].keys() == other.optimizer.state[q].keys()
        for key, moment in one.optimizer.state[p].items():
            assert torch.equal(moment, other.optimizer.state[q][key]), (name, key)
