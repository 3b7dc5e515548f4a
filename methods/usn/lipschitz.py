"""Layer-to-output Lipschitz constants (arXiv 2510.00083, Lemma 3.1).

``||f^L(x) - f^L(x_0)||_q <= C_i ||f^i(x) - f^i(x_0)||_2`` for q >= 2, with the pre-activations f^i of layer i. The
constant is ``C_i = prod_{k>i} ||W^k||_2 L_{sigma^{k-1}}``; the paper prints one factor ``||W^i||`` and one
``L_{sigma^k}`` a layer more (see `Constants.printed`), which makes it too small wherever these are below 1.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from certify.bounds.activations import Clamp, LeakyReLU, ReLU, SShaped
from certify.bounds.affine import Add, Cat, Conv2d, Linear, Reshape, Scale
from certify.bounds.expectation import Expectation
from certify.bounds.graph import Graph
from certify.bounds.op import Affine, Op, UnsupportedOperation
from certify.bounds.pooling import MaxPool2d
from certify.bounds.softmax import Softmax
from certify.bounds.trace import trace


@dataclasses.dataclass(frozen=True)
class Constants:
    """What Lemma 3.1 says about the layers of a network, in order.

    Only layers that every path from input to output goes through are listed: beside another path (inside a residual
    branch, say) the output may change while the layer's pre-activation does not, and no constant exists. In a residual
    network these are the stem and the sums that end the blocks, whose pre-activation is the sum.

    Attributes:
        layers: path of the module that runs each convolution, linear map (normalisation folded in) or sum.
        neurons: d_i, pre-activations of the layer.
        after: L - i, the largest number of convolutions and linear maps on a path behind it.
        norms: ||W^i||_2, of the map with the normalisation folded in, on the true input size; NaN for a sum.
        to_output: C_i, corrected. Sound up to the convergence of the power iteration, which comes from below.
        printed: C_i as printed, with ||W^i|| and with each activation behind the next one counted twice; NaN where the
            paper says nothing: for a sum, or where a network that is no chain has activations that are not 1-Lipschitz.
        nodes: the nodes of the graph of `trace`, for `preactivations`.
        graph: the traced network.
    """

    layers: tuple[str, ...]
    neurons: tuple[int, ...]
    after: tuple[int, ...]
    norms: tuple[float, ...]
    to_output: tuple[float, ...]
    printed: tuple[float, ...]
    nodes: tuple[int, ...]
    graph: Graph = dataclasses.field(repr=False)

    @torch.no_grad()
    def preactivations(self, x: Tensor) -> list[Tensor]:
        """f^i(x) of every listed layer, (N, d_i) each, for images (N, C, H, W)."""
        values = self.graph.values(x)
        return [values[node].flatten(1) for node in self.nodes]


def spectral_norm(
    op: Affine, shape: tuple[int, ...], *, iterations: int = 1000, tolerance: float = 1e-7, seed: int = 0
) -> float:
    """Largest singular value of a linear operation on inputs of a given shape, by power iteration in float64.

    Unlike the norm of a reshaped kernel it is that of the convolution as an operator, with its stride, padding and the
    true input size.

    Args:
        op: a bounded operation of `certify` with one input.
        shape: of the input, without batch axis.
        iterations: at most so many.
        tolerance: stop when the estimate grows by less, relatively.
        seed: of the start, which is random so that no singular vector is missed.

    Returns:
        The norm, approached from below.
    """
    if isinstance(op, Reshape):
        return 1.0
    if isinstance(op, Scale):
        return 1.0 if op.scale is None else float(op.scale.detach().abs().max())
    if isinstance(op, Linear):
        return float(torch.linalg.matrix_norm(op.weight.detach().double(), 2))
    device = op.weight.device if isinstance(op, Conv2d) else torch.device("cpu")
    if isinstance(op, Conv2d):
        weight = op.weight.detach().double()
        op = Conv2d(weight, None, op.stride, op.padding, op.dilation, op.groups, op.input_shape)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn((1, *shape), dtype=torch.float64, generator=generator).to(device)
    norm = torch.zeros((), dtype=torch.float64)
    for _ in range(iterations):
        v = (v / v.norm()).requires_grad_(True)
        with torch.enable_grad():
            image = op.linear(v)
        length = image.detach().norm()
        if float(length) == 0.0:  # the whole map, for a random start
            return 0.0
        (pulled,) = torch.autograd.grad(image, v, image.detach() / length)
        previous, norm, v = norm, pulled.norm(), pulled.detach()
        if float(norm - previous) <= tolerance * float(norm):
            break
    return float(norm)


def _overlap(op: MaxPool2d) -> float:
    """A pool's constant: each input lies in so many windows an axis, and the maximum is 1-Lipschitz in its window."""
    windows = [math.ceil((d * (k - 1) + 1) / s) for k, s, d in zip(op.kernel, op.stride, op.dilation)]
    return math.sqrt(math.prod(min(w, k) for w, k in zip(windows, op.kernel)))


