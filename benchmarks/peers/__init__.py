"""Speed beside other engines, on the same weights: `make bench-peers`; see docs/performance.md.

`table.py` says who is measured. `venvs.py` and `files.py` make what each needs, before anything is measured;
`process.py` runs an engine in a process of its own; `measure.py` lets them take turns; `report.py` says who was faster.
"""
