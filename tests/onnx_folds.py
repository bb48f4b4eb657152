"""Small ONNX models with norms of random statistics: one for each operation and each trap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import FLOAT, HALF, node

__all__ = ["FOLDS", "KEEPS", "Net"]

Made = Callable[[], onnx.ModelProto]


class Net:
    """A model under construction; its random numbers follow from its seed."""

    def __init__(self, *shape: int | str, opset: int = 18, seed: int = 0, ir: int = 9) -> None:
        self.shape, self.opset, self.ir = shape, opset, ir
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Any] = {}
        self.dtype = np.float32
        self.complete = True
        self.outputs: dict[str, int] = {"y": FLOAT}
        self.inputs: dict[str, tuple[int, Sequence[int | str] | None]] = {"x": (FLOAT, shape)}

    def add(self, kind: str, inputs: str, outputs: str, **attributes: Any) -> Net:
        self.nodes.append(node(kind, inputs, outputs, **attributes))
        return self

    def weight(self, name: str, *shape: int, value: Any = None) -> Net:
        numbers = self.random.standard_normal(shape) if value is None else np.array(value)
        self.weights[name] = numbers.astype(self.dtype)
        return self

    def ints(self, name: str, *values: int) -> Net:
        self.weights[name] = np.array(values, np.int64)
        return self

    def conv(
        self, inputs: str, output: str, shape: Sequence[int], *, bias: bool = False, **more: Any
    ) -> Net:
        self.weight(f"{output}_w", *shape)
        names = f"{inputs} {output}_w"
        if bias:
            kind = more.get("kind", "Conv")
            self.weight(
                f"{output}_b", shape[1] * more.get("group", 1) if kind != "Conv" else shape[0]
            )
            names += f" {output}_b"
        return self.add(more.pop("kind", "Conv"), names, output, **more)

    def bn(
        self, inputs: str, output: str, channels: int, *, positive: bool = False, **more: Any
    ) -> Net:
        gamma = self.random.uniform(0.5, 1.5, channels)
        signs = np.where(np.arange(channels) % 3 == 0, -1, 1) if not positive else 1
        self.weight(f"{output}_gamma", value=gamma * signs)
        self.weight(f"{output}_beta", channels).weight(f"{output}_mean", channels)
        self.weight(f"{output}_var", value=self.random.uniform(0.3, 2.0, channels))
        parts = " ".join(f"{output}_{part}" for part in ("gamma", "beta", "mean", "var"))
        return self.add("BatchNormalization", f"{inputs} {parts}", output, **more)

    def model(self) -> onnx.ModelProto:
        """The model, with all shapes that onnx can infer."""
        ends = [
            helper.make_tensor_value_info(name, kind, None) for name, kind in self.outputs.items()
        ]
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(n, k, s) for n, (k, s) in self.inputs.items()],
            ends,
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", self.opset)]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir)
        return onnx.shape_inference.infer_shapes(made) if self.complete else made


def _image(opset: int = 18) -> Net:
    return Net("n", 3, 8, 8, opset=opset)


def _conv(**more: Any) -> onnx.ModelProto:
    return _image().conv("x", "c", (6, 3, 3, 3), **more).bn("c", "y", 6).model()


def _through(
    kind: str,
    *,
    opset: int = 18,
    positive: bool = False,
    channels: int = 6,
    inputs: str = "c",
    **more: Any,
) -> Net:
    net = _image(opset).conv("x", "c", (6, 3, 3, 3), bias=True, pads=[1, 1, 1, 1])
    return net.add(kind, inputs, "p", **more).bn("p", "y", channels, positive=positive)


def _empty_bias() -> onnx.ModelProto:
    made = _conv()
    made.graph.node[0].input.append("")
    return made


def _frozen() -> onnx.ModelProto:
    """FrozenBatchNorm2d as torch exports it, its arithmetic on constants included."""
    net = _image().conv("x", "c", (6, 3, 3, 3))
    net.weight("mean", 6).weight("var", value=net.random.uniform(0.3, 2, 6)).weight("g", 6).weight(
        "b", 6
    )
    net.ints("shape", 1, 6, 1, 1).weight("eps", value=1e-5).weight("one", value=1.0)
    net.add("Add", "var eps", "v").add("Sqrt", "v", "s").add("Reciprocal", "s", "r")
    net.add("Mul", "g r", "scale").add("Mul", "mean scale", "ms").add("Sub", "b ms", "shift")
    net.add("Reshape", "scale shape", "scale4").add("Reshape", "shift shape", "shift4")
    return net.add("Mul", "c scale4", "m").add("Add", "m shift4", "y").model()


def _gemm(**more: Any) -> onnx.ModelProto:
    net = Net("n", 5).weight("w", *((7, 5) if more.get("transB") else (5, 7))).weight("b", 7)
    return net.add("Gemm", "x w b", "g", **more).bn("g", "y", 7).model()


def _transposed_gemm() -> onnx.ModelProto:
    net = Net(5, 4).weight("w", 5, 7).add("Gemm", "x w", "g", transA=1)
    return net.bn("g", "y", 7).model()


def _scalar_bias() -> onnx.ModelProto:
    net = Net("n", 5).weight("w", 5, 7).weight("b", value=0.7)
    return net.add("Gemm", "x w b", "g", beta=3.0).bn("g", "y", 7).model()


def _matmul(*, bias: bool) -> onnx.ModelProto:
    net = Net("n", 4, 5).weight("w", 5, 7).add("MatMul", "x w", "m")
    if bias:
        net.weight("b", 7).add("Add", "b m", "a")
    net.add("Transpose", "a" if bias else "m", "t", perm=[0, 2, 1]).bn("t", "u", 7)
    return net.add("Transpose", "u", "y", perm=[0, 2, 1]).model()


def _left_matmul() -> onnx.ModelProto:
    net = Net("n", 5, 4).weight("w", 7, 5).add("MatMul", "w x", "m")
    return net.bn("m", "y", 7).model()


def _computed_bias() -> onnx.ModelProto:
    """A conv without a bias in a raw export of torch: zeros of the weight's size, expanded."""
    net = _image().weight("w", 6, 3, 3, 3).ints("one", 1).weight("zero", value=0.0)
    net.add("Shape", "w", "s", start=0, end=1).add("Expand", "s one", "size")
    net.add("CastLike", "zero x", "typed").add("Expand", "typed size", "b")
    return net.add("Conv", "x w b", "c").bn("c", "y", 6).model()


