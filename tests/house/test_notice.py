"""NOTICE lists every weight and image that ships, or that the quickstart reads, with its sha256."""

from __future__ import annotations

import hashlib
import re
import subprocess

import pytest

from agglo.sources.photos import PHOTOS
from agglo.weights import bundled
from support import source

ASSETS = source.ROOT / "assets"
OWN = {".md", ".json", ".py"}
"""Suffixes of our own files, under the licence of the code."""


def assets():
    return sorted(p for p in ASSETS.rglob("*") if p.is_file() and p.suffix not in OWN and "__pycache__" not in p.parts)


def listed(repository) -> dict[str, str]:
    """``file → sha256`` of the lines ``<sha256>  <file>`` in NOTICE."""
    text = (repository / "NOTICE").read_text(encoding="utf-8")
    return {file: sha for sha, file in re.findall(r"^\s*([0-9a-f]{64})  (\S+)$", text, re.M)}


@pytest.mark.parametrize("path", assets(), ids=lambda p: p.relative_to(ASSETS).as_posix())
def test_shipped_file_is_in_notice(path, repository):
    line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  src/agglo/assets/{path.relative_to(ASSETS).as_posix()}"
    sha, file = line.split("  ")
    assert listed(repository).get(file) == sha, f"NOTICE must hold this line, under its origin and licence:\n  {line}"


def test_notice_lists_only_existing_files(repository):
    gone = [file for file in listed(repository) if file.startswith("src/") and not (repository / file).is_file()]
    assert not gone


@pytest.mark.parametrize("entry", [e for e in bundled.BUNDLED.values() if e.package != "agglo"], ids=lambda e: e.name)
def test_bundled_wheel_file_is_in_notice(entry, repository):
    assert listed(repository).get(f"{entry.package}/{entry.file}") == entry.sha256
    assert entry.licence in (repository / "NOTICE").read_text(encoding="utf-8")


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda p: p.name)
def test_photo_is_in_notice(photo, repository):
    folder = {"skimage": "skimage/data", "sklearn": "sklearn/datasets/images"}[photo.package]
    assert listed(repository).get(f"{folder}/{photo.file}") == photo.sha256


def test_licence_is_complete(repository):
    text = (repository / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_wheel_ships_what_runs_need(repository):
    """Recipes and assets lie inside the package, where the build picks them up, and git does not ignore them."""
    wanted = [p for p in [*assets(), *(source.ROOT / "recipes").glob("*.yaml")] if p.is_file()]
    assert wanted
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, wanted)], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert ignored.stdout == "", "the build leaves out what .gitignore names"
    assert not [p for p in wanted if p.suffix in (".pth", ".pt", ".bin", ".pkl")], "weights are safetensors"
