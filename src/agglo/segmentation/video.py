"""Objects followed through the frames of a video, by SAM 3's video models on a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agglo.decoders.sam3 import text_length, tokenize
from agglo.integrations.sam3 import install
from agglo.model.inputs import ImageLike
from agglo.model.model import Model
from agglo.segmentation.frames import Frames, as_frames
from agglo.segmentation.instances import Instances, boxes_of
from agglo.segmentation.prompts import Point, Prompts
from agglo.segmentation.run import DECODER, STUDENT, load_tracked
from agglo.zoo.loading import load as load_model

Progress = Callable[[int, int], None]
"""Called with (number of a frame, number of frames) before the frame is encoded."""
_WHERE = "segment"


def segment_video(
    video: str | Path | Sequence[ImageLike] | Frames,
    text: str | Sequence[str] | None = None,
    *,
    points: Sequence[Point] = (),
    model: Model | str | None = None,
    decoder: str = DECODER,
    head: str | None = None,
    window: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Iterator[Instances]:
    """Follow what texts describe, or the object at points of the first frame, through a video.

    Frames are read one at a time; what the tracker remembers of each object grows with their number. An object keeps
    its number (``tracks``) in all frames. Released SAM 3 decides
    15 frames later whether a detected object was one: results arrive with that delay. Boxes are not supported.

    Args:
        video: a folder of frames, an animation, a video file, images in order, or :class:`Frames`; see
            :func:`agglo.segmentation.frames.as_frames`.
        text: a concept, or several.
        points: as in :func:`agglo.segment`, in the first frame.
        model, decoder, head, window, device: as in :func:`agglo.segment`.
        progress: called when a frame is read.

    Returns:
        An iterator of one :class:`~agglo.segmentation.instances.Instances` per frame.

    Raises:
        ConfigError: no frames, no prompt or a wrong one, a student that does not fit.
        ImageError: a frame cannot be read or has another size than the first.
        AssetError: a checkpoint cannot be read, or has no tracker.
        MissingExtraError: a video file, and PyAV is not installed.
    """
    prompts = Prompts.of(text, (), points)
    frames = video if isinstance(video, Frames) else as_frames(video)
    prompts.check_inside(frames.size, frames.name(0))
    sam = load_tracked(decoder, "Sam3TrackerVideoModel" if prompts.points else "Sam3VideoModel")
    chosen = STUDENT if model is None else model
    student = load_model(chosen, heads=[head or "sam3"]) if isinstance(chosen, str) else chosen
    tracker, processor = install(sam, student, window=window, head=head)
    tracker.to(device).eval()
    if prompts.texts:
        tokenize(processor.tokenizer, prompts.texts, text_length(tracker.detector_model), _WHERE)  # long texts raise
    session = processor.init_video_session(inference_device=device, dtype=torch.float32)
    session.video_height, session.video_width = frames.size
    session.processed_frames = _Pixels(frames, processor.video_processor, progress)
    follow = _by_points if prompts.points else _by_texts
    return follow(tracker, processor, session, prompts, frames)


class _Pixels:
    """In the place of the session's dict of all frames: a frame is read and prepared when the model asks for it."""

    def __init__(self, frames: Frames, prepare: Any, progress: Progress | None) -> None:
        self._frames, self._prepare, self._progress = frames, prepare, progress

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Tensor:
        if self._progress is not None:
            self._progress(index + 1, len(self))
        image = np.asarray(self._frames.read(index))
        return self._prepare(videos=[[image]], return_tensors="pt").pixel_values_videos[0][0]


@torch.inference_mode()
def _by_texts(sam: Any, processor: Any, session: Any, prompts: Prompts, frames: Frames) -> Iterator[Instances]:
    processor.add_text_prompt(session, list(prompts.texts))
    for out in sam.propagate_in_video_iterator(session):
        found = processor.postprocess_outputs(session, out)
        texts = {number: text for text, numbers in found["prompt_to_obj_ids"].items() for number in numbers}
        numbers = tuple(found["object_ids"].tolist())
        masks = found["masks"].cpu().numpy()
        scores = found["scores"].float().cpu().numpy()
        labels = tuple(texts[number] for number in numbers)
        yield Instances(frames.name(int(out.frame_idx)), frames.size, masks, scores, boxes_of(masks), labels, numbers)


@torch.inference_mode()
def _by_points(sam: Any, processor: Any, session: Any, prompts: Prompts, frames: Frames) -> Iterator[Instances]:
    size = frames.size
    processor.add_inputs_to_inference_session(
        session,
        frame_idx=0,
        obj_ids=1,
        input_points=[[[[x, y] for x, y, _ in prompts.points]]],
        input_labels=[[[int(label) for *_, label in prompts.points]]],
    )
    sam(session, frame_idx=0)
    for out in sam.propagate_in_video_iterator(session):
        masks = processor.post_process_masks([out.pred_masks], [list(size)])[0][:, 0].cpu().numpy()
        scores = out.object_score_logits.flatten().sigmoid().float().cpu().numpy()
        kept = masks.any((1, 2))
        masks = masks[kept]
        count = len(masks)
        yield Instances(
            frames.name(int(out.frame_idx)), size, masks, scores[kept], boxes_of(masks), ("points",) * count,
            (1,) * count,
        )  # fmt: skip
