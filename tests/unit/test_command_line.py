"""Command lines: every unknown flag is named, with what may be meant, and nothing that is given is passed over."""

import argparse
import importlib
import re

import pytest

from gspo.command_line import EVERY, parse_arguments
from gspo.errors import UserError


@pytest.fixture()
def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--stop", nargs="+")
    parser.add_argument("overrides", nargs="*")
    return parser


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["--rollout_n", "4"], "write rollout.n=4."),
        (["--rollout.n=4", "--check"], "write rollout.n=4."),
        (["trainer.seed=1", "--learning-rate", "1e-5"], "write optim.learning_rate=1e-5."),
        (["--rollout_n", "--check"], "write rollout.n=VALUE."),
        (["--reward.reward_kwargs.k", "a b"], "write 'reward.reward_kwargs.k=a b'."),
        (["--num_train_epochs=2", "--per_device_train_batch_size", "4"], "per_device_train_batch_size=4."),
        (["--rollout_m", "4"], "there is no flag --rollout_m (rollout.n=4?)."),
        (["--n", "4"], "--n (rollout.n=4, eval.n=4?)"),
        (["-t", "4"], "there is no flag -t."),
        (["--zzz", "--chekc", "--lr=1", "--temprature", "3", "--top_p", ".9"],
         "there is no flag --zzz, --chekc (--check?), --temprature (--temperature?). And --lr, --top_p: parameters are "
         "no flags here (but of train.sh); write optim.learning_rate=1 rollout.top_p=.9. --help lists"),
        (["—check"], "there is no flag —check (--check?)"),
    ],
)  # fmt: skip
def test_flags_that_are_none_are_named_with_what_may_be_meant(parser, given, written):
    with pytest.raises(UserError, match=re.escape(written)):
        parse_arguments(parser, given, EVERY)


def test_what_is_no_flag_stays(parser):
    given = ["a=1", "--check", "b=2", "--temp", "-1", "--stop", "- x", "—", "-3", "—no flag", "—other"]
    found = parse_arguments(parser, given, EVERY)
    assert found.check and found.temperature == -1 and found.stop == ["- x", "—", "-3", "—no flag", "—other"]


def test_a_program_guesses_only_at_parameters_that_it_takes(parser):
    with pytest.raises(UserError, match=re.escape("no flag --lr, --top_k. --help lists the flags.") + "$"):
        parse_arguments(parser, ["--lr", "1", "--top_k", "3"])
    with pytest.raises(UserError, match="no flag --lr. And --top_k: .*write rollout.top_k=3"):
        parse_arguments(parser, ["--lr", "1", "--top_k", "3"], re.compile("rollout.*"))


@pytest.mark.parametrize(
    "module",
    ["train", "eval", "gspo.sample", "gspo.samples", "gspo.compare", "gspo.plot", "gspo.report.__main__", "gspo.export"]
    + ["gspo.convert_data", "gspo.check_data", "gspo.memory.__main__", "gspo.parameters"],
)
def test_every_program_names_all_unknown_flags_before_it_misses_others(monkeypatch, module):
    monkeypatch.setattr("sys.argv", ["program", "--zzz", "3", "--yyy=1", "-q"])
    with pytest.raises(UserError, match=r"there is no flag --zzz, --yyy, -q\. --help"):
        importlib.import_module(module).main()
