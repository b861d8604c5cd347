"""What the SDK itself costs, measured beside a bare client and a router in the same run."""
