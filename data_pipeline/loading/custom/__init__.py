"""Data and transforms that a user's own functions give: `data.dataset`, `data.transform`.

`code` finds a function that a setting names and says what went wrong in it, `pixels` takes whatever it returns for an image,
`dataset` and `transform` are the two hooks, `source` makes batches of such a data set. Which configuration may have code run is
in docs/security.md.
"""
