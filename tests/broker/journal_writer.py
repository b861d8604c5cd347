"""A process that writes leases until it is killed: prints the number of each lease once it is acknowledged.

Run by path; the tests take the lease from here.
"""

import sys
from dataclasses import replace

from conserve_broker.journal import Journal
from conserve_sdk.core.decisions import LeaseDropped, LeaseStored
from conserve_sdk.core.lease import EngineBinding, Lease, LeaseKey, Mode
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.vocabulary import DropReason

LEASE = Lease(
    lease_id="l-1",
    key=LeaseKey(tenant="default", conversation_id="c", lineage="main", model="m"),
    epoch=1,
    mode=Mode.LOCAL,
    prefiller=None,
    decoder=EngineBinding(engine_id="d0", url="http://d0", incarnation="1"),
    granted_at_ms=1,
    ttl_ms=60_000,
    expires_at_ms=60_001,
    ledger_tokens=10,
    hold_ms=0,
    append_threshold_tokens=0,
    supersedes=None,
    receipt=Receipt(preset="default", rule="r", prefill_rule="p", need_tokens=10, waited_ms=0, candidates=()),
    activity_since_ms=1,
)
"""A lease that the tests of the journal write, with other numbers."""


def main(path: str, first: int) -> None:
    journal = Journal.open(path)
    number = first
    while True:
        # Eight callers at once, so that groups form; every third lease is dropped again in the same breath.
        futures = []
        for lane in range(number, number + 8):
            lease = replace(LEASE, lease_id=f"l-{lane:09d}", turns=lane)
            changes = [LeaseStored(lease=lease)]
            if lane % 3 == 0:
                changes.append(LeaseDropped(lease=lease, reason=DropReason.RELEASED))
            futures.append(journal.submit(changes))
        for lane, future in enumerate(futures, start=number):
            future.result()
            print(lane, flush=True)
        number += 8


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
