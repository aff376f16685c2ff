"""Gradient graphs give what PyTorch's autograd gives, and compute nothing that is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.gradients.vjp import vjp_graph

Array = npt.NDArray[Any]
HEADER = '<ir_version: 10, opset_import: ["": 18]>'


def graph(inputs: str, output: str, body: str) -> onnx.ModelProto:
    """Parse ``float[n, 4] x`` and the like, and the nodes between."""
    model = onnx.parser.parse_model(f"{HEADER} g ({inputs}) => ({output}) {{ {body} }}")
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, values: Mapping[str, Array]) -> dict[str, Array]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    results = session.run(None, {name: values[name] for name in names})
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, results, strict=True))


def values_for(model: onnx.ModelProto, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    values: dict[str, Array] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in dims]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        is_float = dtype == np.float32
        drawn = generator.standard_normal(shape) if is_float else generator.integers(0, 2, shape)
        values[value.name] = np.asarray(drawn).astype(dtype)
    return values


def assert_equal(found: Array, expected: torch.Tensor) -> None:
    assert found.shape == tuple(expected.shape)
    largest = max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5 * largest)


def check(
    model: onnx.ModelProto,
    function: Callable[..., torch.Tensor],
    wrt: str,
    sizes: Mapping[str, int] | None = None,
    change: Callable[[Array], Array] = lambda value: value,
) -> onnx.ModelProto:
    """Compare with autograd of a function that takes the graph's inputs in their order."""
    names = wrt.split()
    pulled = vjp_graph(model, model.graph.output[0].name, {name: f"{name}_grad" for name in names})
    for round_number in range(2):
        sizes = {name: size + round_number for name, size in (sizes or {}).items()}
        values = values_for(model, sizes, seed=round_number)
        values = {
            name: change(value) if value.dtype == np.float32 else value
            for name, value in values.items()
        }
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        for name in names:
            tensors[name].requires_grad_()
        result = function(*tensors.values())
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(result.shape, generator=generator, dtype=result.dtype)
        expected = torch.autograd.grad(result, [tensors[name] for name in names], gradient)
        found = run(pulled, values | {"gradient": gradient.numpy()})
        for name, reference in zip(names, expected, strict=True):
            assert_equal(found[f"{name}_grad"], reference)
    return pulled


UNARY: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "Abs": ("Abs(x)", torch.abs),
    "Cos": ("Cos(x)", torch.cos),
    "Dropout": ("Dropout(x)", lambda x: x),
    "Erf": ("Erf(x)", torch.erf),
    "Exp": ("Exp(x)", torch.exp),
    "HardSigmoid": ("HardSigmoid <alpha = 0.3> (x)", lambda x: (0.3 * x + 0.5).clamp(0, 1)),
    "Identity": ("Identity(x)", lambda x: x),
    "LeakyRelu": ("LeakyRelu <alpha = 0.2> (x)", lambda x: F.leaky_relu(x, 0.2)),
    "Neg": ("Neg(x)", torch.neg),
    "Reciprocal": ("Reciprocal(x)", torch.reciprocal),
    "Relu": ("Relu(x)", torch.relu),
    "Sigmoid": ("Sigmoid(x)", torch.sigmoid),
    "Sin": ("Sin(x)", torch.sin),
    "Softplus": ("Softplus(x)", F.softplus),
    "Tanh": ("Tanh(x)", torch.tanh),
    "Log": ("Log(x)", torch.log),
    "Sqrt": ("Sqrt(x)", torch.sqrt),
    "Softmax": ("Softmax(x)", lambda x: x.softmax(-1)),
    "Softmax-1": ("Softmax <axis = 1> (x)", lambda x: x.softmax(1)),
    "LogSoftmax": ("LogSoftmax(x)", lambda x: x.log_softmax(-1)),
}


@pytest.mark.parametrize("name", UNARY)
def test_an_operator_of_one_input_pulls_back_as_autograd_does(name: str) -> None:
    body, function = UNARY[name]
    positive = name in {"Log", "Sqrt", "Reciprocal"}
    model = graph("float[n, 3, 4] x", "float[n, 3, 4] y", f"y = {body}")
    change = (lambda value: np.abs(value) + 0.5) if positive else lambda value: value
    check(model, function, "x", {"n": 2}, change)


