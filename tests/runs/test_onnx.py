"""ONNX import and export against onnxruntime, operator by operator and on whole networks."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from runs import onnx as networks  # noqa: E402

rng = np.random.default_rng(0)


def array(*shape, low=-1.0, high=1.0):
    return rng.uniform(low, high, shape).astype(np.float32)


def write(path, nodes, shape, constants=None, opset=17, output_shape=None, ir_version=8):
    """A graph from input "x" of `shape` to output "y"."""
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output_shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.save(model, str(path))
    return path


def n(op, inputs, output="y", **attributes):
    name = f"the_{op}" if output == "y" else f"the_{op}_{output}"
    return helper.make_node(op, inputs, [output], name=name, **attributes)


def ints(*values):
    return np.array(values, dtype=np.int64)


IMAGE = (1, 3, 6, 5)
CASES = {
    "gemm": ([n("Gemm", ["x", "w", "b"], transB=1, alpha=0.5, beta=2.0)], (1, 4), {"w": array(3, 4), "b": array(3)}),
    "gemm without bias": ([n("Gemm", ["x", "w"])], (1, 4), {"w": array(4, 3)}),
    "gemm, scalar bias": ([n("Gemm", ["x", "w", "b"])], (1, 4), {"w": array(4, 3), "b": array(1)}),
    "matmul add": ([n("MatMul", ["x", "w"], "h"), n("Add", ["b", "h"])], (1, 4), {"w": array(4, 3), "b": array(1, 3)}),
    "matmul add read twice": (
        [n("MatMul", ["x", "w"], "h"), n("Add", ["h", "b"], "i"), n("Sub", ["i", "h"])],
        (1, 4),
        {"w": array(4, 3), "b": array(3)},
    ),
    "matmul from the left": ([n("MatMul", ["w", "x"])], (1, 4, 2), {"w": array(3, 4)}),
    "no batch axis": (
        [n("MatMul", ["w", "x"], "h"), n("Add", ["h", "b"], "i"), n("Relu", ["i"], "j"), n("MatMul", ["j", "v"])],
        (4,),
        {"w": array(5, 4), "b": array(5), "v": array(5, 2)},
    ),
    "batch axis appears": (
        [n("Unsqueeze", ["x", "a"], "h"), n("Gemm", ["h", "w"])],
        (4,),
        {"a": ints(0), "w": array(4, 3)},
    ),
    "batch axis vanishes": (
        [n("Reshape", ["x", "s"], "h"), n("MatMul", ["w", "h"])],
        (1, 4),
        {"s": ints(-1), "w": array(3, 4)},
    ),
    "conv": (
        [n("Conv", ["x", "w", "b"], pads=[1, 2, 1, 2], strides=[2, 1])],
        IMAGE,
        {"w": array(4, 3, 3, 2), "b": array(4)},
    ),
    "conv, uneven pads": ([n("Conv", ["x", "w"], pads=[0, 1, 1, 0])], IMAGE, {"w": array(4, 3, 2, 2)}),
    "conv, groups, dilation": ([n("Conv", ["x", "w"], group=3, dilations=[2, 1])], IMAGE, {"w": array(6, 1, 2, 2)}),
    "conv, same upper": (
        [n("Conv", ["x", "w"], auto_pad="SAME_UPPER", strides=[2, 2])],
        IMAGE,
        {"w": array(4, 3, 4, 4)},
    ),
    "conv, same lower": (
        [n("Conv", ["x", "w"], auto_pad="SAME_LOWER", strides=[2, 2])],
        IMAGE,
        {"w": array(4, 3, 4, 4)},
    ),
    "conv, one axis": ([n("Conv", ["x", "w"])], (1, 3, 6), {"w": array(4, 3, 3)}),
    "batch norm": (
        [n("BatchNormalization", ["x", "s", "b", "m", "v"], epsilon=1e-3)],
        IMAGE,
        {"s": array(3), "b": array(3), "m": array(3), "v": array(3, low=0.1)},
    ),
    "max pool": ([n("MaxPool", ["x"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 0])], IMAGE, {}),
    "max pool, ceil": ([n("MaxPool", ["x"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)], IMAGE, {}),
    "max pool, uneven pads": ([n("MaxPool", ["x"], kernel_shape=[2, 2], pads=[0, 0, 1, 1])], IMAGE, {}),
    "average pool": ([n("AveragePool", ["x"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])], IMAGE, {}),
    "average pool, pads count": (
        [n("AveragePool", ["x"], kernel_shape=[3, 3], pads=[0, 1, 1, 0], count_include_pad=1)],
        IMAGE,
        {},
    ),
    "global average": ([n("GlobalAveragePool", ["x"])], IMAGE, {}),
    "leaky": ([n("LeakyRelu", ["x"], alpha=0.2)], (1, 4), {}),
    "sigmoid tanh": ([n("Sigmoid", ["x"], "h"), n("Tanh", ["h"])], (1, 4), {}),
    "softmax": ([n("Softmax", ["x"], axis=1)], (1, 4), {}),
    "clip": ([n("Clip", ["x", "a", "b"])], (1, 4), {"a": np.float32(-0.1), "b": np.float32(0.3)}),
    "clip from below": ([n("Clip", ["x", "a"])], (1, 4), {"a": np.float32(0.2)}),
    "constant minus input": ([n("Sub", ["c", "x"])], IMAGE, {"c": array(1, 3, 1, 1)}),
    "normalisation": (
        [n("Sub", ["x", "c"], "h"), n("Div", ["h", "d"])],
        IMAGE,
        {"c": array(3, 1, 1), "d": array(1, low=1, high=2)},
    ),
    "residual": (
        [n("Mul", ["x", "c"], "h"), n("Add", ["h", "x"], "i"), n("Neg", ["i"])],
        IMAGE,
        {"c": array(1, 1, 1, 1)},
    ),
    "pad": ([n("Pad", ["x", "p", "v"])], IMAGE, {"p": ints(0, 0, 1, 0, 0, 0, 0, 2), "v": np.float32(0.5)}),
    "transpose": ([n("Transpose", ["x"], perm=[0, 2, 3, 1])], IMAGE, {}),
    "concat": ([n("Neg", ["x"], "h"), n("Concat", ["x", "h"], axis=-1)], IMAGE, {}),
    "flatten": ([n("Flatten", ["x"])], IMAGE, {}),
    "reshape with zeros": ([n("Reshape", ["x", "s"])], IMAGE, {"s": ints(0, 0, -1)}),
    "squeeze": ([n("Squeeze", ["x", "a"])], (1, 4, 1, 1), {"a": ints(2, 3)}),
    "squeeze all": ([n("Squeeze", ["x"])], (1, 4, 1, 1), {}),
    "gather": ([n("Gather", ["x", "i"], axis=1)], IMAGE, {"i": ints(2, -3)}),
    "gather one": ([n("Gather", ["x", "i"], axis=2)], IMAGE, {"i": np.int64(-1)}),
    "slice": (
        [n("Slice", ["x", "s", "e", "a", "t"])],
        IMAGE,
        {"s": ints(0, 0), "e": ints(9, -1), "a": ints(0, 2), "t": ints(1, 2)},
    ),
    "mean": ([n("ReduceMean", ["x"], axes=[2, 3], keepdims=0)], IMAGE, {}),
    "sum": ([n("ReduceSum", ["x", "a"])], IMAGE, {"a": ints(-1)}),
    "identities": (
        [n("Identity", ["x"], "h"), n("Dropout", ["h"], "i"), n("Cast", ["i"], to=TensorProto.FLOAT)],
        (1, 4),
        {},
    ),
    "computed target of a reshape": (
        [
            n("Shape", ["x"], "s"),
            n("Gather", ["s", "zero"], "b", axis=0),
            n("Unsqueeze", ["b", "zeros"], "bs"),
            n("Concat", ["bs", "rest"], "t", axis=0),
            n("Reshape", ["x", "t"]),
        ],
        IMAGE,
        {"zero": np.int64(0), "zeros": ints(0), "rest": ints(-1)},
    ),
    "constants are folded": (
        [n("Constant", [], "c", value=numpy_helper.from_array(array(4))), n("Exp", ["c"], "e"), n("Mul", ["x", "e"])],
        (1, 4),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_onnxruntime_computes_on_batches(name, tmp_path):
    nodes, shape, constants = CASES[name]
    path = write(tmp_path / "m.onnx", nodes, shape, constants)
    network = networks.load(path)
    assert network.input_shape == (shape if len(shape) == 1 else shape[1:])
    x = torch.from_numpy(array(5, *network.input_shape, low=-2, high=2))
    expected = networks.Runtime(path)(x.numpy())
    assert network.outputs == expected.shape[1]
    np.testing.assert_allclose(network(x).numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(network.double()(x.double()).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_weighted_operators_become_the_usual_layers_and_keep_no_batch_size(tmp_path):
    nodes = [
        n("Conv", ["x", "w"], "h"),
        n("Relu", ["h"], "i"),
        n("Reshape", ["i", "s"], "j"),
        n("MatMul", ["j", "v"], "k"),
        n("Add", ["k", "b"]),
    ]
    constants = {"w": array(2, 3, 6, 5), "s": ints(1, -1), "v": array(2, 4), "b": array(4)}
    network = networks.load(write(tmp_path / "m.onnx", nodes, IMAGE, constants))
    kinds = [type(layer) for layer in network.layers]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert network.layers[3].bias is not None
    assert network(torch.zeros(7, 3, 6, 5)).shape == (7, 4)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_loading_leaves_the_random_state_alone(tmp_path):
    path = write(tmp_path / "m.onnx", *CASES["gemm"])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    networks.load(path)
    assert torch.equal(torch.rand(1), expected)


def test_initializers_that_are_listed_as_inputs_are_no_inputs(tmp_path):
    path = write(tmp_path / "m.onnx", *CASES["gemm"])
    model = onnx.load(str(path))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 4]))
    onnx.save(model, str(path))
    assert networks.load(path).input_shape == (4,)


def test_an_open_batch_axis_and_gzip_are_read(tmp_path):
    path = write(tmp_path / "m.onnx", CASES["gemm"][0], ("N", 4), CASES["gemm"][2])
    packed = tmp_path / "m.onnx.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    x = torch.from_numpy(array(3, 4))
    assert torch.equal(networks.load(path)(x), networks.load(packed)(x))


BAD = {
    "unknown operator": ([n("Selu", ["x"])], (1, 4), {}, r"Selu node 'the_Selu' is not supported \(close: Relu"),
    "mixes the batch": ([n("Transpose", ["x"], perm=[1, 0])], (1, 4), {}, "moves the batch axis"),
    "softmax over the batch": ([n("Softmax", ["x"], axis=0)], (1, 4), {}, "works along the batch axis"),
    "reduces everything": ([n("ReduceMean", ["x"])], (1, 4), {}, "the batch axis included"),
    "weights from the input": ([n("Conv", ["x", "x"])], (1, 1, 3, 3), {}, "'the_Conv'"),
    "not finite": ([n("Add", ["x", "b"])], (1, 2), {"b": np.float32([1, np.nan])}, "hold NaN or infinity"),
    "open axis": ([n("Relu", ["x"])], (1, "k"), {}, "only the batch axis may be left open"),
    "no dependence": ([n("Neg", ["c"])], (1, 2), {"c": array(1, 2)}, "does not depend on the input"),
    "integers": ([n("Cast", ["x"], to=TensorProto.INT64)], (1, 2), {}, "into integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_named(name, tmp_path):
    nodes, shape, constants, message = BAD[name]
    with pytest.raises(networks.ImportFailure, match=message):
        networks.load(write(tmp_path / "m.onnx", nodes, shape, constants))


def test_two_inputs_are_refused(tmp_path):
    path = write(tmp_path / "m.onnx", [n("Add", ["x", "z"])], (1, 4))
    model = onnx.load(str(path))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4]))
    onnx.save(model, str(path))
    with pytest.raises(networks.ImportFailure, match="has 2 inputs and 1 outputs"):
        networks.load(path)


def test_files_that_are_no_onnx_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        networks.load(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("this is not a network")
    with pytest.raises(networks.ImportFailure, match="is not an ONNX file"):
        networks.load(tmp_path / "text.onnx")
    (tmp_path / "torn.onnx.gz").write_bytes(gzip.compress(b"x" * 100)[:20])
    with pytest.raises(networks.ImportFailure, match="is not an ONNX file"):
        networks.load(tmp_path / "torn.onnx.gz")


def test_a_network_that_disagrees_with_onnxruntime_is_refused(tmp_path, monkeypatch):
    from runs import onnx_operators

    path = write(tmp_path / "m.onnx", [n("LeakyRelu", ["x"], alpha=0.2)], (1, 4))
    monkeypatch.setitem(onnx_operators.BUILDERS, "LeakyRelu", lambda node: (nn.ReLU(), True))
    with pytest.raises(networks.ImportFailure, match="onnxruntime differ by"):
        networks.load(path)
    assert isinstance(networks.load(path, check=False).layers[0], nn.ReLU)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.LeakyReLU(0.1))
        self.head = nn.Linear(4, 5)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1))

    def forward(self, x):
        x = self.stem((x - self.mean) / 0.25)
        x = torch.relu(x + self.body(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("suffix", [".onnx", ".onnx.gz"])
def test_export_and_import_give_the_same_function(suffix, tmp_path):
    torch.manual_seed(0)
    model = Residual()
    model(torch.rand(8, 3, 8, 8))  # moves the running statistics
    path = networks.export(model, tmp_path / f"m{suffix}", (3, 8, 8))
    assert model.training
    again = networks.load(path)
    x = torch.rand(4, 3, 8, 8)
    assert (again.input_shape, again.outputs) == ((3, 8, 8), 5)
    torch.testing.assert_close(again(x), model.eval()(x))


def test_export_of_common_layers_round_trips(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.Sigmoid(),
    ).double().eval()  # fmt: skip
    again = networks.load(networks.export(model, tmp_path / "m.onnx", (1, 8, 8)))
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(again(x), model.float()(x), rtol=1e-4, atol=1e-5)


def test_export_that_freezes_a_branch_is_caught_and_leaves_no_file(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(networks.ImportFailure, match="the exported network and onnxruntime differ"):
        networks.export(Branch(), tmp_path / "m.onnx", (3,))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("CERTPRUNE_VNNCOMP" not in os.environ, reason="CERTPRUNE_VNNCOMP does not point at benchmarks")
def test_benchmark_networks_agree_with_onnxruntime():
    files = sorted(Path(os.environ["CERTPRUNE_VNNCOMP"]).rglob("*.onnx"))
    assert files
    for file in files:
        network = networks.load(file)
        x = torch.from_numpy(array(16, *network.input_shape, low=-2, high=2))
        np.testing.assert_allclose(network(x).numpy(), networks.Runtime(file)(x.numpy()), rtol=1e-4, atol=1e-4)
