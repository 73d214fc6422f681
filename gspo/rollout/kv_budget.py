"""How many answers can be generated at the same time in the memory there is."""

from pathlib import Path

import torch

from gspo.errors import UserError
from gspo.rollout.pages import PAGE, Layer, Plan, pages_for
from gspo.system.torchrun import local_world_size

SHARE = 0.5  # of what is free, where `rollout.kv_memory_gib` is auto
MOST = 1024  # slots, where `rollout.max_slots` is auto: beyond it steps only grow longer
WASTE = 1.125  # of the prompts' pages, for larger ones
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on the device; processes of one machine share its own equally."""
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


def answer_page_size(longest: int) -> int:
    """PAGE, or less where answers of at most `longest` tokens would leave most of it empty: all of a page is read."""
    return min(PAGE, max(16, 1 << (longest - 1).bit_length()))


def prompt_page_size(sizes: list[int], page: int) -> int:
    """`page`, or a multiple, up to 8 PAGE, where prompts of these sizes leave hardly more of such pages empty.

    Larger pages make larger matrix products, and less to merge.
    """
    kept = lambda width: sum(pages_for(size, width) * width for size in sizes)  # noqa: E731
    widths = [page]
    while 2 * widths[-1] <= 8 * max(page, PAGE):
        widths.append(2 * widths[-1])
    return max(width for width in widths if kept(width) <= WASTE * kept(page))


def plan_slots(
    layout: dict[int, Layer],
    sizes: list[int],
    n: int,
    longest: int,
    max_slots: int | None,
    budget: int,
    page: int = PAGE,
) -> Plan:
    """As many slots as `budget` bytes hold keys and values for, at most `max_slots`.

    `sizes` are the prompts' tokens, of which half as many again are kept as the slots need at one time: prompts whose
    last answer is long stay while others come. Raises UserError where not even one answer fits.
    """
    token_bytes = sum(layer.token_bytes for layer in layout.values())
    wide = prompt_page_size(sizes, page)
    largest, each = sorted(sizes, reverse=True), pages_for(max(1, longest - 1), page)

    def prompt_pages(slots: int) -> int:
        here = -(-slots // n)
        return sum(pages_for(size, wide) for size in largest[: here + here // 2])

    def need(slots: int) -> int:
        return (prompt_pages(slots) * wide + slots * each * page) * token_bytes

    low, high = 0, min(MOST if max_slots is None else max_slots, len(sizes) * n)
    while low < high:  # the most that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= budget else (low, middle - 1)
    if low == 0:
        raise UserError(
            f"rollout.kv_memory_gib: the keys and values of one answer of {longest} tokens to a prompt of {largest[0]} "
            f"need {need(1) / 2**30:.3g} GiB, and there are {budget / 2**30:.3g}. Raise it, or lower "
            "rollout.max_new_tokens or data.max_prompt_length."
        )
    return Plan(low, prompt_pages(low), low * each, page, wide)
