"""Plan slots and pages: how many responses can be generated at the same time in the memory there is."""

from pathlib import Path
from typing import Literal

import torch

from gspo.errors import UserError
from gspo.rollout.kv_pages import PAGE, Layer, Plan, pages_for
from gspo.system.torchrun import local_world_size

SHARE = 0.5  # of what is free, where `rollout.kv_memory_gib` is auto
# Slots where `rollout.max_slots` is auto. A GPU's step of a small model takes hardly longer for 1,024 than for 256: it
# is bound by its launches. On a CPU steps only grow longer.
AUTO_SLOTS = {"cuda": 1024, "cpu": 256}
WASTE = 1.125  # tokens of the prompts' pages may grow so many times for larger pages
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process can still take on the device; a machine's processes share its RAM equally."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(info["MemAvailable"].split()[0]) * 1024
    try:  # a container's limit, where there is one
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        free = min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    return free // local_world_size()


def response_page_size(longest: int) -> int:
    """Return PAGE, or less where responses of at most `longest` tokens would leave most of a page empty: all of it is
    read."""
    return min(PAGE, max(16, 1 << (longest - 1).bit_length()))


def prompt_page_size(sizes: list[int], page: int) -> int:
    """Return `page` or a multiple, up to 8 PAGE, if prompts of these sizes leave hardly more of such pages empty.

    Larger pages make larger matrix products, and fewer parts to merge.
    """

    def tokens(width: int) -> int:
        return sum(pages_for(size, width) * width for size in sizes)

    widths = [page]
    while 2 * widths[-1] <= 8 * max(page, PAGE):
        widths.append(2 * widths[-1])
    return max(width for width in widths if tokens(width) <= WASTE * tokens(page))


def most_slots(max_slots: int | Literal["auto"], device: str) -> int:
    """Return the most slots that a rank may use on a kind of device, cpu or cuda, if its memory holds so many."""
    return AUTO_SLOTS.get(device, AUTO_SLOTS["cpu"]) if max_slots == "auto" else max_slots


def plan_slots(
    layout: dict[int, Layer],
    sizes: list[int],
    n: int,
    longest: int,
    max_slots: int,
    budget: int,
    page: int = PAGE,
    rows: int | None = None,
) -> Plan:
    """Plan as many slots as `budget` bytes hold keys and values for, at most `max_slots`.

    `sizes` are the prompts' tokens, `n` the fewest responses to one of them, `rows` all responses (None: n to each).
    Pages are planned for half as many prompts again as the slots need at one time, as a prompt whose last response is
    long stays while others come. Raises UserError where not even one response fits.
    """
    token_bytes = sum(layer.token_bytes for layer in layout.values())
    wide = prompt_page_size(sizes, page)
    largest, each = sorted(sizes, reverse=True), pages_for(max(1, longest - 1), page)

    def prompt_pages(slots: int) -> int:
        here = -(-slots // n)
        return sum(pages_for(size, wide) for size in largest[: here + here // 2])

    def need(slots: int) -> int:
        return (prompt_pages(slots) * wide + slots * each * page) * token_bytes

    low, high = 0, min(max_slots, len(sizes) * n if rows is None else rows)
    while low < high:  # the most that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= budget else (low, middle - 1)
    if low == 0:
        raise UserError(
            f"rollout.kv_memory_gib: the keys and values of one response of {longest} tokens to a prompt of "
            f"{largest[0]} need {need(1) / 2**30:.3g} GiB, and there are {budget / 2**30:.3g}. Raise it, or lower "
            "rollout.max_new_tokens or data.max_prompt_length."
        )
    return Plan(low, prompt_pages(low), low * each, page, wide)
