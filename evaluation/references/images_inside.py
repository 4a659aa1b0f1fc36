"""The images that a reference file of ADM holds beside its statistics: precision and recall need features of single images."""

import torch
from torch import Tensor

from tarflow.evaluation.images.array import ImageArray
from tarflow.evaluation.log import Log
from tarflow.evaluation.references.compute import KEEP
from tarflow.evaluation.references.reference import Network, Reference
from tarflow.records import DamagedFileError

INSIDE = "images_inside"  # of a reference's provenance


def reference_rows(reference: Reference, network: Network, log: Log) -> Tensor:
    """Features [m, d] of single reference images: those stored or, where none are, of the first 10,000 images in the file.

    The first, as ADM's evaluator takes them, each at its own size. `log` says what was taken; images that cannot be read are
    named there, and leave none.
    """
    number = min(int(reference.provenance.get(INSIDE, 0)), KEEP)
    if len(reference.rows) or not number:
        return reference.rows
    rows = [torch.empty(0, network.dim)]
    try:
        left = number
        for pixels in ImageArray(reference.path, channels=3, size=None).batches():
            rows.append(network(pixels[:left]))
            left -= len(rows[-1])
            if not left:
                break
    except DamagedFileError as error:
        log(f"note: the images in {reference.path} are not used: {error.problem}")
        return rows[0]
    log(
        f"note: {number:,} of the {reference.provenance[INSIDE]:,} images in {reference.path} serve for precision, recall and "
        "what else compares single images; its mean and covariance may be of others"
    )
    return torch.cat(rows)
