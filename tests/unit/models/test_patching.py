"""What is replaced for a block is restored after it, whatever happened inside."""

import pytest
from architectures import tiny_model
from torch import nn

from gspo.models.patching import replace, replaced


class Wrong(Exception):
    pass


def test_methods_own_attributes_classes_and_properties_are_restored():
    """A method of the class, a forward of the layer's own, a class's method, and a property of transformers' config."""
    model, plain = tiny_model("llama"), nn.Linear(2, 2)
    own, config = nn.Linear(2, 2), model.config
    replace(own, "forward", len)
    register = nn.Module.register_parameter
    with pytest.raises(Wrong), replaced([
        (plain, "forward", abs), (plain, "forward", max), (own, "forward", abs),
        (nn.Module, "register_parameter", abs), (config, "_attn_implementation", "eager"),
    ]):  # fmt: skip
        assert plain.forward is max and own.forward is abs and nn.Module.register_parameter is abs
        assert config._attn_implementation == "eager"
        raise Wrong
    assert "forward" not in vars(plain) and own.forward is len
    assert nn.Module.register_parameter is register and config._attn_implementation == "sdpa"


def test_what_was_replaced_before_an_error_is_restored():
    plain = nn.Linear(2, 2)
    with pytest.raises(AttributeError), replaced([(plain, "forward", abs), (plain, "no_such_name", abs)]):
        pytest.fail("the block ran")
    assert "forward" not in vars(plain)
