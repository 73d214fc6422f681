"""Ranks and what they tell each other. Everything works, unchanged, on one process."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from gspo.errors import UserError
from gspo.system import torchrun
from gspo.system.malloc import keep_freed_memory


@dataclass(frozen=True)
class World:
    """This process among its peers. `mesh` is None when there is no process group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def places(self, count: int, tp: int = 1) -> list[int]:
        """The places of a list of prompts that this rank samples and scores; with tp > 1, its whole group of tp ranks.

        Strided; who trains on what is decided by the lengths of the answers (packing/balance.py).
        """
        first = self.rank - self.rank % tp
        return [p for p in range(count) if first <= p % self.size < first + tp]

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self.gather(value))

    def sum(self, value: float) -> float:
        return sum(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """[value of rank 0, value of rank 1, ...], on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_to_all(self, parcels: list[Any]) -> list[Any]:
        """parcels[r] is for rank r -> [what rank 0 had for this rank, what rank 1 had, ...]; None costs nothing.

        Each object crosses the wire once, from its rank to the one that wants it. Tensors must be on the CPU.
        """
        if self.size == 1:
            return parcels
        away = [b"" if r == self.rank or x is None else pickle.dumps(x) for r, x in enumerate(parcels)]
        sent = torch.tensor([len(x) for x in away])
        due = torch.empty_like(sent)
        dist.all_to_all_single(due, sent)
        arrived = torch.empty(int(due.sum()), dtype=torch.uint8)
        mail = torch.frombuffer(bytearray(b"".join(away)), dtype=torch.uint8) if sent.any() else arrived[:0]
        dist.all_to_all_single(arrived, mail, due.tolist(), sent.tolist())
        opened = [pickle.loads(memoryview(x.numpy())) if len(x) else None for x in arrived.split(due.tolist())]
        opened[self.rank] = parcels[self.rank]
        return opened

    def gather_rows(self, places: list[int], rows: Tensor) -> Tensor:
        """Rows [G, ...] that belong at `places` of a whole -> the whole, on the CPU, on every rank."""
        pairs = [pair for part in self.gather((places, rows.cpu())) for pair in zip(*part, strict=True)]
        return torch.stack([row for _, row in sorted(pairs, key=lambda pair: pair[0])])

    def main_process_first(self, make: Callable[[], Any]) -> Any:
        """Run `make` on every rank, on rank 0 before the others; a UserError there is raised everywhere."""
        mine = []
        self.broadcast_from_main(lambda: mine.append(make()))
        return mine[0] if mine else make()

    def broadcast_from_main(self, make: Callable[[], Any]) -> Any:
        """Run `make` on rank 0 only and give everyone its result; a UserError there is raised everywhere."""
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
    """torchrun's store, where ranks find each other. It outlives a restart, after which a rank that is faster than the
    others would find addresses of processes that have ended: each attempt has names of its own."""
    store, _, _ = next(rendezvous("env://"))
    store.set_timeout(dist.distributed_c10d.default_pg_timeout)
    return dist.PrefixStore(f"attempt {torchrun.restart_count()}", store)


@contextmanager
def process_group() -> Iterator[World]:
    """Join the process group that torchrun describes, if any; leave it at the end."""
    rank, size = torchrun.rank(), torchrun.world_size()
    device = torch.device("cuda", torchrun.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(torchrun.cpu_cores())
        keep_freed_memory()
    mesh = None
    if size > 1 or device.type == "cuda":  # on one GPU too: the offloaded reference is an FSDP module
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        store = _store_of_this_attempt() if size > 1 else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("fsdp",))
    try:
        yield World(rank, size, device, mesh)
    finally:
        if mesh is not None:
            dist.destroy_process_group()


def split_by_size(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """Names for each rank, the largest first to the rank that has least: the same on every rank."""
    hands: list[list[str]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = held.index(min(held))
        hands[least].append(name)
        held[least] += sizes[name]
    return hands
