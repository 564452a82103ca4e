"""What installing a student in SAM 3 or SAM refuses, and how."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agglo.decoders.sam3 import Sam3, advice, load, tokenize
from agglo.integrations import sam, sam3
from agglo.types import AssetError, ConfigError, ImageError
from support.checkpoints import tiny_sam, tiny_sam3
from support.sam3 import Replay, T, build, processor, student

pytest.importorskip("torchvision")

pytestmark = pytest.mark.libraries


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor("Sam3Model", tmp_path_factory.mktemp("processor"))


def test_student_must_have_a_map_of_the_trunks_width(made: Any) -> None:
    model = build("Sam3Model")
    with pytest.raises(ConfigError, match=r"takes 32 channels, and none has them: sam3 \(24\); set `head`"):
        sam3.install(model, student(24), processor=made)
    with pytest.raises(ConfigError, match="no head 'sam4'; did you mean 'sam3'"):
        sam3.install(model, student(), head="sam4", processor=made)
    with pytest.raises(ConfigError, match=r"none has them: dino \(16\)"):
        sam3.install(model, student(16, "dino"), processor=made)
    with pytest.raises(ConfigError, match="student is a int"):
        sam3.install(model, 3, processor=made)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no model 'nowhere'"):
        sam3.install(model, "nowhere", processor=made)
    assert type(model.vision_encoder.backbone).__name__ == "Sam3ViTModel"  # a refusal changes nothing


def test_window_must_divide_the_grid(made: Any) -> None:
    with pytest.raises(ConfigError, match=r"window 3 does not divide the 8x8 patches .*windows that do: 2, 4, 8"):
        sam3.install(build("Sam3Model"), student(), window=3, processor=made)
    with pytest.raises(ConfigError, match=r"window 16 .*windows that do: 2, 3, 4, 6, 8, 9, 12, 18, 24, 36"):
        sam3.install(build("Sam3Model", 72), student(), window=16, processor=made)
    with pytest.raises(ConfigError, match="no windowed attention; use window=0"):
        sam3.install(build("Sam3Model"), Replay([torch.zeros(1, 32, 8, 8)]), window=4, processor=made)
    with pytest.raises(ConfigError, match="window: 1 is neither"):
        sam3.install(build("Sam3Model"), student(), window=1, processor=made)


def test_pixels_of_another_size_or_range_raise(made: Any) -> None:
    model, adapted = sam3.install(build("Sam3Model"), student(), processor=made)
    words = adapted(text="cat", return_tensors="pt")
    with pytest.raises(ImageError, match=r"112x112 pixels \(HxW\) and this trunk was installed for 128x128"):
        model(pixel_values=torch.zeros(1, 3, 112, 112), **words)
    with pytest.raises(ImageError, match=r"lie in \[0.5, 1.5\] after undoing mean"):
        model(pixel_values=torch.linspace(0, 2, 128).expand(1, 3, 128, 128), **words)
    with pytest.raises(ImageError, match="nan"):
        model(pixel_values=torch.full((1, 3, 128, 128), torch.nan), **words)


def test_a_map_of_another_grid_raises(made: Any) -> None:
    model, adapted = sam3.install(build("Sam3Model"), Replay([torch.zeros(1, 32, 8, 9)]), processor=made)
    with pytest.raises(ConfigError, match="a map of 32 x 8 x 9; the decoder reads 32 channels on 8 x 8 cells"):
        model(**adapted(images=torch.zeros(3, 40, 40, dtype=torch.uint8), text="cat", return_tensors="pt"))


def test_models_modes_and_processors(made: Any, tmp_path: Path) -> None:
    model = build("Sam3Model")
    with pytest.raises(ConfigError, match="model is a Linear; supported are Sam3Model, Sam3TrackerModel"):
        sam3.install(torch.nn.Linear(1, 1), student(), processor=made)
    with pytest.raises(ConfigError, match="mode is 'nativ'; use 'native' or 'compatible'"):
        sam3.install(model, student(), mode="nativ", processor=made)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="was not loaded from a checkpoint: pass processor=, a Sam3Processor"):
        sam3.install(model, student())
    with pytest.raises(ConfigError, match="processor is a Sam3TrackerProcessor; a Sam3Model needs a Sam3Processor"):
        sam3.install(model, student(), processor=processor("Sam3TrackerModel", tmp_path))
    odd = processor("Sam3VideoModel", tmp_path)
    odd.video_processor.image_mean = [0.485, 0.456, 0.406]
    with pytest.raises(ConfigError, match=r"video_processor normalises with .*0.485"):
        sam3.install(build("Sam3VideoModel"), student(), processor=odd)
    assert sam3.install(build("Sam3TrackerModel"), student()).processor.target_size == 128


def test_a_checkpoint_without_processor_files(tmp_path: Path) -> None:
    build("Sam3Model").save_pretrained(tmp_path / "bare")
    with pytest.raises(AssetError, match=r"no processor in .*bare.*pass processor="):
        sam3.install(T.Sam3Model.from_pretrained(tmp_path / "bare"), student())


def test_a_trunk_without_configuration_cannot_be_reloaded(made: Any, tmp_path: Path) -> None:
    model, _ = sam3.install(build("Sam3Model"), Replay([torch.zeros(1, 32, 8, 8)]), processor=made)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="not an agglo model as its trunk"):
        T.Sam3Model.from_pretrained(tmp_path)


def test_sam_refuses_other_models(tmp_path: Path) -> None:
    stock = T.SamModel.from_pretrained(tiny_sam(tmp_path)).eval()
    with pytest.raises(ConfigError, match="model is a Linear; pass a SamModel"):
        sam.install(torch.nn.Linear(1, 1), student(16, "sam"))
    with pytest.raises(ConfigError, match=r"takes 12 or 16 channels, and none has them: sam \(20\)"):
        sam.install(stock, student(20, "sam"))
    with pytest.raises(ConfigError, match="window 3 does not divide the 4x4 patches"):
        sam.install(stock, student(16, "sam"), window=3)
    installed = sam.install(stock, student(16, "sam")).model
    with pytest.raises(ConfigError, match="model is a AggloSamModel"):
        sam.install(installed, student(16, "sam"))


def test_phrases_that_the_text_encoder_would_cut(tmp_path: Path) -> None:
    loaded = Sam3(tiny_sam3(tmp_path), "test")
    assert tokenize(loaded.tokenizer, ["cat", "dog"], 16, "test")["input_ids"].shape == (2, 16)
    with pytest.raises(ConfigError, match="test: text 1 is empty; write the concept"):
        tokenize(loaded.tokenizer, ["cat", "  "], 16, "test")
    with pytest.raises(ConfigError, match="has 20 tokens and SAM 3's text encoder takes 16; shorten it"):
        tokenize(loaded.tokenizer, ["abcdefghijklmnopqr"], 16, "test")


def test_missing_and_gated_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"test: no SAM 3 in .*nowhere.*such as facebook/sam3"):
        load(str(tmp_path / "nowhere"), "test")
    gated = OSError("no access")
    gated.__cause__ = type("GatedRepoError", (OSError,), {})()  # as huggingface_hub's, below transformers' own
    assert "accept its licence" in advice(gated)


def test_compatible_mode_leaves_the_configuration_as_it_was(made: Any) -> None:
    model, adapted = sam3.install(build("Sam3Model"), student(), mode="compatible", processor=made)
    trunk = model.config.vision_config.backbone_config
    assert (trunk.image_size, trunk.patch_size, adapted.image_processor.size.height) == (112, 14, 112)
    inner = SimpleNamespace(seen=None)
    encoder = model.vision_encoder.backbone.encoder.student
    encoder.student.register_forward_pre_hook(lambda _, given: setattr(inner, "seen", given[0].shape[-2:]))
    model.vision_encoder(torch.zeros(1, 3, 112, 112))
    assert inner.seen == (128, 128)
