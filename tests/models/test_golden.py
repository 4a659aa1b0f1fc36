"""The flow is the published one: every golden number, to float32 rounding."""

import pytest

from benchmarks import golden

FILES = sorted(path.stem for path in golden.GOLDEN.glob("*.npz"))


@pytest.fixture(scope="module")
def results() -> list[golden.Result]:
    return golden.results()


@pytest.mark.parametrize("file", FILES)
def test_golden(results: list[golden.Result], file: str) -> None:
    errors = {quantity: error for name, quantity, error in results if name == file}
    assert errors
    assert not {quantity: error for quantity, error in errors.items() if not error <= golden.bar_of(file)}


def test_every_golden_array_is_compared(results: list[golden.Result]) -> None:
    import numpy as np

    assert {name for name, _, _ in results} == set(FILES)
    inputs = {"config", "x", "y", "noise", "y_sample", "pixels", "uniform", "var_before", "gaussian", "label_dropped",
              "noise_std", "lr_per_step"}  # fmt: skip
    for path in golden.GOLDEN.glob("*.npz"):
        with np.load(path) as file:
            keys = {k for k in file.files if not k.startswith(("param/",))} - inputs
        compared = {q for f, q, _ in results if f == path.stem}
        groups = {"block outputs": "block_output/", "gradient norms": "grad_norm/", "reverse_sequence": "reverse_sequence/",
                  "final weights": "final_param/"}  # fmt: skip
        names = {"gradient of x": "grad_x", "z without labels": "z_no_label", "bits per dimension": "bits_per_dim",
                 "losses of 20 steps": "loss", "probe z": "probe_z", "probe logdet": "probe_logdet",
                 "logdet is zero": "logdet"}  # fmt: skip
        names |= {f"prior variance after {k}": f"var_after/{k}" for k in (1, 2, 3)}
        covered = {names.get(q, q) for q in compared}
        covered |= {k for k in keys for q, prefix in groups.items() if q in compared and k.startswith(prefix)}
        if path.stem == "bits_per_dim":
            covered |= {"z", "logdet"}  # inside the bits per dimension
        assert keys <= covered, f"{path.name}: not compared: {sorted(keys - covered)}"
