"""A page, or some lines for a terminal, on what a run has done so far.

`metrics_file` reads metrics.jsonl into thinned `series`; `directory` reads the rest of a run into a
`run_reading`, with what `liveness` says of its process; `panels` says which figures share a plot;
`page` writes the `content` as one HTML file from the parts in web/, `terminal` as text.
"""
