"""The broker: hands out conversation leases over HTTP, journals them, and watches the engines.

It is a shell round `conserve_sdk.core`, which makes every decision. `conserve_broker.settings` has the configuration,
`conserve_broker.server` runs the service, in a process of its own or inside another one.
"""

__all__: list[str] = []
