"""Join the process group and exchange Python objects and rows between ranks. On one process all works the same."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from gspo.distributed.failures import leave
from gspo.errors import UserError
from gspo.system import torchrun
from gspo.system.devices import choose_device, device_name
from gspo.system.malloc import keep_freed_memory


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run. `mesh` is None when there is no process group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def places(self, count: int, tp: int = 1) -> list[int]:
        """Return the places, of `count` in the global batch, that this rank samples and scores: every size-th one.

        With tp > 1, those of the `tp` ranks that share one sampler. Which rank trains on a group is decided later, by
        the lengths of the responses (packing/balance.py).
        """
        first = self.rank - self.rank % tp
        return [place for place in range(count) if first <= place % self.size < first + tp]

    def devices(self) -> str:
        """Return what the ranks compute on: `8 x NVIDIA H100 80GB HBM3`, `CPU, 2 threads`."""
        names = Counter(self.gather(device_name(self.device)))
        return " and ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())

    def max(self, value: int) -> int:
        """Return the largest of the ranks' values, on every rank."""
        return max(self.gather(value))

    def sum(self, value: float) -> float:
        """Return the sum of the ranks' values, on every rank."""
        return sum(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """Return [value of rank 0, value of rank 1, ...], on every rank. Values are pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_to_all(self, parcels: list[Any]) -> list[Any]:
        """Send parcels[r] to rank r. Return [what rank 0 sent to this one, what rank 1 sent, ...]; None sends no bytes.

        Each object crosses the network once, from its rank to the one that gets it. Tensors must be on the CPU.
        """
        if self.size == 1:
            return parcels
        outgoing = [b"" if r == self.rank or x is None else pickle.dumps(x) for r, x in enumerate(parcels)]
        sent_bytes = torch.tensor([len(x) for x in outgoing])
        received_bytes = torch.empty_like(sent_bytes)
        dist.all_to_all_single(received_bytes, sent_bytes)
        received = torch.empty(int(received_bytes.sum()), dtype=torch.uint8)
        sent = torch.frombuffer(bytearray(b"".join(outgoing)), dtype=torch.uint8) if sent_bytes.any() else received[:0]
        dist.all_to_all_single(received, sent, received_bytes.tolist(), sent_bytes.tolist())
        pieces = received.split(received_bytes.tolist())
        unpacked = [pickle.loads(memoryview(x.numpy())) if len(x) else None for x in pieces]
        unpacked[self.rank] = parcels[self.rank]
        return unpacked

    def gather_rows(self, places: list[int], rows: Tensor) -> Tensor:
        """Return every rank's rows [G, ...] in the order of their `places`, on the CPU of every rank."""
        pairs = [pair for part in self.gather((places, rows.cpu())) for pair in zip(*part, strict=True)]
        return torch.stack([row for _, row in sorted(pairs, key=lambda pair: pair[0])])

    def main_process_first(self, make: Callable[[], Any]) -> Any:
        """Return make() of this rank; rank 0 runs it before the others do. A UserError on rank 0 is raised on all."""
        mine = []
        self.broadcast_from_main(lambda: mine.append(make()))
        return mine[0] if mine else make()

    def broadcast_from_main(self, make: Callable[[], Any]) -> Any:
        """Run `make` on rank 0 only and return its result on every rank. A UserError there is raised on all."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [(make(), None)]
            except UserError as e:
                outcome = [(None, str(e))]
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error is not None:
            raise UserError(error)
        return result


def _store_of_this_attempt() -> dist.Store:
    """Return torchrun's store, in which ranks publish their addresses, with a key prefix for each restart.

    The store outlives a restart. Without the prefix, a rank that starts faster than the others would read addresses of
    processes that have ended.
    """
    store, _, _ = next(rendezvous("env://"))
    store.set_timeout(dist.distributed_c10d.default_pg_timeout)
    return dist.PrefixStore(f"attempt {torchrun.restart_count()}", store)


@contextmanager
def process_group() -> Iterator[World]:
    """Join the process group that torchrun describes, if any, and leave it at the end. Choose device and threads.

    With several ranks an error inside the block ends the process here: one rank says why (failures.py).
    """
    torchrun.check_environment()
    rank, size = torchrun.rank(), torchrun.world_size()
    device = choose_device()
    torch.set_num_threads(torchrun.cpu_cores())  # torchrun sets one; beside a GPU they pack, and step what is offloaded
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    mesh = store = None
    if size > 1 or device.type == "cuda":  # on one GPU too: the offloaded reference is an FSDP module
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        store = _store_of_this_attempt() if size > 1 else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("fsdp",))
    try:
        yield World(rank, size, device, mesh)
    except Exception as error:
        if size > 1:
            leave(error, store, rank)
        raise
    finally:
        if mesh is not None:
            dist.destroy_process_group()


def split_by_size(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """Split names among ranks, the largest first, each to the rank with the least so far. Return each rank's names.

    Every rank computes the same split.
    """
    names_of_rank: list[list[str]] = [[] for _ in range(ranks)]
    total = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = total.index(min(total))
        names_of_rank[least].append(name)
        total[least] += sizes[name]
    return names_of_rank
