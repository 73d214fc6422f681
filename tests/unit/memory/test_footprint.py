"""The memory report: what it counts, by hand, and how near it comes to a process's measured peak."""

import json
import re
from unittest.mock import ANY

import pytest
import torch
from architectures import tiny_model
from repository import PROGRAM_ENV, ROOT
from torch import nn
from torch.utils.checkpoint import checkpoint

from gspo.distributed.world import World
from gspo.embedded import MODEL_DIR
from gspo.errors import UserError
from gspo.memory.__main__ import main, report_text
from gspo.memory.activations import LiveBytes
from gspo.memory.footprint import (
    CHANGE,
    CONTEXT,
    FRAGMENTS,
    NCCL,
    WORKSPACES,
    footprint,
)
from gspo.memory.plan import FILLED, LEAST_TOKENS, candidates, choices, fit_settings, plan_memory
from gspo.models.loading import load_tokenizer
from gspo.read_config import load_config
from gspo.rollout.kv_budget import most_slots

GIB, PLENTY = 2**30, 2**62
SMALL = ["data.train_batch_size=8", "rollout.max_slots=1"]  # most of it are activations
MEDIUM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
          "num_key_value_heads": 6, "max_position_embeddings": 512, "vocab_size": 4096}  # fmt: skip


def test_live_bytes_of_two_layers_by_hand():
    """ReLU(x W) V over [8, 16] floats: what autograd keeps is x W and ReLU's result; then a gradient beside them."""
    w, v, x = (nn.Parameter(torch.ones(s, device="meta")) for s in ((16, 32), (32, 4), (8, 16)))
    x.requires_grad_(False)
    with LiveBytes() as live:
        y = (torch.relu(x @ w) @ v).sum()
        assert live.now == 4 * (8 * 32 + 1)  # ReLU's result is kept, its input is not
        assert live.peak == 4 * (2 * 8 * 32)
        del y
        assert live.now == 0
    with LiveBytes([w]) as live:
        assert w.t().shape == (32, 16) and live.peak == 0, "a view of what was there before"
    with LiveBytes() as live:
        y = checkpoint(lambda x: torch.relu(x @ w) @ v, x, use_reentrant=False).sum()
        assert live.now == 4
        y.backward()
    assert live.peak >= 4 * (8 * 32 + 16 * 32)


def report(*overrides, ranks=1, on="cpu", precision="fp32", **more):
    return footprint(load_config(None, ["data.train_batch_size=8", *overrides]), ranks, on, precision, PLENTY, **more)