def lipschitz(op: Op, shape: tuple[int, ...]) -> float:
    """An l2 Lipschitz constant of an operation in any one of its inputs, of the given shape.

    Raises:
        UnsupportedOperation: no constant is known.
    """
    if isinstance(op, Add):  # an input that broadcasts counts as often as it is repeated
        sizes = [math.prod(s) for s in op.shapes]
        return math.sqrt(math.prod(torch.broadcast_shapes(*op.shapes)) / min(sizes))
    if isinstance(op, Cat):
        return 1.0
    if isinstance(op, Affine):
        return spectral_norm(op, shape)
    if isinstance(op, (ReLU, Clamp)):
        return 1.0
    if isinstance(op, LeakyReLU):
        return max(1.0, abs(float(op.slope)))
    if isinstance(op, SShaped):
        return float(op.derivative(torch.zeros((), dtype=torch.float64)))  # steepest at 0
    if isinstance(op, MaxPool2d):
        return _overlap(op)
    if isinstance(op, Softmax):
        return 0.5  # the largest eigenvalue of diag(p) - p p^T
    if isinstance(op, Expectation):
        return 0.5 * float(torch.linalg.matrix_norm(op.weight.detach().double(), 2))
    raise UnsupportedOperation(f"no Lipschitz constant is known for {op.label}")


def constants(model: nn.Module, x: Tensor) -> Constants:
    """Lemma 3.1 for a network.

    Args:
        model: any network that `certify` can bound; taken in eval mode, mode given back.
        x: an image (1, C, H, W), for the shapes; convolution norms depend on the input size.

    Raises:
        UnsupportedOperation: an operation without a known constant.
        ValueError: not a single layer lies on all paths before the last one.
    """
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            graph = trace(model.eval(), x[:1])[0].folded()
    finally:
        for module in training:
            module.training = True
    ops = {i: graph.operation(i) for i in range(1, len(graph.nodes))}
    factors = {i: lipschitz(op, graph.nodes[graph.nodes[i].inputs[0]].shape) for i, op in ops.items()}
    bends = {i: _activation(op, factors[i]) for i, op in ops.items()}
    size = len(graph.nodes)
    readers = graph.consumers()
    to_output, twice, ways_out, after = [0.0] * size, [0.0] * size, [0] * size, [0] * size
    to_output[graph.output] = twice[graph.output] = 1.0
    ways_out[graph.output] = 1
    for i in reversed(range(size)):
        for reader in readers[i]:
            # twice: every activation on the way squared; the first one behind a layer is divided out again below.
            to_output[i] += factors[reader] * to_output[reader]
            twice[i] += factors[reader] * bends[reader] * twice[reader]
            ways_out[i] += ways_out[reader]
            if ways_out[reader]:
                after[i] = max(after[i], after[reader] + isinstance(ops[reader], (Conv2d, Linear, Expectation)))
    ways_in = [1] + [0] * (size - 1)
    for i in range(1, size):
        ways_in[i] = sum(ways_in[j] for j in graph.nodes[i].inputs)
    chain = all(len(r) <= 1 for r in readers)
    mild = all(factor == 1.0 for factor in bends.values())
    found = [
        i
        for i, op in ops.items()
        if isinstance(op, (Conv2d, Linear, Add)) and after[i] and ways_in[i] * ways_out[i] == ways_in[graph.output]
    ]
    if not found:
        raise ValueError("no hidden layer lies on every path from the input to the output")
    printed = []
    for i in found:
        first = next((j for j in _behind(i, readers) if not isinstance(ops[j], Affine)), None) if chain else None
        overcount = 1.0 if first is None else bends[first]
        known = not isinstance(ops[i], Add) and (chain or mild)
        printed.append(factors[i] * twice[i] / overcount if known else math.nan)
    return Constants(
        tuple(ops[i].path for i in found),
        tuple(math.prod(graph.nodes[i].shape) for i in found),
        tuple(after[i] for i in found),
        tuple(math.nan if isinstance(ops[i], Add) else factors[i] for i in found),
        tuple(to_output[i] for i in found),
        tuple(printed),
        tuple(found),
        graph,
    )


def _activation(op: Op, factor: float) -> float:
    """The constant of what an operation has of an activation."""
    if isinstance(op, Affine):
        return 1.0
    return 0.5 if isinstance(op, Expectation) else factor  # an expectation is a softmax and a linear map


def _behind(node: int, readers: list[list[int]]) -> list[int]:
    """The nodes behind one of a chain, in order."""
    path: list[int] = []
    while readers[node]:
        node = readers[node][0]
        path.append(node)
    return path