def _computed_weight() -> onnx.ModelProto:
    net = Net("n", 5).weight("w", 7, 5).add("Transpose", "w", "t", perm=[1, 0])
    return (
        net.add("MatMul", "x t", "m").weight("b", 7).add("Add", "m b", "a").bn("a", "y", 7).model()
    )


def _concat() -> onnx.ModelProto:
    net = _image().conv("x", "a", (4, 3, 1, 1)).conv("x", "b", (2, 3, 1, 1), bias=True)
    return net.add("Concat", "a b", "c", axis=1).bn("c", "y", 6).model()


def _split() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).ints("sizes", 2, 4)
    net.add("Split", "c sizes", "a b", axis=1).bn("a", "p", 2).bn("b", "q", 4)
    return net.add("Concat", "q p", "y", axis=1).model()


def _sequence() -> onnx.ModelProto:
    """How torch writes `torch.split` with sizes."""
    net = _image().conv("x", "c", (6, 3, 3, 3)).ints("first").ints("second")
    net.weights["size"] = np.array(3, np.int64)
    net.weights["first"], net.weights["second"] = np.array(0, np.int64), np.array(1, np.int64)
    net.add("SplitToSequence", "c size", "s", axis=1)
    net.add("SequenceAt", "s first", "a").add("SequenceAt", "s second", "b")
    return net.bn("a", "p", 3).bn("b", "q", 3).add("Concat", "q p", "y", axis=1).model()


