"""Computes every number and plot of docs/theory.md and writes the page from docs/theory/page.md.

    python -m tools.theory                  recompute docs/theory/numbers.json and the plots, write the page
    python -m tools.theory --profile DIR    first summarize a calibration profile into docs/theory/profile_summary.json
    python -m tools.theory --check          write nothing; fail when the page is not what numbers.json gives

`numbers` computes, `measured` reads what other commands measured, `tables` and `plots` show both, and `page` fills in
docs/theory/page.md.
"""
