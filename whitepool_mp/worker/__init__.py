"""What runs in a worker process, and the nursery that workers are forked from."""