def _shuffle() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).ints("in", 0, 2, 3, 6, 6).ints("out", 0, 6, 6, 6)
    net.add("Reshape", "c in", "r").add("Transpose", "r", "t", perm=[0, 2, 1, 3, 4])
    return net.add("Reshape", "t out", "p").bn("p", "y", 6).model()


def _dynamic_flatten() -> onnx.ModelProto:
    """A reshape to sizes that are computed from the batch."""
    net = Net("n", 5).weight("w", 5, 6).weight("b", 6).add("Gemm", "x w b", "g")
    net.add("Shape", "g", "s").ints("zero", 0).add("Gather", "s zero", "batch").ints("rest", 6, 1)
    net.add("Concat", "batch rest", "to", axis=0).add("Reshape", "g to", "r")
    return net.bn("r", "y", 6).model()


def _shared_weight() -> onnx.ModelProto:
    """Two convolutions with one weight and norms of their own: each gets its own weight."""
    net = _image().weight("w", 6, 3, 3, 3).add("Conv", "x w", "a").add("Conv", "x w", "b")
    return net.bn("a", "p", 6).bn("b", "q", 6).add("Add", "p q", "y").model()


def _half_shared_weight() -> onnx.ModelProto:
    """The second use of the weight has no norm, and keeps what it has."""
    net = _image().weight("w", 6, 3, 3, 3).add("Conv", "x w", "a").add("Conv", "x w", "b")
    return net.bn("a", "p", 6).add("Add", "p b", "q").add("Relu", "q", "y").model()


def _shared_norm() -> onnx.ModelProto:
    """One set of statistics for two norms."""
    net = _image().conv("x", "a", (6, 3, 3, 3)).conv("x", "b", (6, 3, 3, 3)).bn("a", "p", 6)
    parts = " ".join(f"p_{part}" for part in ("gamma", "beta", "mean", "var"))
    net.add("BatchNormalization", f"b {parts}", "q")
    return net.add("Mul", "p q", "y").model()


def _two_norms() -> onnx.ModelProto:
    return _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "b", 6).bn("b", "y", 6).model()


def _output_twice() -> onnx.ModelProto:
    """The norm's output is two outputs of the model, by two names."""
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6).add("Identity", "y", "z")
    net.outputs["z"] = FLOAT
    return net.model()


def _layer_scale() -> onnx.ModelProto:
    net = Net("n", 4, 5).weight("w", 5, 5).add("MatMul", "x w", "m").weight("b", 5)
    net.add("Add", "m b", "a").weight("gamma", 5).add("Mul", "a gamma", "s")
    return net.add("Add", "x s", "y").model()


def _input_normalisation() -> onnx.ModelProto:
    """Into a convolution without padding, forward."""
    net = _image().weight("mean", 1, 3, 1, 1).weight("std", value=[[[[2.0]], [[0.5]], [[3.0]]]])
    net.add("Sub", "x mean", "d").add("Div", "d std", "n").conv("n", "c", (6, 3, 3, 3), bias=True)
    return net.add("Relu", "c", "y").model()


def _before_gemm() -> onnx.ModelProto:
    net = Net("n", 5).add("Sigmoid", "x", "s").bn("s", "b", 5).weight("w", 5, 7).weight("v", 7)
    return net.add("Gemm", "b w v", "g", alpha=0.5, beta=2.0).add("Relu", "g", "y").model()


def _before_matmul() -> onnx.ModelProto:
    net = Net("n", 4, 5).add("Sigmoid", "x", "s").weight("k", 5).add("Mul", "s k", "m")
    net.weight("l", 5).add("Add", "m l", "a").weight("w", 5, 7).add("MatMul", "a w", "p")
    return net.add("Relu", "p", "y").model()


