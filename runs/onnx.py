"""ONNX files as torch modules and back: `load` (checked against onnxruntime), `export` (round trip checked), `Runtime`.

The importer covers the operators of `runs.onnx_operators` and folds constant sub-graphs such as the Shape/Gather/Concat
idiom that computes reshape targets. Layers with weights become `nn.Conv2d`, `nn.Linear` and `nn.BatchNorm2d`, so that
pruning and bound propagation see an ordinary network. Files are written for one input; the module takes batches, also
for graphs that have no batch axis at all. Importing this module imports torch, but not the onnx packages.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import gzip
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runs.onnx_operators import BUILDERS, Array, ImportFailure, Node, Value

TOLERANCE = 1e-4
"""Largest difference between a module and onnxruntime, relative to the largest output, that counts as agreement."""


@dataclasses.dataclass(frozen=True)
class _Step:
    module: nn.Module
    inputs: tuple[str, ...]
    output: str


class Network(nn.Module):
    """An imported network: batches (N, *input_shape) to (N, outputs).

    Attributes:
        input_shape: the shape of one input without a batch axis; VNN-LIB variables number it in row-major order.
        outputs: how many numbers one input gives (the file's output, flattened).
        source: where it came from, for messages.
    """

    def __init__(
        self, steps: Sequence[_Step], entry: str, result: str, input_shape: tuple[int, ...], outputs: int, source: str
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([step.module for step in steps])
        self.input_shape = input_shape
        self.outputs = outputs
        self.source = source
        self._entry, self._result = entry, result
        last_use = {name: i for i, step in enumerate(steps) for name in step.inputs}
        dead = [[n for n, at in last_use.items() if at == i and n != result] for i in range(len(steps))]
        self._wiring = tuple((step.inputs, step.output, tuple(gone)) for step, gone in zip(steps, dead))

    def forward(self, x: Tensor) -> Tensor:
        values = {self._entry: x}
        for layer, (inputs, output, dead) in zip(self.layers, self._wiring):
            values[output] = layer(*[values[name] for name in inputs])
            for name in dead:  # a wide network would otherwise keep every activation until the end
                del values[name]
        y = values[self._result]
        return y if y.ndim == 2 else torch.flatten(y, 1)


def operators() -> tuple[str, ...]:
    """The ONNX operators that `load` understands on computed tensors (constants may use any)."""
    return tuple(sorted(BUILDERS))


def load(path: str | Path, *, check: bool = True) -> Network:
    """The network in an ONNX file (``.onnx`` or ``.onnx.gz``) as a module in evaluation mode on the CPU, in float32.

    With `check`, its outputs on random batches are compared with onnxruntime's, input by input.

    Raises:
        FileNotFoundError: there is no such file.
        ImportFailure: the file is not ONNX, has several inputs or outputs, uses an unknown operator (named, with the
            node's name), mixes the inputs of a batch, holds non-finite weights, or disagrees with onnxruntime.
    """
    path = Path(path)
    model = _read(path)
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw initial weights before they get the file's
            network = _build(model, str(path))
    except ImportFailure as e:
        raise ImportFailure(f"{path}: {e}") from None
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ImportFailure(f"{path}: the weights {name} hold NaN or infinity; export the network again")
    network.eval().requires_grad_(False)
    if check:
        _compare(network, Runtime(path), f"{path}: the imported network", network.input_shape)
    return network


def export(model: nn.Module, path: str | Path, input_shape: Sequence[int], *, opset: int = 17) -> Path:
    """Write `model` for one input (1, *input_shape) as an ONNX file and check the file against the model.

    A copy in evaluation mode and float32 is exported; the model itself is left as it is. Suffix ``.gz`` compresses.

    Raises:
        ImportFailure: onnxruntime and the model disagree about the written file (which is then removed).
    """
    path = Path(path)
    copied = copy.deepcopy(model).cpu().float().eval()
    buffer: Any = io.BytesIO()  # the exporter takes a file object, its annotation says paths only
    with warnings.catch_warnings():
        # The TorchScript exporter is called deprecated, but the newer one needs onnxscript.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copied,
            (torch.rand(1, *input_shape),),
            buffer,
            dynamo=False,
            opset_version=opset,
            input_names=["input"],
            output_names=["output"],
        )
    data = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    try:
        _compare(copied, Runtime(path), f"{path}: the exported network", tuple(input_shape))
    except ImportFailure:
        path.unlink()
        raise
    return path


class Runtime:
    """onnxruntime on the CPU: the reference answer for an ONNX file. Call it with (N, ...) inputs in float32.

    Args:
        path: the file (``.onnx`` or ``.onnx.gz``).
        threads: threads inside an operator; 0 leaves the choice to onnxruntime.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        import onnxruntime

        path = Path(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # files that list weights among their inputs give a warning for each of them
        source = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else str(path)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # its exceptions share no base class
            raise ImportFailure(f"{path}: onnxruntime cannot run this file: {e}") from None
        entry = self._session.get_inputs()[0]
        self._name = entry.name
        self._double = entry.type == "tensor(double)"
        self._shape = tuple(d if isinstance(d, int) and d > 0 else 1 for d in entry.shape)

    def __call__(self, x: Array) -> Array:
        """Outputs (N, outputs) for inputs (N, ...), each fed on its own in the file's shape."""
        x = np.asarray(x, dtype=np.float64 if self._double else np.float32).reshape(-1, *self._shape)
        return np.stack([self._session.run(None, {self._name: row})[0].reshape(-1) for row in x])


def _read(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file {path}")
    try:
        if path.suffix == ".gz":
            return onnx.load_from_string(gzip.decompress(path.read_bytes()))
        return onnx.load(str(path))
    except (DecodeError, gzip.BadGzipFile, EOFError) as e:
        raise ImportFailure(f"{path} is not an ONNX file ({e})") from None


def _build(model: Any, source: str) -> Network:
    """Run the graph on one random input, operator by operator, folding what does not depend on the input."""
    from onnx import helper, numpy_helper

    graph = model.graph
    constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ImportFailure(f"has {len(inputs)} inputs and {len(graph.output)} outputs; one of each is supported")
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    entry, result = inputs[0].name, graph.output[0].name
    shape = [int(d.dim_value) for d in inputs[0].type.tensor_type.shape.dim]
    batched = len(shape) > 1 and shape[0] in (0, 1)
    if not shape or any(d <= 0 for d in (shape[1:] if batched else shape)):
        raise ImportFailure(f"input {entry!r} has shape {shape} (0: not fixed); only the batch axis may be left open")
    input_shape = tuple(shape[1:] if batched else shape)
    generator = torch.Generator().manual_seed(0)
    values = {entry: Value(torch.rand(1, *input_shape, generator=generator), batched)}
    steps: list[_Step] = []
    for proto in graph.node:
        dynamic = {i: values[n] for i, n in enumerate(proto.input) if n in values}
        missing = [n for n in proto.input if n and n not in values and n not in constants]
        if missing:
            raise ImportFailure(f"{proto.op_type} node {_name(proto)!r} reads {missing[0]!r}, which no operator writes")
        if proto.op_type == "Shape" and dynamic:
            constants[proto.output[0]] = np.array(dynamic[0].shape, dtype=np.int64)
            continue
        if not dynamic:
            constants.update(_fold(proto, constants, model))
            continue
        node = Node(
            op=proto.op_type,
            name=_name(proto),
            attributes={a.name: helper.get_attribute_value(a) for a in proto.attribute},
            values=dynamic,
            constants={i: constants[n] for i, n in enumerate(proto.input) if n in constants},
            opset=opset,
        )
        if proto.domain not in ("", "ai.onnx") or proto.op_type not in BUILDERS:
            close = difflib.get_close_matches(proto.op_type, BUILDERS, n=3)
            hint = f" (close: {', '.join(close)})" if close else ""
            raise node.failure(f"is not supported{hint}; supported operators: {', '.join(operators())}")
        names = tuple(proto.input[i] for i in dynamic)
        if any(o in {n for p in graph.node for n in p.input} for o in proto.output[1:] if o):
            raise node.failure("has a second output that is used, which is not supported")
        if _absorb(node, names, steps, graph):
            steps[-1] = dataclasses.replace(steps[-1], output=proto.output[0])
            module, keeps_batch = steps[-1].module, next(iter(dynamic.values())).batched
            sample = module.eval()(*[values[n].sample for n in steps[-1].inputs])
        else:
            module, keeps_batch = BUILDERS[proto.op_type](node)
            try:
                sample = module.eval()(*[v.sample for v in dynamic.values()])
            except (RuntimeError, TypeError, IndexError) as e:
                raise node.failure(f"does not fit its input {[v.shape for v in dynamic.values()]}: {e}") from None
            steps.append(_Step(module, names, proto.output[0]))
        values[proto.output[0]] = Value(sample.detach(), keeps_batch)
    if result not in values:
        raise ImportFailure(f"the output {result!r} does not depend on the input {entry!r}")
    return Network(steps, entry, result, input_shape, values[result].sample[0].numel(), source)


def _name(proto: Any) -> str:
    return proto.name or (proto.output[0] if proto.output else "")


def _absorb(node: Node, names: tuple[str, ...], steps: list[_Step], graph: Any) -> bool:
    """Turn MatMul followed by Add of a constant vector into one `nn.Linear` with a bias, when nobody else reads it."""
    if node.op != "Add" or len(names) != 1 or not steps or steps[-1].output != names[0]:
        return False
    layer = steps[-1].module
    readers = sum(name == names[0] for p in graph.node for name in p.input) + (graph.output[0].name == names[0])
    if not isinstance(layer, nn.Linear) or layer.bias is not None or readers != 1:
        return False
    constant = node.tensor(0 if 0 in node.constants else 1)
    if constant.numel() != layer.out_features or constant.shape[-1:] != (layer.out_features,):
        return False
    if constant.ndim > len(next(iter(node.values.values())).shape):
        return False
    layer.bias = nn.Parameter(constant.reshape(-1).clone())
    return True


def _fold(proto: Any, constants: dict[str, Array], model: Any) -> dict[str, Array]:
    """Evaluate an operator whose inputs are all known, with the reference implementation of the onnx package."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    names = [n for n in proto.input if n]
    known = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(constants[n].dtype), None) for n in names]
    wanted = [helper.make_empty_tensor_value_info(n) for n in proto.output if n]
    graph = helper.make_graph([proto], "constant", known, wanted)
    one = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    try:
        outputs = ReferenceEvaluator(one).run(None, {n: constants[n] for n in names})
    except Exception as e:  # the reference evaluator raises whatever its operator raised
        raise ImportFailure(f"{proto.op_type} node {_name(proto)!r} on constants cannot be evaluated: {e}") from None
    return {n: np.asarray(v) for n, v in zip([n for n in proto.output if n], outputs)}


def _compare(model: nn.Module, runtime: Runtime, who: str, shape: tuple[int, ...]) -> None:
    """Raise ImportFailure unless both agree on random inputs of `shape`: a batch here, one by one there."""
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([torch.rand(3, *shape, generator=generator), torch.randn(3, *shape, generator=generator)])
    with torch.no_grad():
        ours = torch.cat([model(x), *(model(row) for row in x.split(1))]).flatten(1).numpy()
    theirs = np.tile(runtime(x.numpy()), (2, 1))
    if ours.shape != theirs.shape:
        raise ImportFailure(f"{who} gives outputs of shape {ours.shape[1:]}, onnxruntime {theirs.shape[1:]}")
    difference = float(np.abs(ours - theirs).max())
    scale = float(np.abs(theirs).max())
    if not (math.isfinite(difference) and difference <= TOLERANCE * scale + 1e-6):
        raise ImportFailure(
            f"{who} and onnxruntime differ by {difference:.3g} on random inputs (outputs up to {scale:.3g}); "
            "an operator is understood differently, so no verdict would be about this file"
        )
