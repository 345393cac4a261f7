"""This process's side of a pool: its connections, channels and leases; what `Session` stands on."""
