"""Images per second through FiftyOne, against `agglo embed` and against the community plugin's way of working.

Everyone has the same weights (agglo-lite), photographs, threads, workers and input sizes. The plugin's way is rebuilt
from a description of it: one image per forward pass, the processor in the main process (workers only decode), and one
model for each kind of output; a heatmap is one principal component of that image alone, smoothed, at the image's full
size. Each contender is a process of its own, so that its peak memory is known; they take turns, round by round, and a
ratio is the median of the per-round ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

THREADS, WORKERS, BATCH = 2, 2, 32
SQUARE, LONGER = 224, 512
"""Pixels of the input: side of the centre square of summaries; longer side of the whole image where maps are drawn."""

CONTENDERS = ("agglo embed", "ours, summaries", "plugin's way, summaries", "ours, both", "plugin's way, both")


# --- in the contender's process ---------------------------------------------------------------------------------------


def plugin_model(model: Any, output: str, square: bool) -> Any:
    """A FiftyOne model that works as the plugin does: `output` is ``summary`` or ``spatial``."""
    import fiftyone as fo
    import fiftyone.core.models as fom
    import numpy as np
    import torch
    from fiftyone.utils.torch import GetItem
    from PIL import Image
    from scipy.ndimage import gaussian_filter
    from skimage.transform import resize
    from sklearn.decomposition import PCA
    from transformers import CLIPImageProcessor

    from agglo.preprocess import aspect_size

    processor = CLIPImageProcessor(do_normalize=False, do_center_crop=square, crop_size=SQUARE)

    class Decode(GetItem):
        @property
        def required_keys(self) -> list[str]:
            return ["filepath"]

        def __call__(self, d: dict[str, Any]) -> Any:
            return Image.open(d["filepath"]).convert("RGB")

    class OneByOne(fom.Model, fom.EmbeddingsMixin, fom.SupportsGetItem, fom.TorchModelMixin):
        media_type, ragged_batches, transforms, preprocess = "image", False, None, False
        has_embeddings = has_collate_fn = True
        collate_fn = staticmethod(list)

        def build_get_item(self, field_mapping: Any = None) -> Any:
            return Decode(field_mapping=field_mapping)

        def run(self, image: Any) -> Any:
            if square:
                size: dict[str, int] = {"shortest_edge": SQUARE}
            else:
                height, width = aspect_size((image.height, image.width), (LONGER, LONGER), model.step(), inside=True)
                size = {"height": height, "width": width}
            pixels = processor(images=image, size=size, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                return model(pixels, heads=(), resize=False)

        def predict(self, arg: Any) -> Any:
            return self.predict_all([arg])[0]

        def embed(self, arg: Any) -> Any:
            return self.embed_all([arg])[0]

        def embed_all(self, args: Sequence[Any]) -> list[Any]:
            return [self.run(image).summary[0].numpy() for image in args]

        def predict_all(self, args: Sequence[Any]) -> list[Any]:
            return [self.heatmap(image) for image in args]

        def heatmap(self, image: Any) -> Any:
            spatial = self.run(image).spatial[0].numpy()
            tokens = np.nan_to_num(spatial.reshape(len(spatial), -1).T)
            tokens = tokens.clip(*np.percentile(tokens, (1, 99)))
            values = PCA(1).fit_transform(tokens).reshape(spatial.shape[1:])
            values = resize(gaussian_filter(values, 1.51), (image.height, image.width))
            values = (values - values.min()) / max(values.max() - values.min(), 1e-9)
            return fo.Heatmap(map=(values * 255).astype(np.uint8), range=[0, 255])

    del output
    return OneByOne()


def contender(name: str, paths: list[str]) -> Callable[[], None]:
    """What one round of a contender does; models are loaded and the dataset is made before."""
    import agglo

    if name == "agglo embed":
        embedder = agglo.load("agglo-lite", heads=None)
        return lambda: agglo.embed(paths, embedder, batch=BATCH) and None
    import fiftyone as fo

    from agglo.integrations.fiftyone import load_model

    dataset = fo.Dataset()
    dataset.add_samples([fo.Sample(filepath=path) for path in paths], progress=False)
    options = {"batch_size": BATCH, "num_workers": WORKERS, "progress": False, "skip_failures": False}
    both = name.endswith("both")
    calls: list[Callable[[], Any]]
    if name.startswith("ours") and both:
        ours = load_model("agglo-lite", output_type="all", max_size=LONGER, apply_smoothing=True)
        calls = [lambda: dataset.apply_model(ours, label_field="radio", **options)]
    elif name.startswith("ours"):
        ours = load_model("agglo-lite")
        calls = [lambda: dataset.compute_embeddings(ours, embeddings_field="radio_summary", **options)]
    else:
        kinds = ("summary", "spatial") if both else ("summary",)
        models = {kind: plugin_model(agglo.load("agglo-lite", heads=()), kind, not both) for kind in kinds}
        calls = [lambda: dataset.compute_embeddings(models["summary"], embeddings_field="radio_summary", **options)]
        if both:
            calls.append(lambda: dataset.apply_model(models["spatial"], label_field="radio_map", **options))

    def work() -> None:
        for call in calls:
            call()
        assert len(dataset.exists("radio_summary")) == len(paths)

    return work


def memory() -> int:
    """Bytes of this process and its workers (proportional set size); FiftyOne's servers are left out."""
    import psutil

    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            if process is own or not any("mongod" in word or "service" in word for word in process.cmdline()):
                total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def serve(name: str, paths: list[str]) -> None:
    """Run a round for every line on stdin; answer with seconds and peak memory."""
    from agglo.cli.process import configure

    configure()
    import torch

    torch.set_num_threads(THREADS)
    work = contender(name, paths)
    peak, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.1):
            peak = max(peak, memory())

    work()
    print(json.dumps({"ready": True}), file=sys.__stdout__, flush=True)
    for line in sys.stdin:
        watching = line.strip() == "memory"  # reading it takes time: a round of its own
        stop.clear()
        watcher = threading.Thread(target=watch)
        if watching:
            watcher.start()
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        stop.set()
        if watching:
            watcher.join()
        print(json.dumps({"seconds": seconds, "peak": peak}), file=sys.__stdout__, flush=True)


