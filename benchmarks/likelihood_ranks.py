"""Does a flow find the images of another data set less likely than its own: how often, and by how much.

    python -m benchmarks.likelihood_ranks RUN data/mnist5k/val data/fashion/val [--check] [--plot FILE.svg]

RUN was trained on the training images of the first set. Both sets are brought to its size, without labels, with its noise.
Images are ranked by their bits per dimension alone; the area is the share of pairs, one image of each set, in which the other
set's is the less likely (0.5: no better than chance).
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Bar, finish, parse_args

Floats = NDArray[np.float64]


def bits_of(run: Path, data: Path, num: int) -> Floats:
    """[n] bits per dimension, as `tarflow likelihood` measures them."""
    import pyarrow.parquet as pq

    from tarflow.evaluation.likelihood.measure import LikelihoodRequest, measure_likelihoods

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        measure_likelihoods(LikelihoodRequest(source=run, data=data, out=out, num=num, labels="none"), print)
        return np.asarray(pq.read_table(out / "likelihood.parquet")["bits_per_dim"])


def area(inside: Floats, outside: Floats) -> float:
    """Share of pairs in which the image of `outside` has more bits; ties count half (Mann and Whitney's U over n m)."""
    below = np.searchsorted(np.sort(inside), outside, side="left")
    upto = np.searchsorted(np.sort(inside), outside, side="right")
    return float((below + upto).mean() / 2 / len(inside))


def main() -> int:
    options: list[tuple[str, dict[str, Any]]] = [
        (name, {"type": Path, "metavar": name.upper()}) for name in ("run", "inside", "outside")
    ]
    options.append(("--plot", {"type": Path, "metavar": "FILE", "help": "write an SVG"}))
    args = parse_args(__doc__.splitlines()[0], options)
    num = 100 if args.quick else 500
    inside, outside = (bits_of(args.run, data, num) for data in (args.inside, args.outside))
    if args.plot:
        plot(args.plot, {str(args.inside): inside, str(args.outside): outside})
    rows = [
        (str(data), len(bits), bits.mean(), bits.std(ddof=1), *np.quantile(bits, (0.05, 0.5, 0.95)))
        for data, bits in ((args.inside, inside), (args.outside, outside))
    ]
    bars = [Bar("pairs in which the other set's image is less likely", area(inside, outside), at_least=0.9,
                reason="the flow has learned its own images")]  # fmt: skip
    return finish(args, rows, ("images of", "images", "mean", "std", "5%", "median", "95%"), bars)


def plot(path: Path, sets: dict[str, Floats]) -> None:
    """Both histograms over the same bins, as an SVG file."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("svg")
    every = np.concatenate(list(sets.values()))
    edges = np.linspace(every.min(), every.max(), 60)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tarflow", "font.size": 9}):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, bits in sets.items():
            axes.hist(bits, edges, alpha=0.6, label=name)
        axes.set_xlabel("bits per dimension")
        axes.set_ylabel("images")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    sys.exit(main())
