"""Photographs from Debian's packages, trained on in slices, plain and by the follow-up recipe at equal compute.

    python -m benchmarks.photographs [--minutes M] [--quick]

`sources` (which photographs) -> `tiles` (cut and split) -> `arms` (what is compared) -> `training` (calibrated, in slices) ->
`scores` (evaluated, tabulated). Everything lies under --out, and the same command goes on from what is there.
"""
