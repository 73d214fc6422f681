"""Divide the linear layers of a sampler among ranks, by the plan that transformers publishes for the model.

A rank computes some of the output features of a layer of columns (queries, keys, values, gate, up) and hands them to a
layer of rows (output, down), of which it has the matching input features; the sum over the ranks is the result. That is
one all-reduce after attention and one after the MLP (Megatron-LM, arXiv 1909.08053). Everything else every rank
computes whole.

Parameters are DTensors, so that weights flow into them like into any other shards (move_weights.py). The layers
themselves multiply plain tensors: a DTensor's dispatch would cost the host more at every token than the product costs
the GPU, and a CUDA graph holds plain kernels and NCCL's alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from gspo.distributed.world import World
from gspo.errors import UserError
from gspo.models.loading import text_decoder


def shard_sampler(model: nn.Module, world: World, tp: int) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """Move a sampler to the device; with tp > 1, divide it among `tp` neighbouring ranks.

    Return the model and, with tp > 1, a function that gives all `tp` ranks the tokens that the first of them sampled.
    """
    model.requires_grad_(False)
    if tp == 1:
        return model.to(world.device), None
    mesh = init_device_mesh(world.device.type, (world.size // tp, tp), mesh_dim_names=("dp", "tp"))["tp"]
    model.to(world.device)
    decoder = text_decoder(model)
    plan = model.config.get_text_config().base_model_tp_plan
    for name, module in decoder.named_modules():
        style = plan.get(_with_stars(name))
        if style in ("colwise", "rowwise") and isinstance(module, nn.Linear):
            _divide(module, style, mesh)
    group, source = mesh.get_group(), dist.get_global_rank(mesh.get_group(), 0)

    def agree(tokens: Tensor) -> Tensor:
        dist.broadcast(tokens, src=source, group=group)
        return tokens

    return model, agree


def _with_stars(name: str) -> str:
    """Return a module's name as plans have it: `layers.*.mlp.up_proj`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _divide(layer: nn.Linear, style: str, mesh: DeviceMesh) -> None:
    """Keep this rank's part of a linear layer, and compute with that alone."""
    columns = style == "colwise"
    layer.weight = _part(layer.weight, mesh, Shard(0 if columns else 1))
    if layer.bias is not None:
        layer.bias = _part(layer.bias, mesh, Shard(0) if columns else Replicate())
    weight, bias = layer.weight.to_local(), None if layer.bias is None else layer.bias.to_local()
    assert weight.data_ptr() == layer.weight.to_local().data_ptr()  # what is copied to the parameter is seen here
    layer.forward = partial(F.linear, weight=weight, bias=bias) if columns else partial(_rows, weight, bias, mesh)


def _part(whole: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """Return this rank's part of a parameter that every rank has whole, as a parameter sharded over the mesh."""
    part = whole.data
    if isinstance(placement, Shard):
        part = part.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].clone()
    return nn.Parameter(DTensor.from_local(part, mesh, [placement], run_check=False), requires_grad=False)


def _rows(weight: Tensor, bias: Tensor | None, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """Return the sum over the ranks of what each makes of its input features, plus the bias."""
    y = F.linear(x, weight)
    dist.all_reduce(y, group=mesh.get_group())
    return y if bias is None else y + bias


def check_tensor_parallel(model_config: Any, world_size: int, tp: int) -> None:
    """Raise UserError unless `tp` divides the number of ranks and the model's heads and layers."""
    if tp == 1:
        return
    c, key = model_config.get_text_config(), f"rollout.tensor_model_parallel_size = {tp}"
    if world_size % tp:
        raise UserError(
            f"{key} does not divide the {world_size} processes of this run; start torchrun with a multiple."
        )
    if not getattr(c, "base_model_tp_plan", None):
        raise UserError(f"{key}: transformers publishes no tensor-parallel plan for {c.model_type}; use 1.")
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    if c.num_attention_heads % tp or heads % tp or c.intermediate_size % tp:
        raise UserError(
            f"{key} does not divide this model's {c.num_attention_heads} attention heads, {heads} key-value heads and "
            f"MLP width of {c.intermediate_size}; use a number that divides all three."
        )
