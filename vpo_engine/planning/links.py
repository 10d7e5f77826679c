"""The rates of the links between GPUs, within a machine and between machines, and the time that bytes take on them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from vpo_engine.distributed.traffic import Transfer

EFFICIENCY = 0.8
"""Share of a link's rate that collective operations reach with large tensors. Source: stas00/ml-engineering,
network/README.md (235 GB/s of 300 on an A100's NVLink, and "about 80%" of a network's)."""
SOCKET = 1e9
"""Bytes a second that a process receives over sockets, with the copies that Python makes. This is an estimate."""
_THEORY = "stas00/ml-engineering, network/README.md"


@dataclass(frozen=True)
class Link:
    """A kind of link. rate: bytes a second in one direction, of a GPU within a machine, of a machine between them."""

    name: str
    rate: float
    source: str


WITHIN = {
    link.name: link
    for link in (
        Link("nvlink3", 300e9, f"NVLink 3 (A100): {_THEORY}"),
        Link("nvlink4", 450e9, f"NVLink 4 (H100, H200): {_THEORY}"),
        Link("nvlink5", 900e9, f"NVLink 5 (B200): {_THEORY}"),
        Link("pcie4", 31e9, f"PCIe 4 x16: {_THEORY}"),
        Link("pcie5", 63e9, f"PCIe 5 x16: {_THEORY}"),
    )
}
BETWEEN = {
    link.name: link
    for link in (
        Link(
            "8x-hdr",
            8 * 25e9,
            "8 InfiniBand HDR ports of 200 Gb/s in a machine, as in a DGX A100's datasheet",
        ),
        Link(
            "8x-ndr",
            8 * 50e9,
            "8 InfiniBand NDR ports of 400 Gb/s in a machine, as in a DGX H100's datasheet",
        ),
        Link("1x-hdr", 25e9, "one InfiniBand HDR port of 200 Gb/s in a machine"),
        Link("1x-ndr", 50e9, "one InfiniBand NDR port of 400 Gb/s in a machine"),
        Link("100gbe", 12.5e9, "one Ethernet port of 100 Gb/s in a machine"),
    )
}

_USUAL = {
    "a100": ("nvlink3", "8x-hdr"),
    "h100": ("nvlink4", "8x-ndr"),
    "h200": ("nvlink4", "8x-ndr"),
    "b200": ("nvlink5", "8x-ndr"),
}
"""Links of machines of eight such GPUs, by the beginning of the GPU's name."""
_OTHERWISE = ("pcie4", "100gbe")


@dataclass(frozen=True)
class Cluster:
    """``nodes`` machines of ``gpus`` GPUs each. within: the link of a GPU; between: what a machine sends through."""

    gpus: int
    nodes: int
    within: Link
    between: Link

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    def rate(self, ranks: int) -> float:
        """Return the bytes a second that each process of a group of neighbours sends in collective operations.

        A group that is on several machines is as fast as its slowest link: on a ring every byte passes each machine's
        ports once, over all of which the rings of NCCL are spread.
        """
        inside = ranks <= self.gpus and self.gpus % ranks == 0
        slowest = self.within.rate if inside else min(self.within.rate, self.between.rate)
        return EFFICIENCY * slowest

    def seconds(self, transfer: Transfer) -> float:
        """Return how long a transfer takes; the process of the reward model receives the videos of all others."""
        if transfer.purpose == "videos":
            return transfer.nbytes * (transfer.ranks - 1) / SOCKET
        return transfer.nbytes / self.rate(transfer.ranks)

    def __str__(self) -> str:
        machines = f"{self.nodes} machines of" if self.nodes > 1 else "one machine of"
        network = f", {self.between.name} between them" if self.nodes > 1 else ""
        return f"{self.ranks} GPUs ({machines} {self.gpus}; {self.within.name} within{network})"


_MOST = 1024
"""Most GPUs of a machine, and most machines, of which all ways to divide a run are compared."""


def make_cluster(gpus: int, nodes: int, gpu: str, within: str | None, between: str | None) -> Cluster:
    """Return the machines that the command line describes; None: what machines with such a GPU usually have.

    Raise ValueError for numbers below 1 or above _MOST, and for links that are not known.
    """
    for name, number in (("--gpus", gpus), ("--nodes", nodes)):
        if not 1 <= number <= _MOST:
            raise ValueError(f"{name} {number} must be at {'least 1' if number < 1 else f'most {_MOST}'}")
    usual = next((links for start, links in _USUAL.items() if gpu.startswith(start)), _OTHERWISE)
    return Cluster(
        gpus,
        nodes,
        _known("--link", within or usual[0], WITHIN),
        _known("--network", between or usual[1], BETWEEN),
    )


def _known(option: str, name: str, links: dict[str, Link]) -> Link:
    if name not in links:
        near = difflib.get_close_matches(name.lower(), links, n=1)
        hint = f"; did you mean {near[0]}? It" if near else "; it"
        raise ValueError(f"{option} {name} is not known{hint} must be one of: {', '.join(links)}")
    return links[name]