def test_resident_bytes_are_4_a_parameter_for_weights_8_for_moments_and_the_frozen_models():
    p = 648_064
    one = report("trainer.async_save=false")
    assert one.parameters == p
    assert one.resident == {"weights": 4 * p, "optimizer": 8 * p, "reference": 4 * p}, "the sampler is the policy"
    four = report(ranks=4, on="cuda", precision="bf16")
    assert four.resident == {"weights": p, "optimizer": 2 * p, "sampler's copy": 2 * p, "CUDA and NCCL": ANY}
    assert four.offloaded == {"reference": 2 * p // 4, "checkpoint": 12 * p // 4 + 2 * p // 4}
    pairs = report("model.shard_size=2", "optim.gradient_reduction=step", "reference.param_offload=false",
                   "objective.anchor=initial", ranks=4, on="cuda", precision="bf16")  # fmt: skip
    assert pairs.resident["weights"] == 2 * p and pairs.phases["updating"]["gradients"] == 4 * p
    assert pairs.resident["reference"] == 2 * (2 * p // 2), "opponent and initial model"
    away = report("optim.offload=true", on="cuda", precision="bf16")
    assert away.offloaded["weights"] == 4 * p and "weights" not in away.resident


def test_a_critic_holds_12_bytes_a_parameter_more_unless_it_shares_the_policys_body():
    gspo, ppo = report("trainer.async_save=false"), report("trainer.async_save=false", "objective.algorithm=ppo")
    assert ppo.resident == gspo.resident | {"critic": 12 * gspo.parameters}
    shared = report("trainer.async_save=false", "objective.algorithm=ppo", "critic.shared=true")
    assert shared.resident == gspo.resident


def test_a_gpu_holds_more_than_tensors():
    """CUDA's context, cuBLAS's workspaces, NCCL's buffers for each group of ranks, and gaps: assumed, not measured."""
    alone, eight = (report(f"model.shard_size={s}", ranks=r, on="cuda", precision="bf16") for s, r in ((1, 1), (4, 8)))
    assert alone.resident["CUDA and NCCL"] == CONTEXT + WORKSPACES
    assert eight.resident["CUDA and NCCL"] == CONTEXT + WORKSPACES + 2 * NCCL, "shards and copies"
    tensors = alone.peak - alone.parts_at_peak["gaps"] - alone.resident["CUDA and NCCL"]
    assert alone.parts_at_peak["gaps"] == int(FRAGMENTS * tensors)
    assert "CUDA and NCCL" not in report().resident and "gaps" not in report().parts_at_peak
    assert alone.cure() in CHANGE.values(), "none of these is a setting"


def test_activations_are_recomputed_on_a_gpu_unless_told_otherwise():
    def activations(device, *settings):
        return report(*settings, on=device).phases["updating"]["activations"]

    kept, recomputed = activations("cpu"), activations("cuda")
    assert recomputed == activations("cpu", "model.gradient_checkpointing=true")
    assert recomputed < 0.7 * kept == 0.7 * activations("cuda", "model.gradient_checkpointing=false")


def fitted(cfg, device, free):
    chosen, found = fit_settings(cfg, 1, device, "fp32", free)
    return chosen.optim.micro_batch_tokens, found


def test_micro_batches_are_halved_on_a_gpu_until_they_fit():
    auto, given = load_config(None, SMALL), load_config(None, ["optim.micro_batch_tokens=8192", *SMALL])
    half = footprint(given, 1, "cuda", "fp32", PLENTY).peak
    tokens, chosen = fitted(auto, "cuda", int(half / FILLED) + 1)
    assert tokens == 8192 and chosen.peak == half
    assert fitted(given, "cuda", half // 2)[0] == 8192, "nobody asked for fewer"
    assert fitted(auto, "cpu", half // 2)[0] == 16384, "on a CPU results stay the same"


def test_micro_batches_are_never_smaller_than_what_fills_a_gpu():
    tokens = [chosen.optim.micro_batch_tokens for chosen in candidates(load_config(None, SMALL), 1, "cuda")]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] == LEAST_TOKENS


@pytest.mark.slow
def test_micro_batches_are_not_halved_where_sampling_takes_most():
    tokens, found = fitted(load_config(None, SMALL), "cuda", 2**20)
    assert found.peak_phase == "sampling" and tokens > LEAST_TOKENS


def test_the_reference_stays_on_a_gpu_that_has_room_for_it():
    cfg = load_config(None, ["optim.micro_batch_tokens=1024", *SMALL])
    there, away = (report("optim.micro_batch_tokens=1024", *SMALL, f"reference.param_offload={x}", on="cuda").peak
                   for x in ("false", "true"))  # fmt: skip
    assert there > away
    for free, offloads in ((int(there / FILLED) + 1, False), (int(there / FILLED) - 1, True), (2**20, True)):
        chosen, found = fit_settings(cfg, 1, "cuda", "fp32", free)
        assert chosen.reference.param_offload is offloads and found.peak == (away if offloads else there)
    assert fit_settings(cfg, 1, "cpu", "fp32", PLENTY)[0].reference.param_offload is True, "nothing changes on a CPU"


def test_on_one_gpu_the_whole_reference_comes_over_and_takes_less_than_gradients():
    """One copy for all micro-batches; layer by layer with several ranks, and where the policy is away as well."""
    p = 648_064
    alone = report("reference.param_offload=true", on="cuda")
    assert alone.phases["scoring"]["gathered layers"] == 4 * p == alone.phases["updating"]["gradients"]
    for more in ({"ranks": 2}, {"settings": ["optim.offload=true"]}):
        apart = report("reference.param_offload=true", *more.pop("settings", []), on="cuda", **more)
        assert 0 < apart.phases["scoring"]["gathered layers"] < 4 * p


def test_an_offloaded_policy_stays_on_the_gpu_for_all_micro_batches_of_a_step_where_it_fits():
    offloaded = ["optim.offload=true", "optim.micro_batch_tokens=1024", "reference.param_offload=true", *SMALL]
    cfg, once = load_config(None, offloaded), ["model.reshard_after_forward=false", "optim.gradient_reduction=step"]
    peaks = [report(*offloaded, *more, on="cuda", prompt_tokens=20).peak for more in (once, [])]
    assert peaks[0] > peaks[1]
    for free, peak in ((int(peaks[0] / FILLED) + 1, peaks[0]), (int(peaks[0] / FILLED) - 1, peaks[1])):
        chosen, found = fit_settings(cfg, 1, "cuda", "fp32", free, prompt_tokens=20)
        assert found.peak == peak
        assert chosen.model.reshard_after_forward is (peak == peaks[1])
        assert chosen.optim.gradient_reduction == ("step" if peak == peaks[0] else "micro_batch")


def test_a_run_trains_with_what_its_forecast_chose(monkeypatch):
    cfg, world = load_config(None, SMALL), World(0, 1, torch.device("cpu"), None)
    chosen = load_config(None, [*SMALL, "optim.micro_batch_tokens=2048", "reference.param_offload=false"])
    monkeypatch.setattr("gspo.memory.plan.fit_settings", lambda *_: (chosen, report()))
    planned, line = plan_memory(cfg, world, "fp32", 20)
    assert planned is chosen and cfg.optim.micro_batch_tokens == "auto", "config.yaml keeps what was asked for"
    assert "param_offload" not in line, "a CPU has nothing to choose"
    said = "\n".join(choices(cfg, chosen))
    assert "micro_batch_tokens=auto: 2,048" in said and "param_offload=auto: false" in said


QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768}
CARDS = [  # the GPUs that README.md and docs/scaling.md name: GiB of each, their number, the model
    (24, 1, QWEN | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}),
    (80, 8, QWEN | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064,
                    "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("gib", "gpus", "model"), CARDS, ids=["0.5B on one of 24 GB", "7B on eight of 80 GB"])
def test_the_gpus_that_the_readme_names_hold_their_models_by_the_forecast(gib, gpus, model, tmp_path):
    """With the settings of configs/standard.yaml, which train.sh takes."""
    (tmp_path / "config.json").write_text(json.dumps(model))
    cfg = load_config("configs/standard.yaml", [f"model.path={tmp_path}"])
    _, found = fit_settings(cfg, gpus, "cuda", "bf16", gib * GIB)
    assert found.peak < gib * GIB, found.summary()
    readme = (ROOT / "README.md").read_text()
    assert f"{gpus} x {gib} GB" in readme and "Ampere" in readme


def test_gathered_layers_are_the_two_largest_units_and_what_belongs_to_none(tmp_path):
    """By hand, for a hidden size of 32; the last norm is left."""
    tiny_model("llama", vocab_size=96, num_hidden_layers=3).save_pretrained(tmp_path)
    layer, embedding = 48 * 32 * 3 + 32 * 32 * 2 + 32 * 16 * 2 + 64, 96 * 32
    two = report(f"model.path={tmp_path}", ranks=2)
    assert two.phases["scoring"]["gathered layers"] == 4 * (32 + 2 * layer)
    assert two.phases["updating"]["gathered layers"] == 4 * (32 + 2 * layer) + 4 * layer
    kept = report(f"model.path={tmp_path}", "model.reshard_after_forward=false", ranks=2)
    assert kept.phases["updating"]["gathered layers"] == 4 * (32 + 3 * layer + 2 * embedding) + 4 * layer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mixture_of_experts_has_a_report_in_both_precisions(precision, tmp_path):
    tiny_model("mixtral").config.save_pretrained(tmp_path)
    few, many = (
        report(f"model.path={tmp_path}", f"optim.micro_batch_tokens={n}", "rollout.max_new_tokens=16",
               precision=precision, prompt_tokens=20).phases["updating"]["activations"]
        for n in (200, 600)
    )  # fmt: skip
    assert 0 < few < many < 6 * few


def test_kv_cache_by_hand():
    """Pages for 31 tokens of each of 8 x 4 answers, and for 8 prompts and those that wait."""
    short = ("rollout.n=4", "rollout.max_new_tokens=32")
    layers = json.loads((MODEL_DIR / "config.json").read_text())
    token = layers["num_hidden_layers"] * 2 * layers["num_key_value_heads"] * 32 * 4
    full = report(*short, prompt_tokens=50).phases["sampling"]["KV cache"]
    assert full % token == 0 and full // token >= 32 * 32 + 8 * 50
    assert most_slots("auto", "cuda") == 1024 and most_slots("auto", "cpu") == 256 and most_slots(64, "cuda") == 64
    many = report(*short, "data.train_batch_size=512", prompt_tokens=50).phases["sampling"]["KV cache"]
    gpu = report(*short, "data.train_batch_size=512", prompt_tokens=50, on="cuda").phases["sampling"]["KV cache"]
    assert many // token < 256 * 32 + 150 * 64 and gpu // token >= 1024 * 32 + 256 * 50
    some, more = (report(*short, on="cuda", prompt_tokens=n).phases["sampling"]["prefill"] for n in (20, 80))
    assert 0 < some < more < 6 * some, "the hidden states of 8 prompts"
    assert report(*short, prompt_tokens=80).phases["sampling"]["prefill"] == 0, "small on a CPU: 2,048 tokens"
    few = report(*short, "rollout.max_slots=8", prompt_tokens=50).phases["sampling"]["KV cache"]
    tight = report(*short, "rollout.kv_memory_gib=0.001", prompt_tokens=50).phases["sampling"]["KV cache"]
    assert tight <= 0.001 * GIB and few < full


def test_settings_that_save_memory_lower_the_report():
    usual = report("optim.micro_batch_tokens=8192")
    smaller = report("optim.micro_batch_tokens=1024")
    again = report("optim.micro_batch_tokens=8192", "model.gradient_checkpointing=true")
    for less in (smaller, again):
        assert less.phases["updating"]["activations"] < 0.7 * usual.phases["updating"]["activations"]
    assert usual.peak_phase == "updating" and "optim.micro_batch_tokens" in usual.cure()
    assert "change optim.micro_batch_tokens" in report_text(usual, usual.peak - 1) and "it fits" in report_text(
        usual, usual.peak
    )
    assert "activations" in usual.summary() and f"{usual.peak / GIB:.3g} GiB" in usual.summary()


def test_the_command_needs_no_weights(run_program, tmp_path):
    """A folder with a config.json of four billion parameters and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4,
        "num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 32000,
    }))  # fmt: skip
    args = (f"model.path={tmp_path}", "optim.micro_batch_tokens=4096", "data.train_batch_size=16")
    done = run_program("-m", "gspo.memory", "--ranks", "8", "--on", "cuda", "--have", "12", *args)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4.42 billion parameters, bf16, 8 x cuda" in done.stdout
    assert "12.000: it does not fit" in done.stdout and "change " in done.stdout


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.tensor_model_parallel_size=3"], "tensor_model_parallel_size = 3 does not divide the 2 processes"),
        (["rollout.weights=share"], "rollout.weights = 'share' is not possible"),
        (["rollout.kv_memory_gib=1e-7"], "rollout.kv_memory_gib: the keys and values of one response"),
        (["model.shard_size=4"], "model.shard_size = 4 does not divide"),
    ],
)
def test_a_run_that_would_be_refused_has_no_report(overrides, says):
    with pytest.raises(UserError, match=says):
        report(*overrides, ranks=2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["model.path=nothing-here"], "nothing-here"),
        (["--ranks", "0"], "--ranks 0: must be 1 or more"),
        (["--have", "nan"], "--have nan: must be"),
        (["--have", "-1"], "--have -1: must be"),
        (["model.path={tmp}"], "of the type t5, for which transformers has no causal language model"),
        (["model.shard_size=3", "--ranks", "2", "rollout.n=4"], "model.shard_size = 3 does not divide"),
        (["trainer.n_gpus=2", "rollout.tensor_model_parallel_size=4"], "does not divide the 2 processes"),
    ],
)
def test_mistakes_name_the_value_and_the_place(flags, says, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    flags = [f.format(tmp=tmp_path) for f in flags]
    monkeypatch.setattr("sys.argv", ["memory", "--config", "configs/quick.yaml", *flags])
    with pytest.raises(UserError, match=re.escape(says)):
        main()


def prepare(folder, model):
    """A model with the embedded tokenizer that hardly ever ends an answer, rows of one length, rewards that differ."""
    tokenizer = load_tokenizer(None)
    if model is not None:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": "x + 5 = 1" + "2" * 90, "ground_truth": "7"} for _ in range(16)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "reward.py").write_text("def compute_score(solution_str, **_):\n    return len(solution_str) % 8 / 8\n")
    return f"data.train_files=[{folder / 'rows.json'}]", f"reward.path={folder / 'reward.py'}"


@pytest.mark.timeout(6000)
@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, ("model.precision=fp32", "optim.micro_batch_tokens=1200"), id="fp32", marks=pytest.mark.slow),
        pytest.param(
            1,
            ("model.precision=bf16", "model.gradient_checkpointing=true", "optim.epochs_per_rollout=2"),
            id="bf16, checkpointed, several steps",
            marks=pytest.mark.hour,
        ),
        pytest.param(
            2, ("model.precision=fp32", "optim.micro_batch_tokens=600"), id="two ranks", marks=pytest.mark.hour
        ),
    ],
)
def test_the_report_is_within_15_percent_of_the_measured_peak(run_program, tmp_path, ranks, overrides):
    """17 million parameters, where what is counted outweighs what is not."""
    model = tiny_model("llama", **MEDIUM)
    model.config.eos_token_id = model.generation_config.eos_token_id = load_tokenizer(None).eos_token_id
    files = prepare(tmp_path, model)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ()
    done = run_program(
        *launcher, "tests/programs/peak_memory.py", tmp_path, f"model.path={tmp_path / 'model'}", *files, *overrides,
        env={**PROGRAM_ENV, "MALLOC_MMAP_THRESHOLD_": "65536"}, timeout=5000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert abs(result["reported"] / result["measured"] - 1) <= 0.15, done.stdout


LORA = "model.lora={rank: 4}"
ADAPTER = (
    4 * 3 * (4 * (128 + 128) + 3 * (128 + 352))
)  # rank x layers x (inputs + outputs) of four products and an MLP's three


def report_of(*overrides, ranks=1, precision="fp32"):
    return footprint(
        load_config(None, [*SMALL, "rollout.max_new_tokens=32", *overrides]), ranks, "cpu", precision, 2**40, 20
    )


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_with_an_adapter_the_base_is_held_once_beside_the_samplers_copy(ranks):
    pytest.importorskip("peft")
    whole, found = report_of(ranks=ranks), report_of(LORA, ranks=ranks)
    assert found.parameters == whole.parameters and "reference" not in found.resident
    assert found.resident["weights"] == 4 * found.parameters // ranks
    assert found.resident["adapters"] == 2 * 4 * ADAPTER // ranks, "the policy's and the opponent's"
    assert found.resident["optimizer"] == 8 * ADAPTER // ranks
    assert found.resident["sampler's copy"] == 4 * found.parameters
    assert found.phases["updating"]["gradients"] == 4 * ADAPTER // ranks
    assert found.resident["checkpoint"] == 4 * 4 * ADAPTER // ranks, "moments and two adapters"
    assert found.peak < whole.peak
    never = report_of(LORA, "reference.refresh=never", ranks=ranks)
    assert never.resident["adapters"] == 4 * ADAPTER // ranks, "the reference is the base"


@pytest.mark.slow
def test_a_base_in_bf16_takes_half_and_its_adapter_does_not():
    pytest.importorskip("peft")
    whole, found = report_of(precision="bf16"), report_of(LORA, precision="bf16")
    assert found.resident["weights"] == whole.resident["reference"] < 4 * found.parameters
    assert found.resident["adapters"] == 2 * 4 * ADAPTER
