"""Videos: objects are followed as transformers does, and frames are read one at a time from whatever holds them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from agglo.evals._concepts import decoded
from agglo.integrations.sam3 import install
from agglo.preprocess import read_image
from agglo.segmentation import frames as module
from agglo.segmentation.frames import as_frames
from agglo.segmentation.video import segment_video
from agglo.types import ConfigError, ImageError, MissingExtraError
from support.commands import agglo as command
from support.sam3 import T, released

pytest.importorskip("torchvision")
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore:.*kernels library.*")]

PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (50, 70, 3), np.uint8))
CLIP = [PICTURE, PICTURE.rotate(5), PICTURE.rotate(10)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return released(tmp_path_factory.mktemp("video"))


@pytest.mark.parametrize("prompt", [{"text": ["cat", "dog"]}, {"points": [(12, 30)]}])
def test_objects_are_followed_as_transformers_does(files: dict[str, str], prompt: dict[str, Any]) -> None:
    found, read = [], []
    for each in segment_video(CLIP, **prompt, **files, progress=lambda *at: read.append(at)):
        assert not torch.is_inference_mode_enabled()  # the caller's code stays what it was
        found.append(each)
    assert len(found) == 3 and sorted(set(read)) == [(1, 3), (2, 3), (3, 3)]
    kind = T.Sam3VideoModel if "text" in prompt else T.Sam3TrackerVideoModel
    model, made = install(kind.from_pretrained(files["decoder"]).eval(), files["model"])
    session = made.init_video_session(video=[np.array(frame) for frame in CLIP])
    with torch.inference_mode():
        if "text" in prompt:
            made.add_text_prompt(session, prompt["text"])
        else:
            made.add_inputs_to_inference_session(session, 0, 1, input_points=[[[[12, 30]]]], input_labels=[[[1]]])
            model(session, frame_idx=0)
        for mine, out in zip(found, model.propagate_in_video_iterator(session), strict=True):
            if "text" in prompt:
                stated = made.postprocess_outputs(session, out)
                wanted, numbers = stated["masks"], stated["object_ids"].tolist()
            else:
                full = torch.nn.functional.interpolate(out.pred_masks, (50, 70), mode="bilinear", align_corners=False)
                wanted = full[:, 0] > 0
                wanted = wanted[wanted.any(2).any(1)]
                numbers = [1] * len(wanted)
            assert (mine.masks == wanted.numpy()).all() and list(mine.tracks or ()) == numbers
            assert set(mine.labels) <= {"cat", "dog", "points"}
    assert any(len(each) for each in found)


def written(path: Path, images: list[Image.Image]) -> Path:
    """A video file, by its ending."""
    if path.suffix == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:])
        return path
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = images[0].width, images[0].height, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("ending", [".gif", ".mp4", ""])
def test_frames_are_read_in_order_from_files_and_folders(ending: str, tmp_path: Path) -> None:
    images = [Image.new("RGB", (64, 48), (20 * index, 0, 0)) for index in range(12)]
    path = tmp_path / f"clip{ending}"
    if ending:
        written(path, images)
    else:
        path.mkdir()
        for index, image in enumerate(images):
            image.save(path / f"{index}.png")  # 10.png comes after 9.png
    frames = as_frames(path)
    assert len(frames) == 12 and frames.size == (48, 64)
    for index in (0, 1, 5, 11, 3, 3, 0):  # going back starts the file again
        assert abs(frames.read(index).getpixel((5, 5))[0] - 20 * index) < 6
    shown = frames.reopen()
    assert abs(shown.read(2).getpixel((5, 5))[0] - 40) < 6 and shown.name(2) == frames.name(2)


@pytest.mark.parametrize("ending", ["gif", "png", "tiff"])
def test_frames_of_an_animation_have_the_pixels_of_images(ending: str, tmp_path: Path) -> None:
    """Transparency is composited over white, as in a file of one image."""
    clear = Image.new("RGBA", (64, 48), (200, 10, 10, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 30, 48))
    path = tmp_path / f"clip.{ending}"
    options = {} if ending == "tiff" else {"disposal": 2 if ending == "gif" else 1}
    clear.save(path, save_all=True, append_images=[clear.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], **options)
    frames = as_frames(path)
    assert (np.asarray(frames.read(0)) == np.asarray(read_image(path))).all()
    assert [frames.read(0).getpixel((5, 5)), frames.read(1).getpixel((60, 5))] == [(255, 255, 255)] * 2


def test_command_writes_frames_of_several_videos(files: dict[str, str], tmp_path: Path) -> None:
    clips = [written(tmp_path / name, CLIP) for name in ("a.gif", "b.gif")]
    options = ["-m", files["model"], "--decoder", files["decoder"], "-o", tmp_path / "out"]
    done = command("segment", *clips, "-t", "cat,dog", *options)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    facts = json.loads((tmp_path / "out" / "images.json").read_text())
    direct = [each for clip in clips for each in segment_video(clip, ["cat", "dog"], **files)]
    assert len(rows) == sum(map(len, direct)) > 0 and len(facts["images"]) == 6
    assert {each["name"] for each in facts["categories"]} <= {"cat", "dog"}
    first = [row for row in rows if row["image_id"] == 1]
    for row, mask, track in zip(first, direct[0].masks, direct[0].tracks or (), strict=True):
        assert (decoded(row["segmentation"], (50, 70), "a") == mask).all() and row["track_id"] == track
    for name in ("a", "b"):
        with Image.open(tmp_path / "out" / "overlays" / name / "00002.png") as overlay:
            assert overlay.size == (70, 50)
    one = sorted((tmp_path / "out" / "masks" / "a" / "00000").iterdir())
    assert len(one) == len(first) and one[0].name.startswith(f"000-{first[0]['category']}_{first[0]['track_id']}-")


def test_interrupted_command_keeps_the_frames_so_far(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, read = written(tmp_path / "a.gif", CLIP), as_frames(CLIP).read

    def stop_at_the_last(self: Any, index: int) -> Image.Image:
        if index == 2:
            raise KeyboardInterrupt
        return read(index)

    monkeypatch.setattr(module._File, "read", stop_at_the_last)
    options = ["-m", files["model"], "--decoder", files["decoder"], "-o", tmp_path / "out"]
    done = command("segment", clip, "--points", "12,30,1", *options)
    assert done.exit_code == 130 and "interrupted" in done.output
    assert len(json.loads((tmp_path / "out" / "images.json").read_text())["images"]) == 2


def test_frames_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=r"frame00001: is 50x20 pixels \(HxW\) and the frames before it 50x70"):
        as_frames([PICTURE, PICTURE.crop((0, 0, 20, 50))])
    with pytest.raises(ConfigError, match="a video without frames"):
        as_frames([])
    with pytest.raises(ConfigError, match=r"no video .*nowhere.mp4: name a file, or a folder of frames"):
        as_frames(tmp_path / "nowhere.mp4")
    folder = tmp_path / "clip"
    folder.mkdir()
    for index in range(3):
        PICTURE.save(folder / f"{index}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"1.png"):
        as_frames(folder)
    broken = written(tmp_path / "a.gif", CLIP)
    broken.write_bytes(broken.read_bytes()[:9000])
    with pytest.raises(ImageError, match=r"a.gif/0000[12]: (cannot be decoded|damaged image file)"):
        as_frames(broken)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ImageError, match=r"text.mp4/00000: cannot be decoded"):
        as_frames(tmp_path / "text.mp4")

    def absent(name: str, extra: str) -> None:
        raise MissingExtraError(f"{name} of {extra}", name=name)

    monkeypatch.setattr(module, "require", absent)
    with pytest.raises(MissingExtraError, match="av of video"):
        as_frames(tmp_path / "text.mp4")


def test_rotation_stored_in_a_video_file_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    wide = Image.new("RGB", (64, 48))
    wide.paste((250, 0, 0), (0, 0, 32, 48))  # red at the left
    path = written(tmp_path / "a.mp4", [wide])
    decode = av.container.InputContainer.decode

    class Turned:
        def __init__(self, frame: Any) -> None:
            self.to_image, self.rotation = frame.to_image, 90  # anticlockwise

    fake = SimpleNamespace(error=av.error, open=lambda name: Opened(av.open(name)))

    class Opened:
        def __init__(self, inner: Any) -> None:
            self.inner, self.streams = inner, inner.streams

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.inner.close()

        def decode(self, video: int) -> Any:
            return map(Turned, decode(self.inner, video=video))

    monkeypatch.setattr(module, "require", lambda *_: fake)
    frames = as_frames(path)
    assert frames.size == (64, 48)
    assert frames.read(0).getpixel((24, 60))[0] > 200 > 50 > frames.read(0).getpixel((24, 4))[0]


def test_prompts_and_options_of_videos(files: dict[str, str], tmp_path: Path) -> None:
    clip = written(tmp_path / "a.gif", CLIP)
    with pytest.raises(ConfigError, match="has 39 tokens and SAM 3's text encoder takes 32"):
        segment_video(CLIP, "abcdefghijklmnopqrstuvwxyzabcdefghijk", **files)
    with pytest.raises(ConfigError, match="point 71,3 is not inside frame00000, 70 pixels wide and 50 high"):
        segment_video(CLIP, points=[(71, 3)], **files)
    PICTURE.save(tmp_path / "b.png")
    for arguments, message in (
        (["--box", "1,2,3,4"], "videos take --text or --points"),
        (["-t", "cat", "--threshold", "0.2"], "--threshold: SAM 3 has its own thresholds for videos"),
        (["-t", "cat", tmp_path / "b.png"], "a.gif is a video and others are not"),
    ):
        done = command("segment", clip, *arguments, "-o", tmp_path / "out")
        assert done.exit_code == 2 and message in done.output