# --- in the main process ----------------------------------------------------------------------------------------------


def photographs(count: int) -> list[str]:
    """Paths of the ImageNet samples, all of one size class."""
    from record import SHARED

    folder = SHARED / "data" / "imagenet_samples"
    found = sorted(str(path) for path in folder.glob("*.[jJ][pP]*[gG]"))[:count] if folder.is_dir() else []
    if len(found) < count:
        raise SystemExit(f"{folder} has {len(found)} photographs, {count} are needed; set AGGLO_SHARED")
    return found


def start(name: str, paths: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_DATABASE_DIR": str(folder / "database"),
        "FIFTYONE_DATABASE_NAME": f"agglo_benchmark_{os.getpid()}_{CONTENDERS.index(name)}",
        "FIFTYONE_DATABASE_VALIDATION": "false",
        "FIFTYONE_MODEL_ZOO_DIR": str(folder / "models"),
    }
    script = "import sys, json; import fiftyone_speed; fiftyone_speed.serve(sys.argv[1], json.loads(sys.argv[2]))"
    return subprocess.Popen(
        [sys.executable, "-c", script, name, json.dumps(paths)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent, env=environment,
    )  # fmt: skip


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON of a contender; others are FiftyOne's messages."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"a contender stopped with code {process.wait()}")


def ask(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return answer(process)


def run(count: int = 200, rounds: int = 5) -> dict[str, Any]:
    """Measure all contenders; returns images/s, ratios and peak memory."""
    paths = photographs(count)
    with tempfile.TemporaryDirectory(prefix="agglo-fiftyone-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "database").mkdir()
        processes: dict[str, subprocess.Popen[str]] = {}
        try:
            for name in CONTENDERS:
                processes[name] = start(name, paths, Path(folder))
                answer(processes[name])
            seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            for number in range(rounds):
                for name in CONTENDERS[number % 5 :] + CONTENDERS[: number % 5]:
                    seconds[name].append(ask(processes[name], "time")["seconds"])
                print({name: round(count / took[-1], 1) for name, took in seconds.items()}, flush=True)
            peaks = {name: ask(processes[name], "memory")["peak"] / 1e6 for name in CONTENDERS}
        finally:
            for process in processes.values():
                if process.stdin is not None:
                    process.stdin.close()
                process.wait(60)
    table: dict[str, Any] = {
        name: {
            "images_per_s": round(count / statistics.median(took), 1),
            "range": [round(count / max(took), 1), round(count / min(took), 1)],
            "peak_MB": round(peaks[name]),
        }
        for name, took in seconds.items()
    }

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True)), 2)

    return {
        "photographs": count,
        "rounds": rounds,
        "threads": THREADS,
        "workers": WORKERS,
        "batch": BATCH,
        **table,
        "ratios": {
            "summaries: ours / agglo embed (target 0.9)": ratio("ours, summaries", "agglo embed"),
            "summaries: ours / plugin's way (target 2)": ratio("ours, summaries", "plugin's way, summaries"),
            "both: ours / plugin's way (target 3)": ratio("ours, both", "plugin's way, both"),
            "both: memory of ours / plugin's way (target 1)": round(
                peaks["ours, both"] / peaks["plugin's way, both"], 2
            ),
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import record

    record.write("fiftyone_speed", run(given.photographs, given.rounds))
