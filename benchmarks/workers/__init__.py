"""One process for each engine: reads a job a line on standard input, answers with times a line on standard output.

A job is `{"tokens": [...], "steps": n}`: start over, read the tokens at once, then decode n single tokens. The answer
is `{"prefill_s": float, "step_s": [float, ...], "peak_rss_mib": float}`. A first line tells engine and version.
"""
