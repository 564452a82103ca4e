"""The Python in the documentation runs, and its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    """Command lines of the shell blocks and the code spans that begin with ``agglo`` or ``make``."""
    text = page.read_text(encoding="utf-8")
    lines = [
        line.strip()
        for language in ("bash", "sh", "console")
        for b in blocks(page, language)
        for line in b.splitlines()
    ]
    lines += re.findall(r"`((?:agglo|make) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line.removeprefix("$ ").split("  #")[0] for line in lines if re.match(r"(\$ )?(agglo|make) ", line)]


@pytest.mark.weights
def test_readme_python_runs(tmp_path, monkeypatch):
    """One script, top to bottom, in a folder with a few photographs."""
    from agglo.sources.photos import Photos

    photos = Photos(split="heldout")
    (tmp_path / "photos").mkdir()
    for index in range(len(photos)):
        photos.read(index).save(tmp_path / "photos" / f"{photos.name(index).split('/')[-1]}.jpg")
    photos.read(next(i for i in range(len(photos)) if photos.name(i).endswith("coffee"))).save(tmp_path / "cup.jpg")
    monkeypatch.chdir(tmp_path)
    script = blocks(ROOT / "README.md", "python")
    assert script, "the README shows no Python"
    scope: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(script, 1):
        exec(compile(block, f"README.md, block {number}", "exec"), scope)


def test_the_example_of_a_new_kind_runs():
    import torch

    scope: dict = {"__name__": "example"}
    exec(compile(blocks(ROOT / "CONTRIBUTING.md", "py")[0], "CONTRIBUTING.md", "exec"), scope)
    loss = scope["L1"](gain=2.0)
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(loss(prediction, target), 2 * (prediction - target).abs().mean())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_agglo_commands_exist(page):
    import typer

    from agglo.cli import main as cli

    app = next(value for value in vars(cli).values() if isinstance(value, typer.Typer))
    group = typer.main.get_command(app)
    known = group.commands  # type: ignore[attr-defined]
    for line in commands(page):
        words = shlex.split(line.replace("|", " ").replace("…", ""))
        if words[0] != "agglo" or len(words) < 2:
            continue
        if words[1].startswith("-"):
            continue
        assert words[1] in known, f"{page.name}: `{line}`: unknown command; known: {sorted(known)}"
        options = {
            option for parameter in known[words[1]].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in words[2:]:
            flag = word.split("=")[0]
            if flag.startswith("-") and len(flag) > 1 and flag != "--help":
                assert flag in options, f"{page.name}: `{line}`: unknown option {flag}; known: {sorted(options)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert {"demo", "test"} <= targets
    for line in commands(page):
        words = [w for w in shlex.split(line) if "=" not in w]
        if words[0] == "make":
            assert set(words[1:]) <= targets, f"{page.name}: `{line}`"


def test_all_public_names_are_documented():
    import agglo

    text = (ROOT / "docs" / "all-of-agglo.md").read_text(encoding="utf-8")
    assert {name for name in agglo.__all__ if not name.startswith("_") and f"`{name}`" not in text} == set()


def test_all_kinds_are_documented():
    from agglo.config import POINTS, kinds

    text = (ROOT / "docs" / "all-of-agglo.md").read_text(encoding="utf-8")
    missing = {
        f"{point}/{kind}" for point in POINTS for kind in kinds(point, installed=False) if f"`{kind}`" not in text
    }
    assert not missing, "docs/all-of-agglo.md lists the kinds of every room"
