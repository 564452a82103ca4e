"""Every layer is PyTorch's own, called through its forward: hooks, quantisers, compilers and exporters see it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.export import Dim
from torch.overrides import TorchFunctionMode

from agglo.model.model import HeadConfig, Model

pytestmark = pytest.mark.libraries

VIT: dict[str, Any] = {"kind": "vit", "width": 32, "depth": 2, "heads": 2, "max_grid": 8}
STUDENTS: list[dict[str, Any]] = [
    VIT,
    VIT | {"mlp": "swiglu", "window": 2, "num_global": 1},
    {"kind": "vit_1d", "width": 32},
    {"kind": "hybrid"},
]
HEADS = {
    "a": HeadConfig({"kind": "mlp", "hidden": 8, "inner": 1}, {"kind": "mlp", "hidden": 8, "upsample": 2}, 5, 6),
    "b": HeadConfig({"kind": "vocabulary", "classes": 7}, {"kind": "attention", "heads": 2, "hidden": 8}, 5, 6),
}


class Encoder(nn.Module):
    """A model from pixels to all its features, as tensors."""

    def __init__(self, student: dict[str, Any], heads: dict[str, HeadConfig] = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Model(student, heads).eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model.decode(self.model.encode(images))
        features = [(out.summary, out.spatial), *((f.summary, f.spatial) for f in out.heads.values())]
        return tuple(tensor for pair in features for tensor in pair if tensor is not None)


def largest_difference(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


class Called(TorchFunctionMode):
    """The functions that a forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("student", STUDENTS, ids=lambda s: f"{s['kind']}-{s.get('mlp', 'gelu')}")
def test_linear_layers_are_pytorchs_and_called_through_forward(student: dict[str, Any]) -> None:
    encoder, called = Encoder(student), set()
    layers = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        assert type(layer) is nn.Linear, name
        layer.register_forward_hook(lambda module, args, out, name=name: called.add(name))
    with torch.no_grad(), Called() as mode:
        encoder(torch.rand(2, 3, 64, 64))
    assert called == set(layers)
    assert F.scaled_dot_product_attention in mode.functions
    assert mode.functions.count(F.linear) >= len(layers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*are deprecated and will be removed:UserWarning")
@pytest.mark.parametrize("student", STUDENTS, ids=lambda s: f"{s['kind']}-{s.get('mlp', 'gelu')}")
def test_dynamic_quantisation_replaces_every_linear_layer(student: dict[str, Any]) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this PyTorch has no quantised operators")
    encoder, images = Encoder(student), torch.rand(2, 3, 64, 64)
    expected = encoder(images)
    swapped = torch.ao.quantization.quantize_dynamic(copy.deepcopy(encoder), {nn.Linear}, dtype=torch.qint8)
    kinds = {name: type(module) for name, module in swapped.named_modules()}
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    assert all(kinds[name] is torch.ao.nn.quantized.dynamic.Linear for name in linear)
    found = swapped(images)
    assert largest_difference(found, expected) > 0
    assert float(torch.cosine_similarity(found[0], expected[0]).min()) > 0.99


class Doubled(torch.Tensor):
    """A tensor subclass that implements ``F.linear`` alone, as quantised weights do."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], 2 * args[1].as_subclass(torch.Tensor), *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_of_tensor_subclasses_are_used() -> None:
    encoder, images = Encoder(VIT, {}), torch.rand(1, 3, 64, 64)
    doubled = copy.deepcopy(encoder)
    for layer in doubled.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data *= 0.5
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    with torch.no_grad():
        # The patch embedding, and four layers in each of two blocks.
        assert sum(isinstance(p, Doubled) for p in doubled.parameters()) == 9
        assert largest_difference(doubled(images), encoder(images)) < 1e-5


@pytest.mark.parametrize("student", [VIT, VIT | {"window": 2, "num_global": 1}], ids=["global", "windows"])
def test_a_student_compiles_to_one_graph(student: dict[str, Any]) -> None:
    model, images = Encoder(student, {}).model.student, torch.rand(2, 3, 64, 96)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(found.spatial, model(images).spatial)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("student", "example"),
    [
        (VIT, (48, 64)),
        (VIT, (128, 128)),  # the position table's own size
        (VIT | {"position": "corner"}, (48, 64)),
        (VIT | {"window": 2, "num_global": 1}, (96, 64)),
        ({"kind": "vit_1d", "width": 32}, (64, 96)),
    ],
    ids=["wide", "table", "corner", "windows", "vit_1d"],
)
def test_one_exported_program_takes_any_batch_and_size(student: dict[str, Any], example: tuple[int, int]) -> None:
    encoder = Encoder(student)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(encoder, (torch.rand(2, 3, *example),), dynamic_shapes=(free,)).module()
    batch = 2 if "window" in student else 1  # torch.export makes a single row of windows, or image, a special case
    for shape in ((batch, 3, 64, 128), (3, 3, 128, 64), (2, 3, 128, 128), (2, 3, 192, 160)):
        images = torch.rand(shape)
        with torch.no_grad():
            assert largest_difference(program(images), encoder(images)) < 1e-4, shape


def test_tensor_parallel_layers_give_the_same_features() -> None:
    """``parallelize_module`` shards the products of every block as DTensors."""
    encoder, images = Encoder(VIT), torch.rand(2, 3, 64, 64)
    expected = encoder(images)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plan = {"blocks.*.mlp.fc1": ColwiseParallel(), "blocks.*.mlp.fc2": RowwiseParallel()}
        parallelize_module(encoder.model.student, mesh, plan)
        sharded = [name for name, weight in encoder.named_parameters() if isinstance(weight, DTensor)]
        with torch.no_grad():
            found = encoder(images)
    finally:
        dist.destroy_process_group()
    assert len(sharded) == 4 * VIT["depth"]
    assert largest_difference(found, expected) < 1e-6
