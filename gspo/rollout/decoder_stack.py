"""Run all decoder layers of a model by one kernel call per decoding step (kernels/decoder_layers_cpu.py), on CPUs.

The model's class still embeds tokens, chooses rotary angles, and makes logits; the first layer's forward computes all
layers, and the others return their input. Whether the kernel computes what a model's layers do is found by trial: with
a small layer of the same class and random weights, and by the kinds of attention that were seen while prefilling.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.errors import UserError
from gspo.kernels.decoder_layers_cpu import LayerPages, LayerWeights, Sizes, Stack
from gspo.models.kernel_layers import is_gated_mlp, norm_eps, norm_offset
from gspo.models.loading import decoder_layers
from gspo.models.patching import replaced
from gspo.rollout.attention_inputs import Step
from gspo.rollout.slots import Slots

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROJECTIONS, NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj"}
_SERVED: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()  # what `stack_serves` found
HIDDEN, HEADS, KV_HEADS, WIDTH, BETWEEN = 32, 4, 2, 8, 48  # of the small layer


@contextmanager
def fused_decoder_stack(model: nn.Module, laid_out: dict[nn.Module, Tensor], slots: Slots) -> Iterator[bool]:
    """Run the model's layers as one kernel call in steps of `slots`; `laid_out` holds its linear layers' weights.

    -> whether the kernel serves them; if not, nothing changes.
    """
    layers = _layers(model) if laid_out and stack_serves(model) else []
    stack = _stack(layers, laid_out, slots) if layers else None
    if stack is None:
        yield False
        return
    forwards = [
        (layer, "forward", partial(_stack_forward, layer.forward, stack, i == 0)) for i, layer in enumerate(layers)
    ]
    with replaced(forwards):
        yield True


def _stack_forward(plain: Any, stack: Stack, first: bool, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's forward: in a decoding step the first layer computes all of them."""
    step, angles = kwargs.get("slots"), kwargs.get("position_embeddings")
    if not isinstance(step, Step) or not _can_run(stack, step, hidden, angles):
        return plain(hidden, *args, **kwargs)
    return stack(hidden, *angles, step.sequences(None), step.page, step.offset) if first else hidden


def _can_run(stack: Stack, step: Step, hidden: Tensor, angles: Any) -> bool:
    """Tell whether the kernel computes this step: angles for whole heads, and no window, soft cap or other scale."""
    shape = (len(hidden), 1, stack.sizes.width)
    whole_heads = isinstance(angles, tuple) and len(angles) == 2 and all(x.shape == shape for x in angles)
    return whole_heads and step.prompts.attention_kinds_seen == {(stack.scale, None, None)}


def _stack(layers: list[nn.Module], laid_out: dict[nn.Module, Tensor], slots: Slots) -> Stack | None:
    """Return the kernel with the layers' weights and pages; None where some weights are not laid out."""
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    if not all(m in laid_out for m in linear):
        return None
    first = layers[0].self_attn
    width = first.head_dim
    kv_heads = first.k_proj.out_features // width
    sizes = Sizes(
        first.q_proj.out_features // width,
        kv_heads,
        width,
        first.v_proj.out_features // kv_heads,
        first.q_proj.in_features,
        layers[0].mlp.gate_proj.out_features,
    )
    weights = [_weights(layer, laid_out) for layer in layers]
    numbers = [layer.self_attn.layer_idx for layer in layers]
    pages = [
        LayerPages(*(x for pool in (slots.prompts, slots.responses) for x in pool.read(i, pool.count))) for i in numbers
    ]
    return Stack(weights, pages, sizes, first.scaling, norm_eps(layers[0].input_layernorm))