# inputs, output, nodes, function, what to differentiate by
CASES: dict[str, tuple[str, str, str, Callable[..., torch.Tensor], str]] = {
    "pow": (
        "float[n, 4] x", "float[n, 4] y",
        ("two = Constant <value = float {2.0}> () three = Constant <value = float {3.0}> ()"
        "a = Pow(x, two) b = Pow(x, three) y = Add(a, b)"),
        lambda x: x**2 + x**3, "x",
    ),
    "square by product": ("float[n, 4] x", "float[n, 4] y", "y = Mul(x, x)", lambda x: x * x, "x"),
    "clip": (
        "float[n, 4] x", "float[n, 4] y",
        ("low = Constant <value = float {-0.5}> () high = Constant <value = float {0.7}> ()"
        "y = Clip(x, low, high)"),
        lambda x: x.clamp(-0.5, 0.7), "x",
    ),
    "max": (
        "float[n, 4] a, float[4] b", "float[n, 4] y", "y = Max(a, b)", torch.maximum, "a b",
    ),
    "min": (
        "float[n, 4] a, float[n, 1] b", "float[n, 4] y", "y = Min(a, b)", torch.minimum, "a b",
    ),
    "where": (
        "bool[n, 4] c, float[n, 4] a, float[4] b", "float[n, 4] y", "y = Where(c, a, b)",
        lambda c, a, b: torch.where(c.bool(), a, b), "a b",
    ),
    "cast": (
        "float[n, 4] x", "double[n, 4] y", "y = Cast <to = 11> (x)", torch.Tensor.double, "x",
    ),
    "variadic sum": (
        "float[n, 4] a, float[4] b, float[n, 1] c", "float[n, 4] y", "y = Sum(a, b, c)",
        lambda a, b, c: a + b + c, "a b c",
    ),
    "matmul by a weight": (
        "float[n, t, 4] a, float[4, 5] b", "float[n, t, 5] y", "y = MatMul(a, b)",
        torch.matmul, "a b",
    ),
    "matmul by a transposed weight": (
        "float[n, t, 4] a, float[5, 4] b", "float[n, t, 5] y",
        "bt = Transpose <perm = [1, 0]> (b) y = MatMul(a, bt)", lambda a, b: a @ b.T, "a b",
    ),
    "matmul of a weight": (
        "float[5, t] a, float[n, t, 4] b", "float[n, 5, 4] y", "y = MatMul(a, b)",
        torch.matmul, "a b",
    ),
    "matmul of batches": (
        "float[n, 2, t, 4] a, float[n, 2, 4, 5] b", "float[n, 2, t, 5] y", "y = MatMul(a, b)",
        torch.matmul, "a b",
    ),
    "matmul of a batch by one broadcast": (
        "float[n, 2, t, 4] a, float[n, 1, 4, 5] b", "float[n, 2, t, 5] y", "y = MatMul(a, b)",
        torch.matmul, "a b",
    ),
    "matmul of a smaller batch": (
        "float[3, t, 4] a, float[n, 3, 4, 5] b", "float[n, 3, t, 5] y", "y = MatMul(a, b)",
        torch.matmul, "a b",
    ),
    "matrix by vector": (
        "float[n, t, 4] a, float[4] b", "float[n, t] y", "y = MatMul(a, b)", torch.matmul, "a b",
    ),
    "vector by matrices": (
        "float[4] a, float[n, 4, 5] b", "float[n, 5] y", "y = MatMul(a, b)", torch.matmul, "a b",
    ),
    "vector by matrix": (
        "float[4] a, float[4, 5] b", "float[5] y", "y = MatMul(a, b)", torch.matmul, "a b",
    ),
    "vector by vector": (
        "float[4] a, float[4] b", "float y", "y = MatMul(a, b)", torch.matmul, "a b",
    ),
    "a product both factors of which are one": (
        "float[n, 4, 4] a", "float[n, 4, 4] y", "y = MatMul(a, a)", lambda a: a @ a, "a",
    ),
    "transpose": (
        "float[n, 3, 4] x", "float[4, n, 3] y", "y = Transpose <perm = [2, 0, 1]> (x)",
        lambda x: x.permute(2, 0, 1), "x",
    ),
    "transpose without a permutation": (
        "float[n, 3, 4] x", "float[4, 3, n] y", "y = Transpose(x)",
        lambda x: x.permute(2, 1, 0), "x",
    ),
    "reshape": (
        "float[n, t, 12] x", "float[n, t, 3, 4] y",
        "shape = Constant <value_ints = [0, -1, 3, 4]> () y = Reshape(x, shape)",
        lambda x: x.reshape(*x.shape[:2], 3, 4), "x",
    ),
    "reshape that joins open sizes": (
        "float[n, t, 12] x", "float[m, 12] y",
        "shape = Constant <value_ints = [-1, 12]> () y = Reshape(x, shape)",
        lambda x: x.reshape(-1, 12), "x",
    ),
    "flatten": (
        "float[n, 3, 4] x", "float[n, 12] y", "y = Flatten(x)", lambda x: x.flatten(1), "x",
    ),
    "squeeze": (
        "float[n, 1, 4] x", "float[n, 4] y",
        "axes = Constant <value_ints = [1]> () y = Squeeze(x, axes)", lambda x: x.squeeze(1), "x",
    ),
    "unsqueeze": (
        "float[n, 4] x", "float[n, 1, 4] y",
        "axes = Constant <value_ints = [1]> () y = Unsqueeze(x, axes)",
        lambda x: x.unsqueeze(1), "x",
    ),
    "concat": (
        "float[n, 2] a, float[n, 3] b, float[n, 1] c", "float[n, 6] y",
        "y = Concat <axis = 1> (a, b, c)", lambda a, b, c: torch.cat([a, b, c], 1), "a c",
    ),
    "concat of open sizes": (
        "float[n, t, 2] a, float[n, u, 2] b", "float[n, v, 2] y", "y = Concat <axis = -2> (a, b)",
        lambda a, b: torch.cat([a, b], 1), "a b",
    ),
    "split, of which one part is used": (
        "float[n, 6] x", "float[n, 2] y",
        ("sizes = Constant <value_ints = [1, 2, 3]> () a, b, c = Split <axis = 1> (x, sizes)"
        "y = Mul(b, b)"),
        lambda x: x[:, 1:3] ** 2, "x",
    ),
    "halves, turned": (
        "float[n, t, 6] x", "float[n, t, 6] y",
        ("zero = Constant <value_ints = [0]> () half = Constant <value_ints = [3]> ()"
        "end = Constant <value_ints = [9223372036854775807]> ()"
        "last = Constant <value_ints = [-1]> () one = Constant <value_ints = [1]> ()"
        "a = Slice(x, zero, half, last) b = Slice(x, half, end, last, one)"
        "c = Neg(b) y = Concat <axis = -1> (c, a)"),
        lambda x: torch.cat([-x[..., 3:], x[..., :3]], -1), "x",
    ),
    "slice of open sizes from the end": (
        "float[n, t, 4] x", "float[n, u, 2] y",
        ("starts = Constant <value_ints = [-2, 1]> () ends = Constant <value_ints = [9999, 3]> ()"
        "axes = Constant <value_ints = [1, 2]> () y = Slice(x, starts, ends, axes)"),
        lambda x: x[:, -2:, 1:3], "x",
    ),
    "slice with steps": (
        "float[n, 7] x", "float[n, 3] y",
        ("starts = Constant <value_ints = [-1]> () ends = Constant <value_ints = [1]> ()"
        "axes = Constant <value_ints = [1]> () steps = Constant <value_ints = [-2]> ()"
        "y = Slice(x, starts, ends, axes, steps)"),
        lambda x: x[:, [6, 4, 2]], "x",
    ),
    "expand": (
        "float[n, 1, 4] x", "float[n, 3, 4] y",
        "shape = Constant <value_ints = [1, 3, 1]> () y = Expand(x, shape)",
        lambda x: x.expand(-1, 3, -1), "x",
    ),
    "gather one": (
        "float[n, t, 4] x", "float[n, 4] y",
        "index = Constant <value = int64 {0}> () y = Gather <axis = 1> (x, index)",
        lambda x: x[:, 0], "x",
    ),
    "gather the last": (
        "float[n, t, 4] x", "float[n, 1, 4] y",
        "index = Constant <value_ints = [-1]> () y = Gather <axis = 1> (x, index)",
        lambda x: x[:, -1:], "x",
    ),
    "gather several, one twice": (
        "float[n, 5, 4] x", "float[n, 3, 4] y",
        "index = Constant <value_ints = [3, 0, 3]> () y = Gather <axis = 1> (x, index)",
        lambda x: x[:, [3, 0, 3]], "x",
    ),
    "gather by an input": (
        "float[5, 4] x, int64[m] index", "float[m, 4] y", "y = Gather(x, index)",
        lambda x, index: x[index], "x",
    ),
    "gather elements": (
        "float[n, 5] x, int64[n, 2] index", "float[n, 2] y",
        "y = GatherElements <axis = 1> (x, index)", lambda x, index: x.gather(1, index), "x",
    ),
    "gather by several indices": (
        "float[n, t, 4] x, int64[m, 2] index", "float[m, 4] y", "y = GatherND (x, index)",
        lambda x, index: x[index[:, 0], index[:, 1]], "x",
    ),
    "gather one token of each": (
        "float[n, t, 4] x, int64[n, 1] index", "float[n, 4] y",
        "y = GatherND <batch_dims = 1> (x, index)",
        lambda x, index: x[torch.arange(len(x)), index[:, 0]], "x",
    ),
    "mean": (
        "float[n, t, 4] x", "float[n, t, 1] y",
        "axes = Constant <value_ints = [-1]> () y = ReduceMean(x, axes)",
        lambda x: x.mean(-1, keepdim=True), "x",
    ),
    "mean over an open size": (
        "float[n, t, 4] x", "float[n, 4] y",
        "axes = Constant <value_ints = [1]> () y = ReduceMean <keepdims = 0> (x, axes)",
        lambda x: x.mean(1), "x",
    ),
    "sum over everything": (
        "float[n, 4] x", "float y", "y = ReduceSum <keepdims = 0> (x)", torch.sum, "x",
    ),
    "root mean square": (
        "float[n, t, 4] x, float[4] w", "float[n, t, 4] y",
        ("axes = Constant <value_ints = [-1]> () two = Constant <value = float {2.0}> ()"
        "tiny = Constant <value = float {1e-5}> () s = Pow(x, two) m = ReduceMean(s, axes)"
        "e = Add(m, tiny) r = Sqrt(e) d = Div(x, r) y = Mul(w, d)"),
        lambda x, w: w * x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(), "x w",
    ),
    "layer normalization": (
        "float[n, t, 8] x, float[8] w, float[8] b", "float[n, t, 8] y",
        "y = LayerNormalization <epsilon = 1e-6> (x, w, b)",
        lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-6), "x w b",
    ),
    "layer normalization over two axes": (
        "float[n, 3, 8] x, float[3, 8] w", "float[n, 3, 8] y",
        "y = LayerNormalization <axis = 1> (x, w)",
        lambda x, w: F.layer_norm(x, (3, 8), w), "x w",
    ),
    "layer normalization by hand": (
        "float[n, t, 8] x", "float[n, t, 8] y",
        ("axes = Constant <value_ints = [-1]> () tiny = Constant <value = float {1e-5}> ()"
        "m = ReduceMean(x, axes) c = Sub(x, m) s = Mul(c, c) v = ReduceMean(s, axes)"
        "e = Add(v, tiny) d = Sqrt(e) y = Div(c, d)"),
        lambda x: F.layer_norm(x, (8,)), "x",
    ),
    "sizes that may turn out to broadcast": (
        "float[a, b] x, float[c, d] z", "float[e, f] y", "y = Mul(x, z)",
        lambda x, z: x * z, "x z",
    ),
}  # fmt: skip
SIZES = {"n": 2, "t": 3, "u": 4, "m": 5, "v": 7, "a": 2, "b": 3, "c": 2, "d": 3}


