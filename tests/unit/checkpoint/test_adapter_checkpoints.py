"""Checkpoints of a run with model.lora: small, complete, opened by peft and by eval, sample and export."""

import json
import shutil

import pytest
import torch
from repository import ROOT

peft = pytest.importorskip("peft")

from adapted_models import WORLD, adapted, in_peft, move  # noqa: E402
from saved_run import ALONE, ORDER  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from gspo.algorithm.update import make_optimizer  # noqa: E402
from gspo.checkpoint import fingerprints  # noqa: E402
from gspo.checkpoint.adapter_checkpoints import load_policy  # noqa: E402
from gspo.checkpoint.checkpoints import Checkpoints, State  # noqa: E402
from gspo.checkpoint.restore import restore  # noqa: E402
from gspo.checkpoint.run_folder import open_run  # noqa: E402
from gspo.embedded import MODEL_DIR  # noqa: E402
from gspo.errors import UserError  # noqa: E402
from gspo.export import export  # noqa: E402
from gspo.models.loading import load_model, load_model_config  # noqa: E402
from gspo.models.safetensors_files import open_weights, write_weights  # noqa: E402
from gspo.read_config import load_config  # noqa: E402

IDS = torch.arange(2, 40)[None]
LORA = "model.lora={rank: 4, alpha: 12}"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(models, tokens=(3, 9, 8)):
    """Take a step of AdamW; return the optimizer."""
    optimizer = make_optimizer(models.policy, models.cfg)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    for _ in range(2):  # the first moves B alone
        models.policy(input_ids=torch.tensor([tokens])).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A run that was saved after a round -> (its models, optimizer, checkpoint); its base lies beside it."""
    home = tmp_path_factory.mktemp("adapted")
    shutil.copytree(MODEL_DIR, home / "base")
    settings = [LORA, f"trainer.output_dir={home}", f"model.path={home / 'base'}", "reference.refresh=round"]
    models = adapted(*settings[1:])
    optimizer = trained(models)
    models.new_opponent()
    move(models, seed=3, size=0.02)
    cfg = load_config("configs/quick.yaml", settings)
    folder, _ = open_run(cfg, ALONE, {"model.path": fingerprints.of_model(cfg.model.path)})
    checkpoints = Checkpoints(folder, cfg, tokenizer, ALONE)
    checkpoints.save(State(step=4), models.trained, optimizer, models.frozen_to_keep(), {"order": ORDER}, at_once=True)
    return models, optimizer, folder / "checkpoints" / "step_000004"


def test_it_holds_the_adapters_and_their_moments_and_nothing_of_the_base(saved):
    models, _, step = saved
    assert {p.name for p in step.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert {p.name for p in (step / "trainer").glob("*.safetensors")} == {
        "opponent.safetensors", "optimizer.safetensors", "order.safetensors",
    }  # fmt: skip
    numbers = sum(p.numel() for p in models.trained.parameters())
    held = sum(p.stat().st_size for p in step.rglob("*.safetensors"))
    assert held < 4 * numbers * 4 + 40_000, "policy, opponent and two moments in float32"
    config = json.loads((step / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (4, 12, "LORA", "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str((step.parents[2] / "base").resolve())


def test_a_run_that_goes_on_has_every_bit(saved):
    models, optimizer, step = saved
    again = adapted(f"model.path={models.cfg.model.path}", "reference.refresh=round")
    from gspo.algorithm.self_play_models import SelfPlayModels

    again = SelfPlayModels(again.cfg, WORLD, weights_from=step)
    theirs = make_optimizer(again.policy, again.cfg)
    restore(step, again.trained, theirs, again.frozen_to_keep(), State())
    mine, found = (dict(m.policy.named_parameters()) for m in (models, again))
    assert mine.keys() == found.keys() and all(mine[name].equal(found[name]) for name in mine)
    assert not mine["model.layers.0.mlp.up_proj.lora_B.policy.weight"].equal(
        mine["model.layers.0.mlp.up_proj.lora_B.opponent.weight"]
    )
    for name, p in mine.items():
        assert optimizer.state[p].keys() == theirs.state[found[name]].keys()
        assert all(x.equal(theirs.state[found[name]][key]) for key, x in optimizer.state[p].items())


def test_peft_and_transformers_open_the_checkpoint_with_equal_logits(saved):
    models, _, step = saved
    base = AutoModelForCausalLM.from_pretrained(models.cfg.model.path)
    expected = logits(in_peft(models))
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, step)), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(step)), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(expected, logits(load_model(None)), atol=0.1), "it has been trained"


def test_a_merged_policy_is_opened_in_the_precision_that_samples(saved):
    models, _, step = saved
    models.refresh_sampler()
    torch.testing.assert_close(logits(load_policy(str(step))), logits(models.sampler), rtol=1e-5, atol=1e-5)
    half = load_policy(str(step), torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_export_writes_the_merged_model_in_float32_and_in_what_was_asked_for(saved, tmp_path):
    models, _, step = saved
    assert export(step.parent, tmp_path / "out") == step
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.float32
    expected = logits(in_peft(models).merge_and_unload())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not [*(tmp_path / "out").glob("adapter*")]
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    export(step, tmp_path / "half", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_export_writes_the_adapter_itself_for_peft(saved, tmp_path):
    models, _, step = saved
    export(step, tmp_path / "out", as_adapter=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert not {"trainer", "manifest.json", "config.json"} & {p.name for p in (tmp_path / "out").iterdir()}
    base = AutoModelForCausalLM.from_pretrained(models.cfg.model.path)
    found = logits(peft.PeftModel.from_pretrained(base, tmp_path / "out"))
    torch.testing.assert_close(found, logits(in_peft(models)), rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="is a whole model, no adapter.*Leave --adapter out"):
        export(MODEL_DIR, tmp_path / "other", as_adapter=True)


def copy_of(step, tmp_path):
    """A copy of the run and its base, to change."""
    shutil.copytree(step.parents[2], tmp_path / "all")
    copied = tmp_path / "all" / step.relative_to(step.parents[2])
    file = copied / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "all" / "base")}
    file.write_text(json.dumps(config))
    (copied / "manifest.json").unlink()
    return copied


def test_a_base_that_is_gone_or_another_is_an_error_that_names_it(saved, tmp_path):
    step = copy_of(saved[2], tmp_path)
    load_policy(str(step))
    base = tmp_path / "all" / "base"
    weights = open_weights(base)
    changed = {name: weights.read(name).clone() * 1.01 for name in weights.names}
    write_weights(base / "model.safetensors", changed)
    for opened in (load_policy, lambda name: export(step, tmp_path / "out")):
        with pytest.raises(
            UserError, match="adapter of '.*base'.*does not hold the model any more.*Put that model back"
        ):
            opened(str(step))
    shutil.rmtree(base)
    with pytest.raises(UserError, match="adapter of '.*base'.*nothing at that place.*ln -s BASE"):
        load_policy(str(step))


def test_an_adapter_of_another_kind_or_shape_is_refused(saved, tmp_path):
    step = copy_of(saved[2], tmp_path)
    file = step / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora = True.*Merge it by peft"):
        load_policy(str(step))
    file.write_text(json.dumps(config))
    weights = open_weights(step, "adapter_model")
    tensors = {name: weights.read(name).clone() for name in weights.names}
    name = next(name for name in tensors if name.endswith("up_proj.lora_A.weight"))
    write_weights(step / "adapter_model.safetensors", tensors | {name: tensors[name][:, 1:].contiguous()})
    with pytest.raises(UserError, match="up_proj an adapter of .* does not fit the weight"):
        load_policy(str(step))
    write_weights(step / "adapter_model.safetensors", tensors | {name: tensors[name] / 0})
    with pytest.raises(UserError, match="not finite"):
        load_policy(str(step))


def test_it_is_no_model_to_train(saved):
    with pytest.raises(UserError, match=r"checkpoint of a run with model.lora.*trainer.resume.*gspo.export"):
        load_model_config(str(saved[2]))


RESUMED = {
    "": "checkpoint of an adapter, and model.lora is empty.*model.lora={rank: 4, alpha: 12}.*gspo.export",
    "model.lora={rank: 8, alpha: 12}": "rank 4 and alpha 12, and model.lora has rank 8",
    "model.lora={rank: 4, alpha: 12, targets: [q_proj]}": "does not hold the adapter of model.lora",
    LORA: None,
}


@pytest.mark.parametrize("setting", RESUMED)
def test_another_run_begins_from_it_with_the_same_setting_only(saved, tmp_path, setting):
    settings = [f"trainer.output_dir={tmp_path}", f"trainer.resume={saved[2]}", f"model.path={saved[0].cfg.model.path}"]
    cfg = load_config("configs/quick.yaml", [*settings, *([setting] if setting else [])])

    def begin():
        from gspo.algorithm.self_play_models import SelfPlayModels

        SelfPlayModels(cfg, WORLD, weights_from=open_run(cfg, ALONE)[1])

    if RESUMED[setting] is None:
        return begin()
    with pytest.raises(UserError, match=RESUMED[setting]):
        begin()


def test_an_adapter_goes_on_with_its_own_base_only_and_not_from_a_whole_model(saved, tmp_path, tokenizer):
    settings = [f"trainer.output_dir={tmp_path}", LORA]
    other = load_config("configs/quick.yaml", [*settings, f"trainer.resume={saved[2]}", f"model.path={ROOT / 'none'}"])
    other.model.path = str(_another_model(tmp_path))
    with pytest.raises(UserError, match="holds an adapter of '.*base', and model.path = '.*other' holds another model"):
        open_run(other, ALONE)
    from saved_run import a_run

    whole = a_run(tmp_path / "whole", tokenizer).save(2)
    with pytest.raises(UserError, match="trained all weights, and model.lora is set.*model.path="):
        open_run(load_config("configs/quick.yaml", [*settings, f"trainer.resume={whole}"]), ALONE)


def _another_model(tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "other")
    weights = open_weights(MODEL_DIR)
    write_weights(
        tmp_path / "other" / "model.safetensors", {name: weights.read(name).clone() * 1.5 for name in weights.names}
    )
    return tmp_path / "other"
