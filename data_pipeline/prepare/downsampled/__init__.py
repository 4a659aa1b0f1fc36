"""The official files of downsampled ImageNet (arXiv 1707.08819): `train_data_batch_1` ... `10` and `val_data`.

| file | what |
|---|---|
| `rows` | one of them: its pixels and labels, from a pickle or from `.npz` |
| `batches` | all that lie in a folder, as one source with its splits |
"""