@pytest.mark.parametrize("name", CASES)
def test_a_small_graph_pulls_back_as_autograd_does(name: str) -> None:
    inputs, output, body, function, wrt = CASES[name]
    check(graph(inputs, output, body), function, wrt, SIZES)


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 0, 1), (2, 1, 2)])
def test_a_convolution_pulls_back_to_its_input(stride: int, padding: int, groups: int) -> None:
    out = (7 + 2 * padding - 3) // stride + 1
    attributes = f"<strides = [{stride}, {stride}], pads = {[padding] * 4}, group = {groups}>"
    model = graph(
        f"float[n, 4, 7, 7] x, float[6, {4 // groups}, 3, 3] w",
        f"float[n, 6, {out}, {out}] y",
        f"y = Conv {attributes} (x, w)",
    )

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, stride=stride, padding=padding, groups=groups)

    check(model, function, "x", {"n": 2})
    with pytest.raises(ConfigurationError, match="does not cover its input w"):
        vjp_graph(model, "y", {"w": "w_grad"})


@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("bias", ["5", "n, 5", "1", ""])
def test_gemm_pulls_back_with_all_its_attributes(transposed: tuple[int, int], bias: str) -> None:
    left, right = transposed
    shapes = ["4, n" if left else "n, 4", "5, 4" if right else "4, 5", *([bias] if bias else [])]
    inputs = [f"float[{shape}] {name}" for shape, name in zip(shapes, "abc", strict=False)]
    attributes = f"<transA = {left}, transB = {right}, alpha = 0.5, beta = 3.0>"
    body = f"y = Gemm {attributes} ({', '.join('abc'[: len(inputs)])})"

    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        product = 0.5 * (a.T if left else a) @ (b.T if right else b)
        return product if c is None else product + 3.0 * c

    model = graph(", ".join(inputs), "float[n, 5] y", body)
    check(model, function, " ".join("abc"[: len(inputs)]), {"n": 3})


