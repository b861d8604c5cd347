"""The pure heart of ConServe: leases, occupancy, placement. No clock, no I/O, no randomness, integers only."""
