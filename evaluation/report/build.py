"""One page about a run, `report.html`: metrics, curves, pictures, every setting. The file is self-contained.

Pictures are data: URIs, plots are inline SVG, there is no script, and the page's own policy forbids every request.
"""

import time
from pathlib import Path

from tarflow.evaluation.log import Log
from tarflow.evaluation.report.cards import cards_section
from tarflow.evaluation.report.curves import sampling_curves, training_curves
from tarflow.evaluation.report.headline import alike, find_headline
from tarflow.evaluation.report.history import read_history
from tarflow.evaluation.report.likelihoods import likelihood_sections, read_likelihoods
from tarflow.evaluation.report.markup import damaged_files, escaped, section
from tarflow.evaluation.report.pictures import by_class, comparisons, grids, over_settings
from tarflow.evaluation.report.tables import config_table, headline_table, results_table
from tarflow.evaluation.report.template import PAGE
from tarflow.evaluation.run_config import shown_config
from tarflow.files import write_text
from tarflow.terminal import plain
from tarflow.trainer.run_dir import has_run_file, require_run


def write_report(run_dir: str | Path, out: Path | None = None, log: Log = lambda _: None) -> Path:
    """Write the report of a run with whatever there is so far; returns its path.

    Damaged files are skipped, and named on the page and through `log`. Raises TrainerError where there is no run.
    """
    run_dir = Path(run_dir) if has_run_file(run_dir) else require_run(run_dir)
    chosen: list[str] = []
    history = read_history(run_dir)
    config, known = shown_config(run_dir, history.flaws, chosen.append)
    measured = read_likelihoods(run_dir, history.flaws)
    headline = find_headline(history.results, config if known else None)
    # Curves and grids are only comparable under one group of settings: the headline's.
    shown = alike(history.results, headline.curve) if headline else []
    top = cards_section(config, history, headline, chosen)
    sections = [
        section("Training curves", training_curves(history, headline)),
        section("Guidance and denoising", sampling_curves(history)),
        section("Samples over training", grids(history, shown)),
        section("Samples by class", by_class(history, shown)),
        over_settings(history),
        comparisons(history, shown),
        likelihood_sections(measured, history.flaws),
        section("All results", results_table(history, headline)),
        section("Headline result in full", headline_table(headline)),
        section("Configuration", config_table(config)),
    ]
    # After all other sections, since reading pictures may add to the flaws; shown near the top, so that nobody misses it.
    damaged = damaged_files(history.flaws)
    body = "\n".join(part for part in (top, damaged, *sections) if part)
    title = escaped(run_dir.resolve().name)
    path = out or run_dir / "report.html"
    write_text(
        path, PAGE.format(title=title, about="TarFlow training run", body=body, made=time.strftime("%Y-%m-%d %H:%M"))
    )
    for line in history.flaws:
        log(plain(f"left out: {line}", 4096))
    if headline and (grid := headline.result.picture("grid.png")):
        log(plain(f"samples: {grid}", 4096))
    return path
