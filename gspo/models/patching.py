"""Patch attributes of transformers' models, modules and classes; no other file does. All patches in use:

For the time of a `with` block, by `replaced`:
    attention_support.attention_implementation
                                            config._attn_implementation: attention by a function of ours
    rollout/cpu_weight_layout.laid_out_weights
                                            nn.Linear.forward of each layer: weights laid out once for many products
    rollout/shared_products                 nn.Linear.forward of layers that are given one tensor: one product for all
    rollout/decoder_stack.fused_stack       decoder layers' forward: all layers by one call of a kernel
    distributed/sharded_loading             nn.Module.register_parameter: parameters on the meta device

For good, by `replace`; each calls what it replaced unless it can do better:
    kernel_layers.install_layer_kernels     forward of norms, gated MLPs and decoder layers, and the modelling file's
                                            function `apply_rotary_pos_emb`: kernels, in forwards of ours only
    loading.checkpoint_activations          decoder layers' forward: activations are recomputed in the backward pass
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Replacement = tuple[Any, str, Any]  # (owner, name of its attribute, the new value)


def replace(owner: Any, name: str, value: Any) -> None:
    """Set `owner.name` to `value` for good."""
    setattr(owner, name, value)


@contextmanager
def replaced(replacements: Iterable[Replacement]) -> Iterator[None]:
    """Make these replacements for the block, and undo them, the last one first, whatever happens inside."""
    undo: list[tuple[Any, str, bool, Any]] = []
    try:
        for owner, name, value in replacements:
            undo.append((owner, name, _is_inherited(owner, name), getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, inherited, before in reversed(undo):
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _is_inherited(owner: Any, name: str) -> bool:
    """Tell whether `owner.name` is found on the owner's class, as a method is; a property is the owner's own."""
    return name not in vars(owner) and not isinstance(getattr(type(owner), name, None), property)