def _residual() -> onnx.ModelProto:
    net = _image().conv("x", "a", (6, 3, 3, 3), bias=True).conv("x", "b", (6, 3, 3, 3))
    return net.add("Add", "a b", "s").bn("s", "y", 6).model()


def _positions() -> onnx.ModelProto:
    """A constant of every position in the sum has to take the scale as well."""
    net = _image().conv("x", "a", (6, 3, 3, 3), bias=True).weight("pos", 1, 6, 6, 6)
    return net.add("Add", "a pos", "s").bn("s", "y", 6).model()


def _half() -> onnx.ModelProto:
    net = _image()
    net.dtype, net.inputs, net.outputs = np.float16, {"x": (HALF, net.shape)}, {"y": HALF}
    return net.conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6).model()


def _mixed() -> onnx.ModelProto:
    """float16 weights, and a norm in float32 behind a cast."""
    net = _image()
    net.inputs = {"x": (HALF, net.shape)}
    net.dtype = np.float16
    net.conv("x", "c", (6, 3, 3, 3)).add("Cast", "c", "f", to=FLOAT)
    net.dtype = np.float32
    return net.bn("f", "y", 6).model()


def _bfloat16() -> onnx.ModelProto:
    """ONNX Runtime has no kernels for it on a CPU: judged in float64 alone."""
    made = _image(22).conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6).model()
    for tensor in made.graph.initializer:
        numbers = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            helper.make_tensor(
                tensor.name, TensorProto.BFLOAT16, numbers.shape, numbers.flatten().tolist()
            )
        )
    del made.graph.value_info[:]
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return made


def _opset_7() -> onnx.ModelProto:
    net = Net(2, 3, 8, 8, opset=7, ir=3).conv("x", "c", (6, 3, 3, 3), bias=True).bn("c", "b", 6)
    made = net.add("Dropout", "b", "y").model()
    for tensor in made.graph.initializer:  # before IR version 4 every constant was an input
        made.graph.input.append(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        )
    return made


def _no_shapes() -> onnx.ModelProto:
    net = _image()
    net.inputs, net.complete = {"x": (FLOAT, None)}, False
    return net.conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6).model()


def _in_branch() -> onnx.ModelProto:
    """The branch uses the value of the outer graph that a norm gave."""
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "b", 6)
    branches = {
        name: helper.make_graph(
            [node(kind, "b", out)], name, [], [helper.make_tensor_value_info(out, FLOAT, None)]
        )
        for name, kind, out in (("then_branch", "Relu", "t"), ("else_branch", "Sigmoid", "e"))
    }
    net.weights["yes"] = np.array(True)
    return net.add("If", "yes", "y", **branches).model()


def _function() -> onnx.ModelProto:
    """The norm is in a local function of the model."""
    made = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6).model()
    inner = made.graph.node[1]
    body = node("BatchNormalization", "d g b m v", "o")
    opsets = [helper.make_opsetid("", 18)]
    made.functions.append(
        helper.make_function("mine", "Norm", ["d", "g", "b", "m", "v"], ["o"], [body], opsets)
    )
    inner.op_type, inner.domain = "Norm", "mine"
    made.opset_import.append(helper.make_opsetid("mine", 1))
    return made


