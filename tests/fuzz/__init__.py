"""Every kind of file that the product reads, damaged in every way, under every verb that reads it.

    python -m benchmarks.fuzz --cases 300 --check

`home` makes what there is to read, `kinds` lists the files, `verbs` the commands, `mutations` what happens to a file,
`server` runs a command beside a damaged file within milliseconds, `oracle` says what came of it, `campaign` does it all.
"""
