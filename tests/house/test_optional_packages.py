"""Optional packages are imported lazily, in the few files that are about them."""

from __future__ import annotations

import ast

import pytest

from support import source

ALLOWED: dict[str, set[str]] = {
    "timm": {
        "weights/bundled.py",
        "students/timm.py",
        "teachers/_backbone.py",
        "teachers/timm.py",
        "teachers/conse.py",
    },
    "torchvision": set(),
    "transformers": {
        "decoders/sam.py",
        "decoders/sam3.py",
        "integrations/_trunk.py",
        "integrations/sam.py",
        "integrations/sam3.py",
        "segmentation/run.py",
        "teachers/_families.py",
        "text/minilm.py",
        "text/siglip2.py",
    },
    "tokenizers": {"text/minilm.py", "text/siglip2.py"},
    "open_clip": {"sources/imagenet.py", "evals/zero_shot.py", "teachers/open_clip.py", "text/open_clip.py"},
    "sentence_transformers": set(),
    "tensorboard": {"training/progress.py"},
    "torch.utils.tensorboard": {"training/progress.py"},
    "skimage": set(),  # its photographs are read from its folder
    "sklearn": {"integrations/fiftyone/neighbours.py", "integrations/fiftyone/scores.py"},
    "scipy": {"evals/_concepts.py", "integrations/fiftyone/maps.py", "sources/nyu.py"},
    "h5py": {"sources/nyu.py"},
    "pyarrow": {"cli/models.py", "embedding/encoding.py", "embedding/tables.py", "sources/huggingface.py"},
    "onnx": {"exports/_graph.py"},
    "onnxscript": {"exports/_graph.py"},
    "onnxruntime": {"runtimes/onnx.py"},
    "openvino": {"exports/openvino.py", "runtimes/openvino.py"},
    "pandas": set(),
    "matplotlib": set(),
    "datasets": {"sources/huggingface.py"},
    "fsspec": {"sources/_shards.py", "sources/huggingface.py"},
    "simplejpeg": {"sources/_jpeg.py"},
    "webdataset": set(),  # shards have an index of our own; only tests use it
    "mitsuba": set(),  # only benchmarks/scenes renders
    "huggingface_hub": {"hub.py"},
    "fiftyone": {
        "cli/curation.py",
        *(
            f"integrations/fiftyone/{name}.py"
            for name in (
                *("duplicates", "encoding", "form", "index", "layout", "maps", "model", "pipeline", "reading"),
                *("records", "scores", "vectors", "zoo"),
            )
        ),
    },
    "eta": {"integrations/fiftyone/reading.py"},
    "umap": {"integrations/fiftyone/layout.py"},
    "bson": {"integrations/fiftyone/records.py"},
}
"""Optional package → the files that may import it, always inside a function."""

TORCH_FREE = {"__init__.py", "types.py", "config.py", "recipe.py", "extras.py", "weights/bundled.py", "cli/main.py"}
"""Modules behind ``agglo --help``, ``agglo kinds`` and ``agglo recipes``: they must not import torch at the top."""


def package_of(module: str) -> str | None:
    matches = [package for package in ALLOWED if module == package or module.startswith(package + ".")]
    return max(matches, key=len) if matches else None


def imports(path):
    """``(module, line, lazy)`` of every import, those through ``extras.require`` and ``importlib`` included."""

    def visit(node: ast.AST, lazy: bool):
        for child in ast.iter_child_nodes(node):
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module, child.lineno, lazy
                yield from ((f"{child.module}.{alias.name}", child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in ("require", "import_module"):
                first = child.args[0] if child.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield first.value, child.lineno, lazy
            yield from visit(child, inner)

    yield from visit(source.tree(path), False)


def test_optional_packages_are_imported_in_their_files():
    misplaced, eager = [], []
    for path in source.files():
        where = source.name(path)
        for module, line, lazy in imports(path):
            package = package_of(module)
            if package is None:
                continue
            if where not in ALLOWED[package]:
                misplaced.append(f"{where}:{line} imports {module}; allowed in {sorted(ALLOWED[package]) or 'no file'}")
            if not lazy:
                eager.append(f"{where}:{line} imports {module} at the top; move the import into a function")
    assert not misplaced + eager, "\n".join(misplaced + eager)


@pytest.mark.parametrize("name", sorted(TORCH_FREE))
def test_light_modules_do_not_import_torch(name):
    path = source.ROOT / name
    eager = {module.split(".")[0] for module, _, lazy in imports(path) if not lazy}
    assert not eager & {"torch", "numpy"}


def test_every_form_of_import_is_found(tmp_path, monkeypatch):
    file = tmp_path / "odd.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\nimport timm.models\n"
        "def f():\n    from torch.utils import tensorboard\n    return require('transformers.models', 'x')\n"
    )
    seen = {(package_of(module), lazy) for module, _, lazy in imports(file)} - {(None, False), (None, True)}
    assert seen == {("timm", False), ("torch.utils.tensorboard", True), ("transformers", True)}


def test_no_import_allowance_is_unused():
    used = {(package_of(module), source.name(p)) for p in source.files() for module, _, _ in imports(p)}
    used_packages = {package for package, _ in used}
    for package, files in ALLOWED.items():
        if package in used_packages:
            assert any((package, file) in used for file in files)