def _weights(layer: nn.Module, laid_out: dict[nn.Module, Tensor]) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return LayerWeights(
        _scale(layer.input_layernorm),
        *(laid_out[m] for m in projections),
        *(None if m.bias is None else m.bias.float() for m in projections),
        *(None if m is None else _scale(m) for m in norms),
        _scale(layer.post_attention_layernorm),
        *(laid_out[m] for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def _scale(norm: nn.Module) -> Tensor:
    return norm.weight.detach().float() + norm_offset(norm)


# ---- the trial ----


def stack_serves(model: nn.Module) -> bool:
    """Tell whether kernels/decoder_layers_cpu.py computes what all layers of a model do; found once a model."""
    if model not in _SERVED:
        layers = _layers(model)
        _SERVED[model] = bool(layers) and all(_serves_layer(model, layer) for layer in layers)
    return _SERVED[model]


def _layers(model: nn.Module) -> list[nn.Module]:
    try:
        return list(decoder_layers(model))
    except UserError:  # no list of layers
        return []


def _serves_layer(model: nn.Module, layer: nn.Module) -> bool:
    """Tell whether the kernel computes what a layer does: by its parts, and by a trial of its class."""
    parts, attention = layer._modules, getattr(layer, "self_attn", None)
    if set(parts) != PARTS or set(attention._modules) not in (PROJECTIONS, PROJECTIONS | NORMS):
        return False
    norms = [parts["input_layernorm"], parts["post_attention_layernorm"], *(attention._modules.get(x) for x in NORMS)]
    norms = [m for m in norms if m is not None]
    if any(norm_offset(m) is None or norm_eps(m) != norm_eps(norms[0]) for m in norms):
        return False
    mlp_parts = set(layer.mlp._modules) - {"act_fn"}
    if not is_gated_mlp(layer.mlp) or mlp_parts != MLP or layer.mlp.down_proj.bias is not None:
        return False
    if getattr(attention, "sliding_window", None) or any(True for _ in layer.parameters(recurse=False)):
        return False
    return _small_layer_agrees(model, layer)


@torch.no_grad()
def _small_layer_agrees(model: nn.Module, layer: nn.Module) -> bool:
    """Compare a small layer of the same class, with random weights, with the kernel's formula."""
    config = copy.deepcopy(model.config.get_text_config())
    for name, value in {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH,
        "intermediate_size": BETWEEN,
        "_attn_implementation": "eager",
    }.items():
        setattr(config, name, value)
    g = torch.Generator().manual_seed(0)
    x, cos, sin = torch.randn(1, 5, HIDDEN, generator=g), *torch.randn(2, 1, 5, WIDTH, generator=g)
    hidden = torch.full((5, 5), -torch.inf).triu(1)[None, None]
    try:
        small = type(layer)(config, layer.self_attn.layer_idx).float().eval()
        for p in small.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
        found = small(x, attention_mask=hidden, position_embeddings=(cos, sin), position_ids=torch.arange(5)[None])
        return isinstance(found, Tensor) and torch.allclose(
            found, _formula(small, x, cos, sin, hidden), rtol=1e-4, atol=1e-4
        )
    except Exception:  # built or called in another way: not a layer that the kernel serves
        return False


def _formula(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, hidden: Tensor) -> Tensor:
    """Compute what kernels/decoder_layers_cpu.py does, for a whole sequence x [1, T, K]."""
    attention, mlp = layer.self_attn, layer.mlp

    def norm(m: nn.Module | None, y: Tensor) -> Tensor:
        return y if m is None else F.rms_norm(y, y.shape[-1:], m.weight + norm_offset(m), norm_eps(m))

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (-1, WIDTH)).transpose(1, 2)

    def turn(y: Tensor) -> Tensor:
        low, high = y.chunk(2, -1)
        return y * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    n = norm(layer.input_layernorm, x)
    q = turn(norm(getattr(attention, "q_norm", None), heads(attention.q_proj(n))))
    k = turn(norm(getattr(attention, "k_norm", None), heads(attention.k_proj(n))))
    v = heads(attention.v_proj(n))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=attention.scaling, enable_gqa=True)
    x = x + attention.o_proj(found.transpose(1, 2).flatten(2))
    n = norm(layer.post_attention_layernorm, x)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(n)) * mlp.up_proj(n))