@given(data=st.data(), operator=st.sampled_from(["Add", "Sub", "Mul", "Div"]))
def test_operands_of_any_shapes_that_broadcast_get_gradients_of_their_own_shapes(
    data: st.DataObject, operator: str
) -> None:
    """Sizes are given as numbers, or under names that hide what will be broadcast."""
    full = data.draw(st.lists(st.integers(1, 3), max_size=4))
    shapes = []
    for _ in range(2):
        kept = full[data.draw(st.integers(0, len(full))) :]
        shapes.append([size if data.draw(st.booleans()) else 1 for size in kept])
    inputs: list[str] = []
    sizes: dict[str, int] = {}
    for name, shape in zip("ab", shapes, strict=True):
        dims = [
            f"{name}{axis}" if data.draw(st.booleans()) else size for axis, size in enumerate(shape)
        ]
        sizes |= {dim: size for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str)}
        inputs.append(f"float[{', '.join(map(str, dims))}] {name}")
    rank = max(map(len, shapes))
    output = f"float[{', '.join(f'y{axis}' for axis in range(rank))}] y"
    model = graph(
        ", ".join(inputs).replace("[]", ""), output.replace("[]", ""), f"y = {operator}(a, b)"
    )
    function: Callable[..., torch.Tensor] = getattr(torch, operator.lower())
    values = values_for(model, sizes, seed=0)
    values["b"] = np.asarray(np.abs(values["b"]) + 0.5, np.float32)
    tensors = [torch.tensor(values[name], requires_grad=True) for name in "ab"]
    result = function(*tensors)
    pulled = run(
        vjp_graph(model, "y", {"a": "a_grad", "b": "b_grad"}),
        values | {"gradient": np.ones(result.shape, np.float32)},
    )
    expected = torch.autograd.grad(result, tensors, torch.ones_like(result))
    for name, reference in zip("ab", expected, strict=True):
        assert_equal(pulled[f"{name}_grad"], reference)


