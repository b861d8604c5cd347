"""A lease's whole life leaves nothing for the garbage collector, which would have to walk every live lease for it."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from conserve_sdk.core import BrokerSettings
from conserve_sdk.testing import InMemoryBroker
from tests.broker.desk_client import MIGRATING, Client, turn

_OURS = ("conserve_sdk.core", "conserve_sdk._desk", "conserve_sdk.protocol")


@contextmanager
def garbage_of_ours() -> Iterator[Counter[str]]:
    """Counts by type what was left in cycles meanwhile; what an HTTP client leaves is not the broker's."""
    found: Counter[str] = Counter()
    flags = gc.get_debug()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        kinds = [type(each) for each in gc.garbage]
        found.update(kind.__name__ for kind in kinds if kind.__module__.startswith(_OURS))
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.enable()


def live(client: Client, broker: InMemoryBroker, number: int) -> None:
    grant = client.grant(f"c{number}")
    client.report(turn(grant, prompt_tokens=4_200))
    client.renew(grant.token)
    moved = client.supersede(grant)
    assert moved.is_success, moved.text
    if number % 2:
        client.grant(f"c{number}")
        client.http.delete(f"/v1/leases/{grant.lease_id}", headers={"authorization": f"Lease {grant.token}"})


def test_the_life_of_a_lease_leaves_no_cycles() -> None:
    for settings in (MIGRATING, BrokerSettings()):
        broker = InMemoryBroker(settings=settings)
        client = Client(broker)
        live(client, broker, 0)  # what is made once is no garbage
        with garbage_of_ours() as left:
            for number in range(1, 6):
                live(client, broker, number)
        assert not left
