"""Checks that all ranks have the same data in front of them: each node may have a copy, or a user's function, of its own."""

from tarflow.data_pipeline.loading.choose_reader import DataFacts
from tarflow.trainer.errors import TrainerError
from tarflow.trainer.parallel.world import gather


def check_same_data(facts: DataFacts) -> None:
    """Raise TrainerError on every rank, naming both sides, unless the fingerprints of all agree. A collective."""
    found = gather(facts.fingerprint)
    other = next((rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]), None)
    if other is None:
        return
    way_out = (
        "copy one set to all nodes"
        if facts.custom is None
        else f"let {facts.custom.function} give the same everywhere: sort what is listed from a folder or a set"
    )
    raise TrainerError(
        f"rank {other} has another data set than rank 0: fingerprint {found[other]} there, {found[0]} on rank 0 (data.train). "
        f"The order would differ, too; {way_out}"
    )
