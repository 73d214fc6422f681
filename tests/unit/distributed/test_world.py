"""Several gloo processes do what one does: same samples, same rewards, same gradient."""

import json
import socket

import pytest
import torch
import torch.distributed as dist
from architectures import tiny_model
from ranks import FEW, gradient, launch
from repository import PROGRAM_ENV

from gspo.distributed.sharding import with_hybrid_mesh
from gspo.distributed.world import World, _store_of_this_attempt
from gspo.errors import UserError
from gspo.models.safetensors_files import open_weights

LIVE = ("optim.minibatches=1", "optim.epochs_per_rollout=1")


def first_step(folder):
    """Its samples, and its numbers: not the machine's, nor the order of implicit rewards that are all zero yet."""
    samples, metrics = (
        [json.loads(line) for line in (folder / f"{x}.jsonl").read_text().splitlines()] for x in ("samples", "metrics")
    )
    own = ("time/", "memory/", "tokens_per_second", "balance", "pairs/accuracy_train")
    return {
        "samples": [row for row in samples if row["step"] == 1],
        "metrics": {name: value for name, value in metrics[0].items() if not name.startswith(own)},
        "balance": metrics[0]["balance"],
    }


@pytest.fixture(scope="module")
def alone(run_program, tmp_path_factory):
    """Gradient and samples of one process."""
    return gradient(run_program, tmp_path_factory.mktemp("alone"), 1, *LIVE)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(LIVE, id="live"),
        # one response a forward: unequal work, frozen coefficients
        pytest.param(
            (*LIVE, "optim.micro_batch_responses=3", "objective.normalizer=batch"), id="frozen", marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_sample_score_and_differentiate_as_one(run_program, tmp_path, alone, overrides):
    """7 prompts on 2 ranks: an uneven share. Gradients to 1e-5 of their largest entry."""
    one, samples = alone if overrides == LIVE else gradient(run_program, tmp_path, 1, *overrides)
    two, same = gradient(run_program, tmp_path, 2, *overrides)
    assert same == samples and len(samples) == 7
    assert one.keys() == two.keys()
    for name in one:
        scale = one[name].abs().max()
        assert scale > 0 and (one[name] - two[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.slow
def test_two_pairs_of_tensor_parallel_ranks_sample_the_tokens_of_one_process(run_program, tmp_path, alone):
    """7 prompts: the first pair answers four of them, the second three."""
    _, same = gradient(run_program, tmp_path, 4, *LIVE, "rollout.tensor_model_parallel_size=2")
    assert same == alone[1]


@pytest.mark.slow
def test_two_ranks_grow_the_trees_of_one_and_differentiate_as_one(run_program, tmp_path):
    """Seven trees of two trunks, of which one rank gets four, sampled by each rank alone and by both together."""
    tree = (*LIVE, "rollout.n=8", "rollout.trunks=2", "rollout.branch_every=0.3")
    one, samples = gradient(run_program, tmp_path, 1, *tree)
    _, flat = gradient(run_program, tmp_path, 1, *LIVE, "rollout.n=8")
    assert [row[3][::4] for row in samples] == [row[3][::4] for row in flat] and samples != flat
    for together in (1, 2):
        two, same = gradient(run_program, tmp_path, 2, *tree, f"rollout.tensor_model_parallel_size={together}")
        assert same == samples
        for name in one:
            scale = one[name].abs().max()
            assert scale > 0 and (one[name] - two[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.slow
def test_weights_reach_tensor_parallel_samplers_in_small_pieces(run_program):
    """54 MiB of weights in bf16, the largest 16 (32 as the policy keeps it): in pieces of 1 MiB, of which gloo makes a
    copy, the shard it is sent from another, and slicing a third."""
    env = {**PROGRAM_ENV, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory is given back at once
    done = launch(run_program, 2, "tests/programs/transferred_weights.py", 2, env=env)
    ranks = json.loads(done.stdout.splitlines()[-1])
    assert len(ranks) == 2 and [rank["wrong"] for rank in ranks] == [[], []]
    for rank in ranks:
        assert 27 < rank["held"] < 28 and rank["grown"] < 8, ranks


@pytest.mark.slow
def test_one_prompt_on_two_ranks_neither_hangs_nor_differs(run_program, tmp_path):
    """A rank without any work still takes part in every collective."""
    few = (
        "data.train_batch_size=1",
        "optim.minibatches=1",
        "optim.epochs_per_rollout=1",
        "rollout.n=8",
        "trainer.seed=3",
    )
    one, samples = gradient(run_program, tmp_path, 1, *few)
    two, same = gradient(run_program, tmp_path, 2, *few)
    assert same == samples and any(r != samples[0][2][0] for r in samples[0][2]), "the group needs a pair"
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-5 * one[name].abs().max(), name


@pytest.mark.slow
def test_two_ranks_train_as_one_and_their_checkpoint_resumes_on_one(run_program, tmp_path):
    """Weights, moments and opponent after two rounds; then one process takes over."""
    args = ("--config", "configs/quick.yaml", *FEW, "eval.before_and_after=false", "eval.round_prompts=4",
            "data.spaced=true")  # fmt: skip
    launch(run_program, 2, "train.py", *args, "trainer.max_steps=4", f"trainer.output_dir={tmp_path}/two")
    done = run_program("train.py", *args, "trainer.max_steps=4", f"trainer.output_dir={tmp_path}/one")
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, stem in ((".", "model"), ("trainer", "optimizer"), ("trainer", "opponent")):
        one, two = (
            open_weights(tmp_path / f"{x}/quick/checkpoints/step_000004/{folder}", stem) for x in ("one", "two")
        )
        assert set(one.names) == set(two.names)
        for name in one.names:
            torch.testing.assert_close(
                two.read(name), one.read(name), rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    one, two = (open_weights(tmp_path / f"{x}/quick/checkpoints/step_000004/trainer", "order") for x in ("one", "two"))
    assert all(two.read(name).equal(one.read(name)) for name in one.names), "each prompt has its own group's outcome"
    assert 0 < (one.read("streak") > 0).sum() < (one.read("due") > 0).sum() == 28
    one, two = (first_step(tmp_path / f"{x}/quick") for x in ("one", "two"))
    assert one["samples"] == two["samples"] and len(two["samples"]) == 7, "whichever rank had them"
    assert one["metrics"].keys() == two["metrics"].keys() and one["metrics"]["heldout/pairs"] > 0
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)
    assert one["balance"] == 1.0 < two["balance"] < 1.5
    again = run_program("train.py", *args, "trainer.max_steps=5", f"trainer.output_dir={tmp_path}/two")
    assert again.returncode == 0 and "4 of 5 steps done" in again.stdout, again.stderr[-3000:]


@pytest.mark.parametrize(
    ("ranks", "shapes"),
    [
        pytest.param(3, 4, marks=pytest.mark.slow),
        pytest.param(3, 100, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
        *(pytest.param(k, 100, marks=[pytest.mark.hour, pytest.mark.timeout(3000)]) for k in (2, 4)),
    ],
)
def test_loss_and_gradients_of_random_batches_equal_one_process(run_program, tmp_path, ranks, shapes):
    """Uneven lengths and prompt counts, groups without pairs, fewer groups than ranks; mini- and micro-batches, hybrid
    shards, offload, kept weights, gradients summed once. Entries to 1e-5 of the gradient's largest. No rank hangs."""
    launch(run_program, ranks, "tests/programs/random_shapes.py", tmp_path / "result.json", shapes, timeout=3000)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result) == shapes and all(case["size"] > 1e-3 for case in result)
    assert any(case["groups"] < ranks for case in result) and any(case["paired"] < case["groups"] for case in result)
    worst = max(result, key=lambda case: max(case["gradient"], case["loss"]))
    assert worst["gradient"] <= 1e-5 and worst["loss"] <= 1e-5, worst


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_offloaded_reference_has_one_unit_on_the_device_at_a_time(run_program, tmp_path, family):
    """Beside the last norm, or a tied embedding, which stays for the whole forward; nothing between uses."""
    tiny_model(family, vocab_size=96).save_pretrained(tmp_path)
    launch(run_program, 2, "tests/programs/reference_memory.py", tmp_path / "result.json", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["shards_on"] == "cpu" and result["after"] == 0
    assert result["peak"] == result["left"] + result["largest"] < 0.6 * result["all"]
    assert result["left"] == (4 * 32 if family == "llama" else 4 * 32 * 97)


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(UserError, match=r"model.shard_size = 3 does not divide the 4 processes"):
        with_hybrid_mesh(World(0, 4, torch.device("cpu"), mesh=object()), 3)


def test_places_partition_the_batch_and_tensor_parallel_ranks_share_theirs():
    worlds = [World(rank, 4, torch.device("cpu"), None) for rank in range(4)]
    assert [w.places(6) for w in worlds] == [[0, 4], [1, 5], [2], [3]]
    assert [w.places(6, tp=2) for w in worlds] == [[0, 1, 4, 5], [0, 1, 4, 5], [2, 3], [2, 3]]


def test_keys_in_the_store_differ_after_a_restart(monkeypatch):
    """Or a rank would read there what one that has ended had written."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    kept = dist.TCPStore("127.0.0.1", port, is_master=True)
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1,
                       "TORCHELASTIC_USE_AGENT_STORE": True}.items():  # fmt: skip
        monkeypatch.setenv(key, str(value))
    found = []
    for attempt in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = _store_of_this_attempt()
        found.append(store.check(["address"]))
        store.set("address", "mine")
    assert found == [False, True, False] and kept.num_keys() >= 2


@pytest.mark.slow
def test_ranks_find_each_other_after_a_restart_whoever_is_first(run_program, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1")
    result = tmp_path / "result.json"
    done = run_program(*launcher, "tests/programs/restarted_ranks.py", result, env=PROGRAM_ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(result.read_text()) == {"attempt": 1, "ranks": 2}
