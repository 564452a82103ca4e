"""Text has no leftovers, no paths of a developer's machine, no broken links and no personifying words."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("src", "tests", "docs", "benchmarks", ".ci")
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".txt", ".json", ""}
THIS = Path(__file__).resolve()


def texts():
    top = [p for p in ROOT.iterdir() if p.is_file() and (p.suffix in SUFFIXES) and not p.name.startswith(".git")]
    below = [p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.is_file() and p.suffix in SUFFIXES]
    return sorted(p for p in top + below if p != THIS and "__pycache__" not in p.parts and p.stat().st_size < 2_000_000)


LEFTOVERS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|home|root|Users|mnt|scratch)/\w|[A-Z]:\\Users")


def test_text_is_clean():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for pattern in (LEFTOVERS, MACHINE_PATHS)
        for match in [pattern.search(line)]
        if match
    ]
    assert not found, "\n".join(found)


WORDS = re.compile(r"\b(?:said|told|nobody|whoever|is no)\b", re.I)
"""Personification and inversion: code raises, returns and reports, and "is not a multiple" reads at once."""


def test_package_has_no_personifying_words():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in texts()
        if path.is_relative_to(ROOT / "src")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in WORDS.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_the_patterns_match_and_only_what_they_should():
    assert WORDS.search("There is no cache") and not WORDS.search("is not, is nothing, tolder")
    assert LEFTOVERS.search("# TODO: later") and not LEFTOVERS.search("a todo list")
    assert MACHINE_PATHS.search("open('/home/ann/x')") and MACHINE_PATHS.search("see /work/x")
    assert not MACHINE_PATHS.search("https://example.org/work/x") and not MACHINE_PATHS.search("src/work/x")


def test_the_project_is_scanned():
    names = {p.relative_to(ROOT).as_posix() for p in texts()}
    assert {"README.md", "src/agglo/types.py", "docs/all-of-agglo.md", "NOTICE"} <= names
    assert {"src/agglo/recipes/quickstart.yaml", "src/agglo/harness/protocols.yaml"} <= names


def test_local_links_resolve():
    pages = [p for p in texts() if p.suffix == ".md" and "assets" not in p.parts]
    links = [(p, t) for p in pages for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", p.read_text(encoding="utf-8"))]
    local = [(p, t) for p, t in links if "://" not in t and not t.startswith("mailto:")]
    broken = [f"{p.relative_to(ROOT)} -> {t}" for p, t in local if not (p.parent / t).exists()]
    assert not broken, "\n".join(broken)
