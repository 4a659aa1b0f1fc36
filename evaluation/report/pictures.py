"""The report's pictures: grids over training, and what the newest result shows beside its grid."""

from collections.abc import Sequence

from tarflow.evaluation.report.history import History, Result
from tarflow.evaluation.report.markup import escaped, paragraphs, picture, section

MOST_GRIDS = 9  # grids over training on the page; more would make it heavy


def grids(history: History, results: Sequence[Result]) -> str:
    """The grid of each of these results, or of `MOST_GRIDS` of them, evenly spaced."""
    shown = [(result, path) for result in results if (path := result.picture("grid.png"))]
    if not shown:
        return ""
    if len(shown) > MOST_GRIDS:
        shown = [shown[i * (len(shown) - 1) // (MOST_GRIDS - 1)] for i in range(MOST_GRIDS)]
    note = ""
    if rows := shown[-1][0].values.get("grid_rows"):
        names = ", ".join(_class_name(str(row), history.classes) for row in rows)
        note = paragraphs([f"Rows from top to bottom: {names}."])
    figures = "".join(picture(path, _caption(result), history.flaws) for result, path in shown)
    return f"{note}<div class='row'>{figures}</div>"


def _class_name(row: str, classes: Sequence[str]) -> str:
    """A row's class by name: a result holds its number where the evaluation did not know the names."""
    return classes[int(row)] if row.isdecimal() and len(row) < 10 and int(row) < len(classes) else row


def _caption(result: Result) -> str:
    name, distance = result.distance
    return f"{result.images_seen:,} images seen" + (f", {name} {distance:.2f}" if distance is not None else "")


def comparisons(history: History, results: Sequence[Result]) -> str:
    """Denoising, guidance, nearest neighbours and trajectory of the newest result that has pictures."""
    with_pictures = [result for result in results if result.picture("grid.png")]
    if not with_pictures:
        return ""
    result = with_pictures[-1]
    sampling = result.values["settings"]["sampling"]
    guided = f"guidance {sampling['guidance']:g}" + (", annealed" if sampling["annealed"] else "")
    return "".join((
        _pair(
            "Before and after denoising",
            "The flow is trained on noisy images and so it samples noisy images; one step along the score removes the noise.",
            ("grid-noisy.png", "as sampled"), ("grid.png", f"denoised, multiplier {sampling['denoise']:g}"),
            history, result,
        ),
        _pair(
            "Without and with guidance", "From the same noise.",
            ("grid-unguided.png", "no guidance"), ("grid.png", guided), history, result,
        ),
        _neighbours(history, result),
        _trajectory(history, result),
    ))  # fmt: skip


def _pair(
    title: str, text: str, left: tuple[str, str], right: tuple[str, str], history: History, result: Result
) -> str:
    """Two pictures of a result beside each other, each as (file, caption); nothing unless both are there."""
    first, second = result.picture(left[0]), result.picture(right[0])
    if first is None or second is None:
        return ""
    figures = picture(first, left[1], history.flaws) + picture(second, right[1], history.flaws)
    return section(title, f"<p>{escaped(text)}</p><div class='row pair'>{figures}</div>")


def _neighbours(history: History, result: Result) -> str:
    path, about = result.picture("neighbours.png"), result.values.get("neighbours")
    if path is None or not about:
        return ""
    text = (
        f"Samples above their nearest training image (by pixels, of {about['training_images']:,} searched). RMS difference "
        f"over {about['samples']:,} samples, in grey levels: median {about['nearest_rms_median']:.1f}, minimum "
        f"{about['nearest_rms_min']:.1f}. Near zero would be a copy."
    )
    shown = picture(path, "top: samples; bottom: nearest training images", history.flaws)
    return section("Nearest training images", paragraphs([text]) + shown)


def _trajectory(history: History, result: Result) -> str:
    path = result.picture("trajectory.png")
    if path is None:
        return ""
    last = ", after denoising" if result.picture("grid-noisy.png") else ""
    caption = f"one sample per row: noise, after each flow block{last}"
    return section("From noise to image", picture(path, caption, history.flaws))
