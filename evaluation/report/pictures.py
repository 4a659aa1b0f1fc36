"""The report's pictures: grids over training, and what the newest result shows beside its grid."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from tarflow.evaluation.report.curves import AXES, spaced
from tarflow.evaluation.report.history import History, Result
from tarflow.evaluation.report.markup import escaped, figure, paragraphs, picture, png_bytes, section

MOST_GRIDS = 9  # grids over training on the page; more would make it heavy


def grids(history: History, results: Sequence[Result]) -> str:
    """The grid of each of these results, or of `MOST_GRIDS` of them, evenly spaced."""
    with_grids = spaced([result for result in results if result.picture("grid.png")], MOST_GRIDS)
    shown = [(result, path) for result in with_grids if (path := result.picture("grid.png"))]
    if not shown:
        return ""
    note = ""
    if rows := shown[-1][0].values.get("grid_rows"):
        names = ", ".join(_class_name(str(row), history.classes) for row in rows)
        note = paragraphs([f"Rows from top to bottom: {names}."])
    figures = "".join(picture(path, _caption(result), history.flaws) for result, path in shown)
    return f"{note}<div class='row'>{figures}</div>"


def _class_name(row: str, classes: Sequence[str]) -> str:
    """A row's class by name: a result holds its number where the evaluation did not know the names."""
    return classes[int(row)] if row.isdecimal() and len(row) < 10 and int(row) < len(classes) else row


def by_class(history: History, results: Sequence[Result]) -> str:
    """The rows of the newest grid, class by class."""
    shown = next((result for result in reversed(results) if result.picture("grid.png")), None)
    path = shown.picture("grid.png") if shown else None
    if shown is None or path is None or not (rows := shown.values.get("grid_rows")):
        return ""
    data = png_bytes(path, history.flaws)
    if data is None:
        return ""
    strips: dict[str, list[Image.Image]] = {}
    with Image.open(io.BytesIO(data), formats=["PNG"]) as grid:
        edges = [number * grid.height // len(rows) for number in range(len(rows) + 1)]  # each lies in a margin
        for row, top, bottom in zip(rows, edges, edges[1:]):
            if top < bottom:
                strips.setdefault(str(row), []).append(grid.crop((0, top, grid.width, bottom)))
    figures = (figure(_stacked(parts), _class_name(row, history.classes)) for row, parts in strips.items())
    return f"<div class='row pair'>{''.join(figures)}</div>"


def _stacked(parts: Sequence[Image.Image]) -> bytes:
    """Strips of one width below each other, as a PNG."""
    whole, top, buffer = Image.new(parts[0].mode, (parts[0].width, sum(p.height for p in parts))), 0, io.BytesIO()
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    whole.save(buffer, "PNG")
    return buffer.getvalue()


def over_settings(history: History) -> str:
    """Grids of results that differ in one sampling setting alone, by its value."""
    sections = []
    for setting, label in AXES:
        for name, group in history.over(setting).items():
            shown = [(value, path) for value, result in group if (path := result.picture("grid.png"))]
            if len(shown) > 1:
                figures = "".join(
                    picture(path, f"{label} {value:g}", history.flaws) for value, path in shown[:MOST_GRIDS]
                )
                sections.append(section(f"Samples over {label}, {name}", f"<div class='row'>{figures}</div>"))
    return "".join(sections)


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
        _pair("Before and after denoising", *_denoising_words(sampling), history, result),
        _strip(history, result),
        _pair(
            "Without and with guidance", "From the same noise.",
            ("grid-unguided.png", "no guidance"), ("grid.png", guided), history, result,
        ),
        _neighbours(history, result),
        _trajectory(history, result),
    ))  # fmt: skip


def _denoising_words(sampling: Mapping[str, Any]) -> tuple[str, tuple[str, str], tuple[str, str]]:
    """What the pictures before and after denoising show: a text, and (file, caption) of each."""
    before = "The flow is trained on noisy images and so it samples noisy images; "
    if (level := sampling.get("noise_level")) is None:
        after = f"denoised, multiplier {sampling['denoise']:g}"
        return (
            f"{before}one step along the score removes the noise.",
            ("grid-noisy.png", "as sampled"),
            ("grid.png", after),
        )
    steps = sampling.get("denoise_steps", 0)
    how = "each with fresh noise" if sampling.get("denoise_stochastic") else "along the ODE"
    return (
        f"{before}{steps} steps remove the noise little by little, {how}.",
        ("grid-noisy.png", f"as sampled, at noise level {level:g}"), ("grid.png", f"denoised in {steps} steps"),
    )  # fmt: skip


def _strip(history: History, result: Result) -> str:
    path, sampling = result.picture("denoising.png"), result.values["settings"]["sampling"]
    if path is None or (level := sampling.get("noise_level")) is None:
        return ""
    steps = sampling.get("denoise_steps", 0)
    caption = f"one sample per row: noise level {level:g} on the left, 0 on the right, {steps} steps later"
    return section("From noise level t1 to 0", picture(path, caption, history.flaws))


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