# name: (the model, how many decisions fold, BatchNormalization nodes that are left)
FOLDS: dict[str, tuple[Made, int]] = {
    "conv": (_conv, 1),
    "conv with bias": (lambda: _conv(bias=True), 1),
    "conv with an empty bias": (_empty_bias, 1),
    "grouped conv": (
        lambda: _image().conv("x", "c", (6, 1, 3, 3), group=3).bn("c", "y", 6).model(),
        1,
    ),
    "conv 1d": (lambda: Net("n", 3, 9).conv("x", "c", (6, 3, 3)).bn("c", "y", 6).model(), 1),
    "conv 3d": (
        lambda: Net("n", 3, 4, 5, 6).conv("x", "c", (6, 3, 2, 2, 2)).bn("c", "y", 6).model(),
        1,
    ),
    "transposed conv": (
        lambda: (
            Net("n", 4, 5, 5)
            .conv("x", "c", (4, 4, 3, 3), kind="ConvTranspose", strides=[2, 2])
            .bn("c", "y", 4)
            .model()
        ),
        1,
    ),
    "grouped transposed conv": (
        lambda: (
            Net("n", 4, 5, 5)
            .conv("x", "c", (4, 3, 3, 3), kind="ConvTranspose", group=2, bias=True)
            .bn("c", "y", 6)
            .model()
        ),
        1,
    ),
    "gemm": (_gemm, 1),
    "gemm with a transposed weight": (lambda: _gemm(transB=1), 1),
    "gemm with factors": (lambda: _gemm(alpha=0.25, beta=0.5), 1),
    "gemm with beta 0": (lambda: _gemm(beta=0.0), 1),
    "gemm of a transposed input": (_transposed_gemm, 1),
    "gemm with one bias for all": (_scalar_bias, 1),
    "matmul": (lambda: _matmul(bias=False), 1),
    "matmul and addition": (lambda: _matmul(bias=True), 1),
    "matmul from the left": (_left_matmul, 1),
    "computed bias": (_computed_bias, 1),
    "computed weight": (_computed_weight, 1),
    "frozen norm": (_frozen, 1),
    "layer scale": (_layer_scale, 1),
    "two norms": (_two_norms, 2),
    "concat": (_concat, 1),
    "split": (_split, 2),
    "split through a sequence": (_sequence, 2),
    "channel shuffle": (_shuffle, 1),
    "computed reshape": (_dynamic_flatten, 1),
    "flatten": (
        lambda: (
            Net("n", 3, 4, 4)
            .conv("x", "c", (6, 3, 4, 4))
            .add("Flatten", "c", "f")
            .bn("f", "y", 6)
            .model()
        ),
        1,
    ),
    "squeeze of opset 11": (
        lambda: (
            Net("n", 3, 1, 4, opset=11)
            .conv("x", "c", (6, 3, 1, 3))
            .add("Squeeze", "c", "s", axes=[2])
            .bn("s", "y", 6)
            .model()
        ),
        1,
    ),
    "slice of opset 9": (
        lambda: (
            Net("n", 3, 4, 4, opset=9)
            .conv("x", "c", (6, 3, 3, 3))
            .add("Slice", "c", "s", axes=[1], starts=[1], ends=[5])
            .bn("s", "y", 4)
            .model()
        ),
        1,
    ),
    "gather": (
        lambda: (
            _through("Gather", inputs="c order", axis=1, channels=4)
            .ints("order", 5, 0, 3, 2)
            .model()
        ),
        1,
    ),
    "depth to space": (
        lambda: (
            _image()
            .conv("x", "c", (8, 3, 3, 3))
            .add("DepthToSpace", "c", "d", blocksize=2, mode="CRD")
            .weight("g", 2, 1, 1)
            .add("Relu", "d", "y")
            .model()
        ),
        0,
    ),
    "identity": (lambda: _through("Identity").model(), 1),
    "dropout": (lambda: _through("Dropout").model(), 1),
    "average pool": (
        lambda: _through("AveragePool", kernel_shape=[3, 3], strides=[2, 2]).model(),
        1,
    ),
    "average pool that leaves its padding out": (
        lambda: _through("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]).model(),
        1,
    ),
    "global average pool": (lambda: _through("GlobalAveragePool").model(), 1),
    "mean of opset 13": (
        lambda: _through("ReduceMean", opset=13, axes=[2, 3], keepdims=0).model(),
        1,
    ),
    "mean": (
        lambda: _through("ReduceMean", inputs="c axes", keepdims=1).ints("axes", 2, 3).model(),
        1,
    ),
    "max pool": (lambda: _through("MaxPool", positive=True, kernel_shape=[2, 2]).model(), 1),
    "nearest neighbours": (
        lambda: (
            _through("Resize", inputs="c '' scales".replace("''", "roi"), mode="nearest")
            .weight("roi", value=[])
            .weight("scales", value=[1, 1, 2, 2])
            .model()
        ),
        1,
    ),
    "upsample of opset 9": (
        lambda: (
            _through("Upsample", opset=9, inputs="c scales", mode="nearest")
            .weight("scales", value=[1, 1, 2, 2])
            .model()
        ),
        1,
    ),
    "linear interpolation": (
        lambda: (
            _through("Resize", inputs="c roi scales", mode="linear")
            .weight("roi", value=[])
            .weight("scales", value=[1, 1, 1.5, 2])
            .model()
        ),
        1,
    ),
    "sum": (_residual, 1),
    "sum with positions": (_positions, 1),
    "shared weight": (_shared_weight, 2),
    "weight that another conv needs": (_half_shared_weight, 1),
    "shared norm": (_shared_norm, 2),
    "output by two names": (_output_twice, 1),
    "input normalisation": (_input_normalisation, 1),
    "norm before gemm": (_before_gemm, 1),
    "arithmetic before matmul": (_before_matmul, 1),
    "float16": (_half, 1),
    "float16 and float32": (_mixed, 1),
    "bfloat16": (_bfloat16, 1),
    "opset 7, constants as inputs": (_opset_7, 1),
    "no shapes": (_no_shapes, 1),
    "norm used in branches": (_in_branch, 1),
    "function": (_function, 1),
}


def _used_twice() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "b", 6).add("Sigmoid", "c", "s")
    return net.add("Mul", "b s", "y").model()


