"""Images to shards and index, shards and index to batches; knows nothing of the model.

The order of the samples is a pure function (`order`), the index makes any WebDataset exact (`index`), and one
decoder serves every path (`decode`). Importing this package loads nothing heavy: import the module you need.
"""

if __name__ != "tarflow.data_pipeline":  # a second copy of every class would come of it
    raise ImportError(f"this folder is imported as tarflow.data_pipeline, not as {__name__}")
