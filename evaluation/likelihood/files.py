"""What a measurement of likelihoods leaves: a table with a row per image, and a page to look at."""

import base64
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tarflow.evaluation.likelihood.per_image import ImageLikelihoods
from tarflow.evaluation.report.markup import escaped, paragraphs, section, table
from tarflow.evaluation.report.plots import Curve, Plot, outline, svg
from tarflow.evaluation.report.template import PAGE
from tarflow.evaluation.samples.png_folder import to_picture
from tarflow.files import write_atomic, write_text

BINS = 60
Column = Sequence[Any]


def columns_of(
    found: ImageLikelihoods, name: Callable[[int], str], dims: int, weighted: bool, classes: Sequence[str] | None
) -> dict[str, Column]:
    """The columns of the table. What is not known of any image (names, classes, errors) has none.

    `log_prob` in nats of the density in model range; the rest in bits per dimension, of which `prior` and `block_0`, ... sum up
    to `bits_per_dim`. `weighted`: with the importance-weighted bound, which uniform dequantisation has.
    """
    bits = found.mean
    columns = who_is_who(found.ids.tolist(), found.labels.tolist(), name, classes)
    columns["log_prob"] = ((7 - bits) * dims * math.log(2)).tolist()
    columns["bits_per_dim"] = bits.tolist()
    if (stderr := found.stderr) is not None:
        columns["stderr"] = stderr.tolist()
    if weighted:
        columns["importance_weighted"] = found.importance_weighted(dims).tolist()
    columns["prior"] = found.parts[:, 0].tolist()
    for number in range(found.parts.shape[1] - 1):
        columns[f"block_{number}"] = found.parts[:, 1 + number].tolist()
    return columns


def who_is_who(
    numbers: Sequence[int], labels: Sequence[int], name: Callable[[int], str], classes: Sequence[str] | None
) -> dict[str, Column]:
    """The columns that say which image a row is of; no names where there are none."""
    names = [name(number) for number in numbers]
    columns: dict[str, Column] = {"image": numbers} | ({"name": names} if any(names) else {}) | {"label": labels}
    if classes is not None:
        columns["class"] = [classes[label] if 0 <= label < len(classes) else "" for label in labels]
    return columns


def write_table(path: Path, columns: Mapping[str, Column]) -> Path:
    """Write a .parquet or .csv file; it appears complete or not at all."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    made = pa.table(dict(columns))
    if path.suffix == ".csv":
        write_atomic(path, lambda temporary: pyarrow.csv.write_csv(made, temporary))
    else:
        write_atomic(path, lambda temporary: pq.write_table(made, temporary))
    return path


def write_page(path: Path, found: ImageLikelihoods, shown: Mapping[int, Tensor], about: Mapping[str, Any]) -> None:
    """Write the page: histogram, parts, and the images of `shown` (number -> uint8 [C, H, W]) by their likelihood."""
    bits = found.mean
    plots = [_histogram(bits), _parts(found)]
    drawn = "".join(f"<figure class='plot'>{svg(plot, f'p{i}')}</figure>" for i, plot in enumerate(plots) if plot)
    by_number = dict(zip(found.ids.tolist(), bits.tolist()))
    ordered = sorted((by_number[number], number) for number in shown if math.isfinite(by_number[number]))
    half = len(ordered) // 2
    body = paragraphs([f"{about['data']}: {about['measured']:,} images; {about['noise']}"])
    body += f"<div class='row'>{drawn}</div>"
    body += section("Most likely", _pictures(ordered[:half] or ordered, shown))
    body += section("Least likely", _pictures(ordered[::-1][:half], shown))
    facts = {key: value for key, value in about.items() if not isinstance(value, Mapping)}
    body += section("Summary", table(("what", "value"), facts.items()))
    title = escaped(f"Likelihoods under {about['origin']}")
    write_text(
        path, PAGE.format(title=title, about="Exact likelihoods", body=body, made=time.strftime("%Y-%m-%d %H:%M"))
    )


def _histogram(bits: Any) -> Plot | None:
    finite = bits[np.isfinite(bits)]
    if not len(finite):
        return None
    counts, edges = np.histogram(finite, bins=min(BINS, max(1, len(finite))))
    images = Curve("images", outline(float(edges[0]), float(edges[-1]), counts.tolist()))
    return Plot("Images by bits per dimension", [images], "images", "bits per dimension", from_zero=True)


def _parts(found: ImageLikelihoods) -> Plot | None:
    finite = found.parts[np.isfinite(found.mean)]
    if not len(finite):
        return None
    blocks = [(float(number), float(value)) for number, value in enumerate(finite.mean(axis=0)[1:])]
    return Plot(
        "Bits per dimension by block (mean)", [Curve("block", blocks, marked=True)], "bits per dimension", "block"
    )


def _pictures(ordered: Sequence[tuple[float, int]], shown: Mapping[int, Tensor]) -> str:
    figures = []
    for bits, number in ordered:
        buffer = io.BytesIO()
        to_picture(shown[number]).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        caption = f"{number}: {bits:.3f}"
        figures.append(
            f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'><figcaption>{caption}</figcaption></figure>"
        )
    return f"<div class='tiles'>{''.join(figures)}</div>" if figures else ""