WIDTH, HEADS, INNER = 8, 2, 12
BLOCK_INPUTS = (
    f"float[n, t, {WIDTH}] x, float[n, 1, 1, t] mask, float[{WIDTH}] w1, float[{WIDTH}] b1,"
    f"float[{WIDTH}, {WIDTH}] q, float[{WIDTH}, {WIDTH}] k, float[{WIDTH}, {WIDTH}] v,"
    f"float[{WIDTH}, {WIDTH}] o, float[r, {WIDTH}] down, float[{WIDTH}, r] up, float scale,"
    f"float[{WIDTH}] w2, float[{WIDTH}] b2, float[{INNER}, {WIDTH}] fc1, float[{INNER}] bias,"
    f"float[{WIDTH}, {INNER}] fc2"
)


def block_graph() -> onnx.ModelProto:
    """Write a pre-norm layer with an adapter, the way exporters write one."""
    constants = (
        f"split = Constant <value_ints = [0, -1, {HEADS}, {WIDTH // HEADS}]> ()"
        f"join = Constant <value_ints = [0, -1, {WIDTH}]> ()"
        "half = Constant <value = float {0.5}> () one = Constant <value = float {1.0}> ()"
        "two = Constant <value = float {2.0}> () root = Constant <value = float {1.4142135}> ()"
    )
    attention = "h = LayerNormalization <epsilon = 1e-5> (x, w1, b1)"
    for name, perm in (("q", "[0, 2, 1, 3]"), ("k", "[0, 2, 3, 1]"), ("v", "[0, 2, 1, 3]")):
        attention += (
            f"{name}t = Transpose <perm = [1, 0]> ({name}) {name}p = MatMul(h, {name}t)"
            f"{name}r = Reshape({name}p, split) {name}h = Transpose <perm = {perm}> ({name}r)"
        )
    attention += (
        "scores = MatMul(qh, kh) scaled = Div(scores, two) masked = Add(scaled, mask)"
        "weights = Softmax <axis = -1> (masked) mixed = MatMul(weights, vh)"
        "rows = Transpose <perm = [0, 2, 1, 3]> (mixed) joined = Reshape(rows, join)"
        "ot = Transpose <perm = [1, 0]> (o) frozen = MatMul(joined, ot)"
        "downt = Transpose <perm = [1, 0]> (down) upt = Transpose <perm = [1, 0]> (up)"
        "low = MatMul(joined, downt) lows = Mul(low, scale) added = MatMul(lows, upt)"
        "attended = Add(frozen, added) x2 = Add(x, attended)"
    )
    mlp = (
        "h2 = LayerNormalization <epsilon = 1e-5> (x2, w2, b2)"
        "fc1t = Transpose <perm = [1, 0]> (fc1)"
        "m = MatMul(h2, fc1t) mb = Add(m, bias) u = Div(mb, root) e = Erf(u) g = Add(e, one)"
        "s = Mul(mb, g) a = Mul(s, half) fc2t = Transpose <perm = [1, 0]> (fc2)"
        "last = MatMul(a, fc2t) y = Add(x2, last)"
    )
    return graph(BLOCK_INPUTS, f"float[n, t, {WIDTH}] y", constants + attention + mlp)


