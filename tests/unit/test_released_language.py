"""Zero-shot and text search with an official checkpoint: its head, its teacher's tower, the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

import agglo
from agglo.cli.main import app
from support.checkpoints import ARGS, TEACHERS, official_state, tiny_siglip2

pytestmark = pytest.mark.libraries

TEXT_WIDTH = 40


@pytest.fixture(scope="module")
def text_aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small C-RADIOv4 whose first teacher's text tower is in a local folder."""
    home = tmp_path_factory.mktemp("text_aligned")
    (home / "tower").mkdir()
    tiny_siglip2(home / "tower", "siglip")
    state = official_state()
    torch.manual_seed(1)
    for key in ("weight", "bias"):
        name = f"_heads.0.final.2.{key}"
        state[name] = torch.randn(TEXT_WIDTH, *state[name].shape[1:])
    teachers = [{**TEACHERS[0], "model": str(home / "tower")}, *TEACHERS[1:]]
    args = argparse.Namespace(**{**ARGS, "teachers": teachers})
    torch.save({"state_dict": state, "args": args}, home / "tiny.pth.tar")
    return home / "tiny.pth.tar"


def test_image_and_text_embeddings_share_a_space(text_aligned: Path) -> None:
    model = agglo.load(text_aligned, heads="text")
    with torch.inference_mode():
        image, text = model.encode_image(torch.rand(2, 3, 64, 64)), model.encode_text(["A_photo of a CAT!", "snow"])
    assert image.shape == (2, TEXT_WIDTH)
    assert text.shape == (2, TEXT_WIDTH)
    torch.testing.assert_close(text, F.normalize(text, dim=-1))
    assert torch.equal(
        text, model.encode_text(["a photo of a cat", "snow"])
    )  # SigLIP2 reads lower case, no punctuation
    with pytest.raises(TypeError, match="no text tower"):
        agglo.load(text_aligned).encode_text(["a cat"])


def test_search_embed_and_zero_shot_from_the_command_line(text_aligned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    run = CliRunner().invoke
    found = run(app, ["search", str(folder), "a cat", "--model", str(text_aligned), "--size", "64"])
    assert found.exit_code == 0, found.output
    assert sorted(Path(line.split()[-1]).name for line in found.output.splitlines()) == ["0.png", "1.png", "2.png"]
    out = tmp_path / "all.npz"
    made = run(app, ["embed", str(folder), "-o", str(out), "--model", str(text_aligned), "--size", "64"])
    assert made.exit_code == 0, made.output
    with np.load(out) as arrays:
        widths = {name: array.shape[1] for name, array in arrays.items() if array.ndim == 2}
    assert TEXT_WIDTH in widths.values()
    measured = run(app, ["eval", str(text_aligned), "--evals", "zero_shot", "--out", str(tmp_path / "evals")])
    assert measured.exit_code == 0, measured.output
    assert "top1" in measured.output
