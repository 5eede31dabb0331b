"""How many partitions each router is to hold: evenly, no router more than one partition away from any other.

Every router computes the same shares from the same leases, so nobody has to tell anybody. Of the partitions that are
left over after an even division each goes to a router that holds most already: nothing moves that need not.
"""

from __future__ import annotations

from collections.abc import Mapping


def shares(held: Mapping[str, int], partitions: int) -> dict[str, int]:
    """Each router's share of `partitions`, given what each holds now; the shares' sum is `partitions`."""
    each, left_over = divmod(partitions, len(held))
    ranking = sorted(held, key=lambda router: (-held[router], router))
    return {router: each + (place < left_over) for place, router in enumerate(ranking)}


def turn_of(router: str, routers: Mapping[str, int], partitions: int) -> int:
    """The partition at which a router begins to look for free ones: each at another, so that few want the same."""
    return sorted(routers).index(router) * partitions // len(routers)