def block_function(*inputs: torch.Tensor) -> torch.Tensor:
    x, mask, w1, b1, q, k, v, o, down, up, scale, w2, b2, fc1, bias, fc2 = inputs
    states = F.layer_norm(x, (WIDTH,), w1, b1)
    queries, keys, values = (
        (states @ weight.T).reshape(*x.shape[:2], HEADS, -1).transpose(1, 2) for weight in (q, k, v)
    )
    weights = (queries @ keys.transpose(-1, -2) / 2 + mask).softmax(-1)
    joined = (weights @ values).transpose(1, 2).flatten(2)
    x = x + joined @ o.T + scale * (joined @ down.T @ up.T)
    states = F.layer_norm(x, (WIDTH,), w2, b2)
    added: torch.Tensor = F.gelu(states @ fc1.T + bias) @ fc2.T
    return x + added


def test_a_transformer_block_pulls_back_as_autograd_does() -> None:
    sizes = {"n": 2, "t": 3, "r": 2}
    pulled = check(block_graph(), block_function, "x down up", sizes)
    names = [value.name for value in pulled.graph.input]
    assert names[-1] == "gradient"
    assert "fc2" in names
    check(block_graph(), block_function, "w1 b1 q k v o w2 b2 fc1 bias fc2", sizes)


def test_a_gradient_graph_computes_only_what_it_needs() -> None:
    """Not the last product; weights as they are; one product over all rows for a weight."""
    pulled = vjp_graph(block_graph(), "y", {name: f"{name}_grad" for name in ("x", "down", "up")})
    nodes = pulled.graph.node
    made = {name for node in nodes for name in node.output}
    assert not made & {"last", "y", "fc2t"}
    own = {value.name for value in block_graph().graph.input}
    turned = [node.input[0] for node in nodes if node.op_type == "Transpose"]
    weights_turned = sorted(name for name in turned if name in own)
    assert weights_turned == ["down", "fc1", "k", "o", "q", "up", "v"]
    kinds = [node.op_type for node in nodes]
    assert kinds.count("Gemm") == 2
    assert kinds.count("LayerNormalization") == 2
    assert not {"Expand", "ConstantOfShape", "NonZero", "Identity"} & {*kinds}


