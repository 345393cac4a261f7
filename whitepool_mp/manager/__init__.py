"""The manager process: one loop between clients, the pure broker and the worker processes."""
