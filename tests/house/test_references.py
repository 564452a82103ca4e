"""References to documentation resolve: the page exists and has the section that is cited."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from support import source

FOLDERS = ("src", "tests", "benchmarks", "docs")
PAGES = ("README.md", "CONTRIBUTING.md")
THIS = Path(__file__).resolve()

PAGE = re.compile(r"\bdocs/[\w./-]+?\.md\b")
SECTION = r"(?:D-\d+[a-z]?|\d+(?:\.\d+)*[a-z]?)"
SECTIONS = re.compile(rf"`*,\s+({SECTION}(?:(?:,| and| to|–)\s*{SECTION})*)(?![\w%×]| [a-z]*s\b)")
ABSENT = re.compile(r"\b(?:METHOD|RADIO\.md|SAM3\.md|DESIGN\.md|FIFTYONE\.md|ANCHORS\.md|STYLE\.md)(?![\w.]*/)\b")
"""Names of pages that are not in the repository."""
DECISION = re.compile(r"(?<![\w-])D-\d+[a-z]?\b(?!\]\([^)\s]*method\.md#)")
"""A decision outside a link; it needs its page before it."""


def texts() -> list[Path]:
    below = [p for f in FOLDERS for s in ("py", "md", "yaml") for p in (source.REPOSITORY / f).rglob(f"*.{s}")]
    return sorted({*below, *(source.REPOSITORY / page for page in PAGES)} - {THIS})


@cache
def headings(page: Path) -> str:
    """The headings of a page, and the labels in bold or in a table's first column, one per line."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if re.match(r"#|\s*[-*|] *\**(?:D-)?\d|\*\*", line))


def unresolved(text: str, root: Path) -> list[str]:
    """Citations in ``text`` that a reader of the repository at ``root`` cannot follow."""
    plain = re.sub(r"\n\s*#?\s*", " ", text)  # a citation may be wrapped
    found = [match.group() for match in ABSENT.finditer(plain)]
    covered = set()
    for match in PAGE.finditer(plain):
        page = root / match.group()
        if not page.is_file():
            found.append(f"{match.group()}: no such page")
            continue
        tail = SECTIONS.match(plain, match.end())
        if tail:
            covered |= set(range(*tail.span()))
            found += [
                f"{match.group()}, {section}: no such section"
                for section in re.findall(SECTION, tail.group(1))
                if not re.search(rf"(?<![\w.-]){re.escape(section)}(?![\w-]|\.\d)", headings(page))
            ]
    found += [f"{m.group()} without its page" for m in DECISION.finditer(plain) if m.start() not in covered]
    return found


def test_references_resolve():
    found = []
    for path in texts():
        text = path.read_text(encoding="utf-8")
        if path.name == "method.md":  # it defines the decisions and refers to them by number
            text = DECISION.sub("", text)
        found += [f"{source.name(path)}: {each}" for each in unresolved(text, source.REPOSITORY)]
    assert not found, "\n".join(found)


def test_each_kind_of_broken_reference_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A\n\n## 2 Two\n\n### 2.1 Below\n\n- **D-7.** Why.\n")
    wrapped = "docs/a.md,\n    # 2 is wrapped"
    assert unresolved(f"docs/a.md, 2.1 and 2; (``docs/a.md``, D-7), [a, D-7](method.md#d-7), {wrapped}", tmp_path) == []
    broken = unresolved("METHOD 2.2, docs/b.md, docs/a.md, 2.2, docs/a.md, D-8, as D-7 has it", tmp_path)
    assert broken == [
        "METHOD",
        "docs/b.md: no such page",
        "docs/a.md, 2.2: no such section",
        "docs/a.md, D-8: no such section",
        "D-7 without its page",
    ]