def test_a_value_used_twice_is_read_once_and_a_thin_gradient_is_not_spread_out() -> None:
    axes = "axes = Constant <value_ints = [-1]> ()"
    model = graph("float[n, 4] x", "float[n, 1] y", f"{axes} s = Mul(x, x) y = ReduceMean(s, axes)")
    pulled = check(model, lambda x: x.pow(2).mean(-1, keepdim=True), "x", {"n": 2})
    assert [node.op_type for node in pulled.graph.node] == ["Div", "Mul", "Mul"]
    spread = graph("float[n, 4] x", "float[n, 1] y", f"{axes} s = Neg(x) y = ReduceSum(s, axes)")
    check(spread, lambda x: -x.sum(-1, keepdim=True), "x", {"n": 2})


SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Div(x, c)": lambda x: x / 1.5,
    "Mul(x, c)": lambda x: x * 1.5,
    "Add(x, c)": lambda x: x + 1.5,
}


@pytest.mark.parametrize("scale", SCALES)
def test_the_error_function_of_a_scaled_value_keeps_only_the_value(scale: str) -> None:
    body = f"c = Constant <value = float {{1.5}}> () u = {scale} y = Erf(u)"
    model = graph("float[n, 4] x", "float[n, 4] y", body)
    pulled = check(model, lambda x: torch.erf(SCALES[scale](x)), "x", {"n": 2})
    check(model, lambda x: torch.erf(SCALES[scale](x)), "x", {"n": 20}, lambda value: 50 * value)
    assert ("u" in {name for node in pulled.graph.node for name in node.output}) == ("A" in scale)


def test_two_inputs_may_share_their_gradient_and_it_may_be_the_given_one() -> None:
    model = graph("float[n, 4] a, float[n, 4] b", "float[n, 4] y", "y = Add(a, b)")
    check(model, torch.add, "a b", {"n": 2})


def test_inputs_and_outputs_that_the_gradient_does_not_need_are_left_out() -> None:
    body = "y = Mul(a, b) z = Exp(c) k = Shape(a)"
    outputs = "float[n, 4] y, float[n, 4] z, int64[2] k"
    model = graph("float[n, 4] a, float[n, 4] b, float[n, 4] c", outputs, body)
    pulled = vjp_graph(model, "y", {"a": "a_grad"})
    assert [value.name for value in pulled.graph.input] == ["b", "gradient"]
    assert [node.op_type for node in pulled.graph.node] == ["Mul"]
    assert (pulled.ir_version, pulled.opset_import[0].version) == (10, 18)


REFUSED = {
    "operator Hardmax": ("y = Hardmax(x)", "x"),
    "operator odd.Twist": ("y = odd.Twist(x)", "x"),
    "operator If": (
        (
            "c = Constant <value = int64 {1}> () b = Cast <to = 9> (c) y = If (b) <"
            "then_branch = t () => (float[n, 4] u) { u = Exp(x) },"
            "else_branch = e () => (float[n, 4] v) { v = Neg(x) }>"
        ),
        "x",
    ),
    "does not cover its input p": ("y = Max(x, p, x)", "x p"),
    "does not depend on 'p'": ("y = Exp(x)", "x p"),
    "does not depend on 'x'": ("y = Floor(x)", "x"),
    "has no 'q'": ("y = Exp(x)", "q"),
    "is computed, not constant": ("y = Pow(x, p)", "x"),
    "names are taken": ("gradient = Exp(x) y = Exp(gradient)", "x"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_differentiated_is_refused_with_the_reason(reason: str) -> None:
    body, wrt = REFUSED[reason]
    opsets = '"": 18, "odd": 1'
    header = f"<ir_version: 10, opset_import: [{opsets}]>"
    text = f"{header} g (float[n, 4] x, float[n, 4] p) => (float[n, 4] y) {{ {body} }}"
    with pytest.raises(ConfigurationError, match=reason) as refused:
        vjp_graph(
            onnx.parser.parse_model(text), "y", {name: f"{name}_grad" for name in wrt.split()}
        )
    assert refused.value.remedy


def test_a_graph_of_an_older_opset_is_refused() -> None:
    model = graph("float[n, 4] x", "float[n, 4] y", "y = Exp(x)")
    model.opset_import[0].version = 13
    with pytest.raises(ConfigurationError, match="opset 13"):
        vjp_graph(model, "y", {"x": "x_grad"})
