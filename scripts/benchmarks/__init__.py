"""The package behind `scripts/bench`: this pool beside its peers, interleaved, in one run.

The conductor (`cli`, `conductor`, `seat`) starts one process for each contestant (`contestant`),
which holds that contestant's pool (`adapter`, `ours`, `peers`) and does one measurement
(`measures`, `recovery`, `footprint`, `crowd`, `bursts`) when it is told to, one contestant at a
time. `plan` has the rows and their goals (`calls` and `lives`, of the `cast`), `model` their
records; `report`, `document`, `plots` and `about` show them.
"""
