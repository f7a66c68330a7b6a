"""What is installed may be used and passed on: no dependency's licence asks for more than its own sources."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import pytest

from tests.deploy.manifests import ROOT

# The GNU GPL and AGPL ask for the sources of what is built on them; the LGPL and the MPL for their own.
REFUSED = re.compile(r"(?<!Lesser )(?<!Library or )General Public License|(?<![A-Za-z])A?GPL|Affero|Proprietary", re.I)
LESSER = re.compile(r"Lesser General Public License|Library or Lesser General Public License|LGPL", re.I)


def licence(found: Distribution) -> str:
    """What a distribution says of its licence: an expression, classifiers, or the first line of a text or file."""
    metadata = found.metadata
    told = [metadata.get("License-Expression") or "", (metadata.get("License") or "").split("\n")[0]]
    told += [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
    if not any(told):
        told = [(found.read_text("licenses/LICENSE") or "").split("\n")[0]]
    return "; ".join(each for each in told if each)


def refused(text: str) -> bool:
    return bool(REFUSED.search(LESSER.sub("", text)))


def test_no_dependency_has_a_licence_that_reaches_what_is_built_on_it() -> None:
    names = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    found, unknown = {}, []
    for name in names:
        try:
            found[name] = licence(distribution(name))
        except PackageNotFoundError:
            # Of an extra that is not installed here.
            unknown.append(name)
    assert len(found) > 150
    assert {name: told for name, told in found.items() if refused(told)} == {}
    assert [name for name, told in found.items() if not told] == []


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ("GPL-3.0-only", True),
        ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
        ("AGPL-3.0", True),
        ("License :: OSI Approved :: GNU Affero General Public License v3", True),
        ("License :: Other/Proprietary License", True),
        ("LGPL with exceptions", False),
        ("License :: OSI Approved :: GNU Library or Lesser General Public License (LGPL)", False),
        ("License :: OSI Approved :: GNU Lesser General Public License v2 or later (LGPLv2+)", False),
        ("MPL-2.0 AND MIT", False),
        ("Apache-2.0", False),
    ],
)
def test_a_licence_that_does_is_seen(text: str, is_refused: bool) -> None:
    assert refused(text) is is_refused
