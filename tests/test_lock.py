"""The locked packages: exact versions, as declared, and none with a known hole in what reads other people's files."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.!+]*)")

# What a stranger's bytes come to, and the first version without a hole that was published in it.
MENDED = {
    "torch": "2.6.0",  # CVE-2025-32434: code run by torch.load(weights_only=True)
    "pillow": "11.3.0",  # CVE-2025-48379, and CVE-2023-50447, CVE-2024-28219 before it: memory overrun by an image
    "pyarrow": "14.0.1",  # CVE-2023-47248: code run by a Parquet or IPC file
    "pyyaml": "5.4",  # CVE-2020-14343: code run by a document
    "aiohttp": "3.12.14",  # CVE-2025-53643: a smuggled answer
    "requests": "2.32.4",  # CVE-2024-47081: credentials sent to another host
    "urllib3": "2.5.0",  # CVE-2025-50181: redirects that were forbidden
    "protobuf": "5.29.5",  # CVE-2025-4565: endless recursion
    "setuptools": "78.1.1",  # CVE-2025-47273: files written outside a folder
    "jinja2": "3.1.6",  # CVE-2025-27516: code run by a template
    "werkzeug": "3.0.6",  # CVE-2024-49767: memory without bound
    "fonttools": "4.60.2",  # CVE-2025-66034: files written by a font
}
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = [Requirement(text) for text in DECLARED["dependencies"]]
OF_EXTRAS = [Requirement(text) for extra in DECLARED["optional-dependencies"].values() for text in extra]


def locked() -> dict[str, Version]:
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")
    ]
    pins = [PIN.fullmatch(line) for line in lines]
    assert [line for line, pin in zip(lines, pins) if pin is None] == [], "every line is one package at one version"
    names = [canonicalize_name(pin[1]) for pin in pins if pin]
    assert len(names) == len(set(names)), "no package stands twice"
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}


def test_every_package_is_pinned_exactly_and_once_and_fits_what_is_declared() -> None:
    pins = locked()
    assert len(pins) > 100
    for wanted in WANTED + OF_EXTRAS:
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)], prereleases=True), wanted
        assert wanted.url is None, f"{wanted}: from the package index, not from an address"


def test_no_locked_version_has_a_known_hole_and_none_is_allowed_by_a_lower_bound() -> None:
    pins = locked()
    for name, first in MENDED.items():
        if name in pins:
            assert pins[name] >= Version(first), name
        for wanted in WANTED:
            if canonicalize_name(wanted.name) == name:
                lower = [Version(part.version) for part in wanted.specifier if part.operator in (">=", "==", "~=")]
                assert lower, f"{name} needs a lower bound of {first} at least"
                assert max(lower) >= Version(first), name
    assert {"torch", "pillow", "pyarrow", "pyyaml", "aiohttp"} <= set(pins)