def _returned() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6)
    net.outputs["c"] = FLOAT
    return net.model()


def _used_in_branch() -> onnx.ModelProto:
    """The branch uses the value of the outer graph that the norm sees."""
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "b", 6)
    branches = {
        name: helper.make_graph(
            [node("Add", "b c", out)], name, [], [helper.make_tensor_value_info(out, FLOAT, None)]
        )
        for name, out in (("then_branch", "t"), ("else_branch", "e"))
    }
    net.weights["yes"] = np.array(True)
    return net.add("If", "yes", "y", **branches).model()


def _norm_in_branch() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "t", 6)
    norm = net.nodes.pop()
    ends = [helper.make_tensor_value_info("t", FLOAT, None)]
    branch = helper.make_graph([norm], "then", [], ends)
    other = helper.make_graph(
        [node("Relu", "c", "e")], "else", [], [helper.make_tensor_value_info("e", FLOAT, None)]
    )
    net.weights["yes"] = np.array(True)
    return net.add("If", "yes", "y", then_branch=branch, else_branch=other).model()


def _training() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "b", 6, training_mode=1)
    net.nodes[-1].output.extend(["moved_mean", "moved_var"])
    return net.add("Relu", "b", "y").model()


def _overridable(name: str) -> onnx.ModelProto:
    made = _conv()
    tensor = next(each for each in made.graph.initializer if each.name == name)
    made.graph.input.append(
        helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
    )
    return made


def _wrong_axis() -> onnx.ModelProto:
    """A constant that goes along the width, which is as long as there are channels."""
    net = _image().conv("x", "c", (6, 3, 3, 3)).weight("k", 6).add("Mul", "c k", "m")
    return net.add("Relu", "m", "y").model()


def _run_time_weight() -> onnx.ModelProto:
    net = _image().weight("w", 6, 3, 3, 3).add("ReduceMean", "x", "m", keepdims=1)
    net.add("Mul", "w m", "v").add("Conv", "x v", "c")
    return net.bn("c", "y", 6).model()


