"""What a collective costs: alpha and beta, and the algorithms' hops and bytes.

A message of n bytes takes alpha + n * beta seconds: a fixed part, and a part that grows (Hockney,
1994). A collective is some such messages after each other. Here its time is

    call_s + hops * hop_s + bytes / bytes_per_s

where `hops` counts the messages of one rank that wait for those of another, and `bytes` is what one
rank gives to others. Which algorithm sends how much, for p ranks and a tensor of n bytes (Thakur,
Rabenseifner and Gropp, 2005):

    all-reduce, ring       2 (p - 1) hops    2 (p - 1) / p * n bytes
    all-reduce, one-shot   1 hop             (p - 1) * n bytes: every rank reads all others' tensors
    the same, in memory    1 hop             n bytes: written once, where all others read it
    all-gather, ring       p - 1 hops        (p - 1) / p * n bytes, n being the whole result
    reduce-scatter, ring   p - 1 hops        (p - 1) / p * n bytes, n being the whole input
    all-to-all             1 hop             (p - 1) / p * n bytes, n being what one rank hands out
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What one rank does in a collective: messages after each other, and bytes given to others."""

    hops: int
    num_bytes: float


def ring_all_reduce(num_bytes: float, size: int) -> Traffic:
    return Traffic(2 * (size - 1), 2 * (size - 1) / size * num_bytes)


def one_shot_all_reduce(num_bytes: float, size: int) -> Traffic:
    return Traffic(min(1, size - 1), (size - 1) * num_bytes)


def shared_all_reduce(num_bytes: float, size: int) -> Traffic:
    return Traffic(min(1, size - 1), num_bytes if size > 1 else 0.0)


def ring_gather(num_bytes: float, size: int) -> Traffic:
    """An all-gather of num_bytes in all, or a reduce-scatter of as many."""
    return Traffic(size - 1, (size - 1) / size * num_bytes)


def all_to_all(num_bytes: float, size: int) -> Traffic:
    return Traffic(min(1, size - 1), (size - 1) / size * num_bytes)


@dataclass(frozen=True)
class Link:
    """A way from one rank to another.

    call_s: of a collective, however little it sends: its launch, and that the ranks meet.
    hop_s: from one rank's sending to another's seeing it.
    bytes_per_s: of one rank, in each direction.
    """

    call_s: float
    hop_s: float
    bytes_per_s: float

    def seconds(self, *traffics: Traffic) -> float:
        """Of these, one after the other, in one call. Nothing, where nothing is sent."""
        hops = sum(traffic.hops for traffic in traffics)
        num_bytes = sum(traffic.num_bytes for traffic in traffics)
        if hops == 0:
            return 0.0
        return self.call_s + hops * self.hop_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Fabric:
    """Hosts of host_size ranks: a link inside of each host, and one from each rank to other hosts.

    A group is of consecutive ranks: inside of a host as long as it fits, else of whole hosts.
    """

    host_size: int
    inside: Link
    between: Link

    def hosts(self, size: int) -> int:
        """How many hosts a group has. Raises ValueError for one that fills its last host in part."""
        if size > self.host_size and size % self.host_size:
            raise ValueError(f"{size} ranks on hosts of {self.host_size}: the last is not full")
        return math.ceil(size / self.host_size)

    def all_reduce(self, num_bytes: float, size: int) -> float:
        """Seconds. Inside of a host by the quicker of ring and one-shot. Over hosts in three steps:
        each rank gets a share summed inside, sums it with its counterparts, and gathers the rest."""
        if (hosts := self.hosts(size)) == 1:
            ways = (one_shot_all_reduce(num_bytes, size), ring_all_reduce(num_bytes, size))
            return min(map(self.inside.seconds, ways))
        share = num_bytes / self.host_size
        inner = self.inside.seconds(*[ring_gather(num_bytes, self.host_size)] * 2)
        return inner + self.between.seconds(ring_all_reduce(share, hosts))

    def all_gather(self, num_bytes: float, size: int) -> float:
        """Seconds for num_bytes in all; a reduce-scatter takes as long. Over hosts each rank gets
        its counterparts' rows, and the ranks of a host then exchange what they got."""
        if (hosts := self.hosts(size)) == 1:
            return self.inside.seconds(ring_gather(num_bytes, size))
        outer = self.between.seconds(ring_gather(num_bytes / self.host_size, hosts))
        return outer + self.inside.seconds(ring_gather(num_bytes, self.host_size))

    def all_to_all(self, num_bytes: float, size: int) -> float:
        """Seconds; num_bytes is what the busiest rank hands out, evenly to all ranks and itself.
        What goes to the own host and what goes to others is sent at the same time."""
        if (hosts := self.hosts(size)) == 1:
            return self.inside.seconds(all_to_all(num_bytes, size))
        near = all_to_all(num_bytes / hosts, self.host_size)
        far = Traffic(1, num_bytes * (hosts - 1) / hosts)
        return max(self.inside.seconds(near), self.between.seconds(far))
