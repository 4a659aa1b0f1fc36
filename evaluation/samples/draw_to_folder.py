"""Samples of a run or a weights file, as PNGs with a grid and the settings that made them."""

import math

from tarflow.code_version import code_version
from tarflow.evaluation.batches import named_cause
from tarflow.evaluation.images.array import NAME, write_array
from tarflow.evaluation.log import Log
from tarflow.evaluation.samples.draw import NO_LABEL, SampleCount, Sampler
from tarflow.evaluation.samples.grid import make_grid
from tarflow.evaluation.samples.png_folder import SampleFolder, load_png, save_png
from tarflow.evaluation.samples.request import SampleRequest, open_request
from tarflow.evaluation.samples.variations.best_of import BestSampler
from tarflow.evaluation.samples.variations.choose import check_variation, choose_sampler
from tarflow.evaluation.samples.variations.path import PathSampler
from tarflow.evaluation.samples.variations.temperatures import TemperatureSampler
from tarflow.image_size import shown as shown_size

GRID_IMAGES = 100
LONGEST_ROW = 16


def sample_images(request: SampleRequest, log: Log = print) -> bool:
    """Draw what is missing in `request.out`; returns whether every requested sample is there.

    Raises EvaluationError for meaningless settings, and for a directory that holds anything else.
    """
    check_variation(request)
    source, sampling, batch_size = open_request(request, log)
    model = source.model.config
    sampler, num, variation = choose_sampler(request, source, sampling, log)
    best = sampler if isinstance(sampler, BestSampler) else None
    about = source.describe() | {"source": source.origin, "sampling": sampler.sampling.describe()} | variation
    about |= {"provenance": source.describe_provenance(), "code": code_version()}
    folder = SampleFolder(request.out, about, num, model.image_shape)
    missing, damaged = folder.missing(chosen=best is not None), folder.damaged

    # Any number of calls fill one folder: each draws only what is missing or damaged.
    log(f"{num} images of {shown_size(model.image_size)} pixels from {source.origin}, weights {source.weights}")
    if len(missing) < num:
        log(f"{num - len(missing)} are there already")
    if damaged:
        first = next(iter(damaged))
        log(f"{len(damaged)} damaged images are drawn again: {folder.path(first).name} is {damaged[first]}"
            + (f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""))  # fmt: skip
    count = SampleCount()
    with named_cause("sampling", source.model.var.device):
        if missing and sampler.plan is None:
            sampler.take_over(sampler.measure(missing[:batch_size], source.sha256, log), source.sha256)
            log(f"sampling: {sampler.plan}")
        for drawn in sampler.draw_all(missing, batch_size):
            for index, pixels in zip(drawn.finite_indices(), drawn.pixels()):
                folder.save(index, pixels)
            count.add(drawn)
    folder.finish(count.nonfinite, best.record(missing) if best else None)
    if count.certificates.rows or count.redone:
        log(f"certificates: {count.certificates}; {count.redone} of {count.asked} sampled again token by token")

    # The grid is made from the files, since samples of earlier calls belong in it too.
    shown = _grid_order(sampler, min(num, GRID_IMAGES))
    images = [load_png(folder.path(i)) if folder.path(i).exists() else None for i in shown]
    if any(image is not None for image in images):
        save_png(request.out / "grid.png", make_grid(images, request.columns or _columns(sampler, len(images))))
        log(f"images: {folder.images}\ngrid: {request.out / 'grid.png'}")
    if request.form == "npz":
        there = [path for i in range(num) if (path := folder.path(i)).exists()]
        shape = (len(there), model.height, model.width, 3)
        write_array(request.out / "samples.npz", shape, map(load_png, there))
        log(f"array: {request.out / 'samples.npz'} ({NAME}, uint8 {list(shape)})")
    if count.nonfinite:
        log(count.problem(0.0) or "")
    return not count.nonfinite


def _grid_order(sampler: Sampler, num: int) -> list[int]:
    """Indices sorted by class, so that samples of a class are next to each other."""
    if isinstance(sampler, TemperatureSampler):  # a row for each temperature
        return list(range(num))
    return sorted(range(num), key=lambda i: (sampler.label_of(i), i))


def _columns(sampler: Sampler, num: int) -> int:
    """One row per class if that fills all rows, one for a path that is no wider than LONGEST_ROW, otherwise about square."""
    if isinstance(sampler, TemperatureSampler):
        return sampler.columns
    if isinstance(sampler, PathSampler) and num <= LONGEST_ROW:
        return num
    classes = len({sampler.label_of(i) for i in range(num)} - {NO_LABEL})
    if classes > 1 and num % classes == 0 and num // classes >= 4:
        return num // classes
    return math.ceil(math.sqrt(num))