def _quantised_weight() -> onnx.ModelProto:
    net = _image().weight("scale", value=0.05)
    net.weights["q"] = net.random.integers(-9, 9, (6, 3, 3, 3)).astype(np.int8)
    net.add("DequantizeLinear", "q scale", "w").add("Conv", "x w", "c")
    return net.bn("c", "y", 6).model()


def _mixed_channels() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).ints("to", 0, 6, 6, 6)
    net.add("Transpose", "c", "t", perm=[0, 2, 1, 3]).add("Reshape", "t to", "r")
    return net.bn("r", "y", 6).model()


def _negative_variance() -> onnx.ModelProto:
    net = _image().conv("x", "c", (6, 3, 3, 3)).bn("c", "b", 6).add("Relu", "b", "y")
    net.weights["b_var"][2] = -1.0
    net.complete = True
    return net.model()


def _overflow() -> onnx.ModelProto:
    net = _image()
    net.dtype, net.inputs, net.outputs = np.float16, {"x": (HALF, net.shape)}, {"y": HALF}
    net.conv("x", "c", (6, 3, 3, 3)).bn("c", "y", 6)
    net.weights["c_w"] *= np.float16(1000)
    net.weights["y_gamma"] *= np.float16(1000)
    return net.model()


def _matrix_bias() -> onnx.ModelProto:
    """Gemm adds another number in each row, to which no bias of the columns can be added."""
    net = Net(4, 5).weight("w", 5, 7).weight("b", 4, 7).add("Gemm", "x w b", "g")
    return net.bn("g", "y", 7).model()


def _padded() -> onnx.ModelProto:
    net = (
        _image()
        .add("Sigmoid", "x", "s")
        .bn("s", "b", 3)
        .conv("b", "c", (6, 3, 3, 3), pads=[1, 1, 1, 1])
    )
    return net.add("Relu", "c", "y").model()


def _followed(kind: str, **more: Any) -> onnx.ModelProto:
    return _through(kind, **more).model()


# name: (the model, the norm's path, why it is kept)
KEEPS: dict[str, tuple[Made, str, str]] = {
    "output used twice": (_used_twice, "batchnormalization_b", "used-elsewhere"),
    "output returned": (_returned, "batchnormalization_y", "returned"),
    "output used in a branch": (_used_in_branch, "batchnormalization_b", "used-elsewhere"),
    "norm in a branch": (_norm_in_branch, "batchnormalization_t", "control-flow"),
    "training mode": (_training, "batchnormalization_b", "training-mode"),
    "weight that may be overridden": (
        lambda: _overridable("c_w"), "batchnormalization_y", "fixed-weight",
    ),
    "statistics that may be overridden": (
        lambda: _overridable("y_mean"), "batchnormalization_y", "computed-affine",
    ),
    "constant along another axis": (_wrong_axis, "mul_m (mul)", "channel-mismatch"),
    "weight computed at run time": (_run_time_weight, "batchnormalization_y", "computed-weight"),
    "quantised weight": (_quantised_weight, "batchnormalization_y", "computed-weight"),
    "mixed channels": (_mixed_channels, "batchnormalization_y", "channel-mismatch"),
    "negative variance": (_negative_variance, "batchnormalization_b", "non-finite"),
    "overflow in float16": (_overflow, "batchnormalization_y", "non-finite"),
    "bias of a row": (_matrix_bias, "batchnormalization_y", "computed-weight"),
    "before a padded conv": (_padded, "batchnormalization_b", "not-after-linear"),
    "behind a sigmoid": (
        lambda: _followed("Sigmoid"), "batchnormalization_y", "not-after-linear",
    ),
    "behind a relu": (lambda: _followed("Relu"), "batchnormalization_y", "shift-stopped"),
    "negative scale behind a max pool": (
        lambda: _followed("MaxPool", kernel_shape=[2, 2]), "batchnormalization_y",
        "negative-scale",
    ),
    "pool that averages zeros in": (
        lambda: _followed(
            "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
        ),
        "batchnormalization_y",
        "shift-stopped",
    ),
}  # fmt: skip
