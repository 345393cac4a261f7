"""The package behind `scripts/chaos`: seeded random walks of faults, with an account of every job.

One process walks (`cli`): it owns the pool, draws `actions` from the seed and performs them
(`faults`), looks at the pool between them (`invariants`), and counts what is left at the end
(`leftovers`). Clients run jobs meanwhile: threads and an event loop of that process (`threads`,
`coroutines`), and processes that were given the session (`crowd`, `member`). Each process writes in
a `ledger` of its own when it opens a job and what it was told of its end (`ends`); each job writes
in one file when it begins (`jobs`), with `payloads` that both sides check. The `account` compares.

`--peers` makes the same jobs, kills and stops for other pools (`peers`, `endure`, `table`).
"""
