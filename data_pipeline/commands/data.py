"""`tarflow data`: make data sets, index existing ones, inspect and check them."""

EXAMPLE = """example:
  tarflow data prepare photos/ sets/photos --size 64 --val-fraction 0.1
"""

VERBS = {
    "prepare": ("tarflow.data_pipeline.commands.prepare", "turn images into WebDataset shards with an index"),
    "fetch": ("tarflow.data_pipeline.commands.fetch", "prepare real images that come with an installed package"),
    "index": (
        "tarflow.data_pipeline.commands.index",
        "index the shards of any WebDataset to train on them",
    ),
    "info": (
        "tarflow.data_pipeline.commands.info",
        "show counts, sizes and classes of a data set, and a contact sheet",
    ),
    "verify": ("tarflow.data_pipeline.commands.verify", "decode every sample and check labels, damage and duplicates"),
}
