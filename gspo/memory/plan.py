"""Choose the settings that are `auto` by the memory forecast: the fastest that fit a GPU."""

from collections.abc import Iterator
from dataclasses import replace

from gspo.config import Config
from gspo.distributed.world import World
from gspo.memory.footprint import GIB, Footprint, available_bytes, footprint
from gspo.packing.micro_batches import token_budget

FILLED = 0.85  # of a device, up to which settings that are auto fill it
LEAST_TOKENS = 1024  # of a micro-batch that is chosen: with fewer, products hardly fill a GPU


def fit_settings(
    cfg: Config, ranks: int, device: str, precision: str, free: int, prompt_tokens: int | None = None
) -> tuple[Config, Footprint]:
    """Choose `optim.micro_batch_tokens` and `reference.param_offload` where they are auto, and how an offloaded policy
    moves -> the configuration with them, and its report.

    On a GPU the first candidate is taken whose peak leaves some memory free; else the last.
    """
    for chosen in candidates(cfg, ranks, device):
        report = footprint(chosen, ranks, device, precision, free, prompt_tokens)
        frugal = chosen.reference.param_offload or cfg.reference.param_offload is False
        if report.peak <= FILLED * free or (report.peak_phase == "sampling" and frugal):
            break  # smaller micro-batches would not help sampling
    return chosen, report


def candidates(cfg: Config, ranks: int, device: str) -> Iterator[Config]:
    """Yield settings from the fastest to those that take least. A copy to the GPU and back once a step costs less than
    smaller micro-batches, and less than one for each of them."""
    tokens, offload = cfg.optim.micro_batch_tokens, cfg.reference.param_offload
    resident = with_settings(cfg, token_budget(tokens), False)
    settled = with_settings(cfg, token_budget(tokens), offload is not False)
    fastest = [resident, settled] if device == "cuda" and offload == "auto" else [settled]
    if device == "cuda" and ranks == 1 and cfg.optim.offload:
        yield from map(crossing_once, fastest)
    yield from fastest
    fewer = token_budget(tokens) // 2
    while device == "cuda" and tokens == "auto" and fewer >= LEAST_TOKENS:
        yield with_settings(cfg, fewer, offload is not False)
        fewer //= 2


def crossing_once(cfg: Config) -> Config:
    """Return the configuration with which an offloaded policy crosses to the GPU and back once an optimizer step."""
    return replace(
        cfg,
        model=replace(cfg.model, reshard_after_forward=False),
        optim=replace(cfg.optim, gradient_reduction="step"),
    )


def with_settings(cfg: Config, micro_batch_tokens: int, param_offload: bool) -> Config:
    """Return the configuration with these."""
    return replace(
        cfg,
        optim=replace(cfg.optim, micro_batch_tokens=micro_batch_tokens),
        reference=replace(cfg.reference, param_offload=param_offload),
    )


def plan_memory(cfg: Config, world: World, precision: str, prompt_tokens: int) -> tuple[Config, str]:
    """Return the configuration with what is auto chosen, and the report in a line or two, for the start of a run on
    these devices. Every rank must call this.

    A model that cannot be run on fake tensors is no reason not to train it: the line then says so.
    """
    free, device = min(world.gather(available_bytes(world.device))), world.device.type

    def report() -> tuple[Config, str]:
        try:
            chosen, found = fit_settings(cfg, world.size, device, precision, free, prompt_tokens)
        except Exception as e:  # a model class that does more than fake tensors allow
            why = f"{type(e).__name__}: {str(e)[:200]}"
            *_, frugal = candidates(cfg, world.size, "cpu")
            return frugal, f"note: the memory of this model cannot be computed in advance ({why})"
        lines = choices(cfg, chosen) if device == "cuda" else []
        if found.peak <= free:
            return chosen, "\n".join([*lines, found.summary()])
        return chosen, "\n".join([
            *lines,
            f"warning: {found.summary()},",
            f"but only {free / GIB:.3g} GiB are free. If the run ends for lack of memory, change {found.cure()}",
        ])  # fmt: skip

    return world.broadcast_from_main(report)


def choices(cfg: Config, chosen: Config) -> list[str]:
    """Say, in a line each, what was chosen by the forecast."""
    said = []
    if cfg.reference.param_offload == "auto":
        where = "true, in CPU memory between uses" if chosen.reference.param_offload else "false, as it fits"
        said.append(f"reference.param_offload=auto: {where}")
    if chosen.optim.micro_batch_tokens != token_budget(cfg.optim.micro_batch_tokens):
        said.append(f"optim.micro_batch_tokens=auto: {chosen.optim.micro_batch_tokens:,}, by this forecast:")
    if chosen.model.reshard_after_forward != cfg.model.reshard_after_forward:
        said.append("optim.offload: weights and gradients cross once a step, not with each micro-batch, as they fit")
    return said
