"""auto-LiRPA as a second, independent bound engine: the only importer of that library.

PyPI has release 0.3 (2022), written for torch < 1.13. `_library` makes it run beside a current torch and repairs one
multiplication; newer releases (0.7) are used as they are. Where the library gives wrong or no answers, this adapter
changes what it is asked rather than what it computes:

* scalar and per-channel constants (``(x - 0.3) / 0.35``) become (1, C, 1, 1) buffers, which its patches mode needs;
* an L2 ball enters through an identity layer: the library keeps the radius only in a first linear or convolutional
  layer, and behind a normalisation its intervals collapse to a point (unsound by orders of magnitude in 0.3);
* an affine family is a linear layer from its parameters to the image, then the clip as two ReLUs;
* ``sparse_features_alpha`` is off: it fails in 0.3 wherever most neurons of a layer are unstable;
* backward methods take one image at a time, because the library bounds the union of all images' unstable neurons.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from certify.arithmetic import full_float32
from certify.perturbations import L2, AffineFamily, Box, Linf, Perturbation

FIXED = "CROWN-Optimized-Fixed"
METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized", FIXED)

INSTALL = (
    "this needs auto-LiRPA, which is not installed; run `uv sync --group lirpa`, or `pip install --no-deps "
    "auto-LiRPA==0.3 appdirs tqdm` beside a current torch"
)


@full_float32()
def bounds(
    model: nn.Module,
    x: Tensor,
    p: Perturbation,
    method: str = "CROWN",
    C: Tensor | None = None,
    *,
    iterations: int = 20,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Bounds on the outputs, or on ``C y``, over every image that `p` allows, by auto-LiRPA.

    Args:
        model: maps (N, *input) to (N, outputs). Works on a copy in eval mode; the model is never changed.
        x: images (N, *input), dtype and device of the model.
        p: `Linf`, `Box`, `L2` (the whole ball: its clip to [0, 1] is not used, which is sound and looser), or an affine
            family, bounded over its box of parameters.
        method: "IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized" (alpha-CROWN, which optimises the intervals inside the
            network anew in every step) or "CROWN-Optimized-Fixed" (alpha-CROWN on CROWN's intervals).
        C: (N, rows, outputs) or (rows, outputs) linear functions of the output; None means the outputs themselves.
        iterations: optimisation steps of alpha-CROWN.
        batch_size: images at a time; default all of them for "IBP", one for the others. Affine families go one by one.

    Returns:
        Lower and upper ends, each (N, rows) or (N, outputs), without gradients.

    Raises:
        ModuleNotFoundError: auto-LiRPA is not installed.
        ValueError: unknown method, or `C` and `x` do not fit.
        TypeError: a perturbation that the library cannot express.
        RuntimeError: the library cannot bound this network, or parsed it into another function.
    """
    if method not in METHODS:
        raise ValueError(f"unknown auto-LiRPA method {method!r}; expected one of {', '.join(METHODS)}")
    if not isinstance(p, Linf | Box | L2 | AffineFamily):
        raise TypeError(f"auto-LiRPA cannot express {type(p).__name__}; use Linf, Box, L2 or an affine family")
    p.check(x)
    if not available():
        raise ModuleNotFoundError(INSTALL)
    library = _library()
    net = _prepare(model)
    with torch.no_grad():
        outputs = net(x).shape[1]
    if C is not None:
        if C.shape[-1] != outputs or C.ndim not in (2, 3) or (C.ndim == 3 and len(C) != len(x)):
            raise ValueError(f"C is {tuple(C.shape)}, expected ({len(x)}, rows, {outputs}) or (rows, {outputs})")
        C = C.to(x).expand(len(x), -1, -1) if C.ndim == 2 else C.to(x)
    if len(x) == 0:
        empty = x.new_zeros(0, outputs if C is None else C.shape[1])
        return empty, empty.clone()
    call = functools.partial(_compute, library, method=method, iterations=iterations)
    if batch_size is None:
        batch_size = len(x) if method == "IBP" else 1
    los, his = [], []
    if isinstance(p, AffineFamily):
        low, high = p.limits(x)
        directions = p.directions(x)
        for i in range(len(x)):
            embedded = nn.Sequential(_Embed(x[i], directions[i], p.clip), net)
            lo, hi = call(
                embedded, _box_input(library, low[i : i + 1], high[i : i + 1]), None if C is None else C[i : i + 1]
            )
            los.append(lo)
            his.append(hi)
    else:
        if isinstance(p, L2):
            radii = torch.as_tensor(p.eps, dtype=x.dtype).expand(len(x)).tolist()
            net = nn.Sequential(_identity_layer(x), net)
            batch_size = batch_size if len(set(radii)) == 1 else 1
        lower, upper = p.hull(x)
        for i in range(0, len(x), batch_size):
            part = slice(i, i + batch_size)
            if isinstance(p, L2):
                ball = library.PerturbationLpNorm(norm=2, eps=radii[i])
                entry = library.BoundedTensor(x[part], ball)
            else:
                entry = _box_input(library, lower[part], upper[part])
            lo, hi = call(net, entry, None if C is None else C[part])
            los.append(lo)
            his.append(hi)
    return torch.cat(los), torch.cat(his)


def available() -> bool:
    """Whether auto-LiRPA is installed (without importing it)."""
    try:
        importlib.metadata.version("auto-LiRPA")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _compute(
    library: types.ModuleType, net: nn.Module, entry: Tensor, C: Tensor | None, method: str, iterations: int
) -> tuple[Tensor, Tensor]:
    """Bounds for one batch, in patches mode and, where the library has no patches rule for a network, as matrices."""
    point = entry.detach().as_subclass(Tensor)
    wide = _Widened(net, point).eval()
    failure: Exception | None = None
    for mode in ("patches", "matrix"):
        options = {
            "conv_mode": mode,
            "sparse_features_alpha": False,
            "optimize_bound_args": {"iteration": iterations, "lr_alpha": 0.1, "init_alpha": method != FIXED},
        }
        try:
            with _quiet(), _default_dtype(point.dtype), torch.set_grad_enabled(method.startswith("CROWN-Optimized")):
                bounded = library.BoundedModule(wide, point, bound_opts=options, device=point.device)
                parsed = bounded(entry)
                inside = None
                if method == FIXED:
                    # Slopes start from a CROWN pass, whose intervals are handed to every step after it.
                    _, _, inside = bounded.init_slope((entry,), c=C)
                asked = "CROWN-Optimized" if method == FIXED else method
                lo, hi = bounded.compute_bounds(x=(entry,), method=asked, C=C, intermediate_layer_bounds=inside)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what the library lacks, it says in many ways
            failure = error
            continue
        with torch.no_grad():
            expected = net(point)
        gap = float((parsed.detach() - expected).abs().max())
        if not gap <= 1e-4 * (1 + float(expected.abs().max())):
            raise RuntimeError(f"auto-LiRPA parsed the network into another function: outputs differ by {gap:.3g}")
        return lo.detach(), hi.detach()
    raise RuntimeError(
        f"auto-LiRPA cannot bound this network with {method}: {type(failure).__name__}: {failure}"
    ) from failure


def _box_input(library: types.ModuleType, lo: Tensor, hi: Tensor) -> Tensor:
    box = library.PerturbationLpNorm(norm=float("inf"), x_L=lo, x_U=hi)
    return library.BoundedTensor((lo + hi) / 2, box)


def _prepare(model: nn.Module) -> nn.Module:
    """A frozen copy in eval mode, without dropout (which puts 0.3 in training mode), ReLU6 as two ReLUs (no rule)."""
    holder = nn.Sequential(copy.deepcopy(model).eval().requires_grad_(False))
    for parent in list(holder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _DROPOUTS):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.ReLU6):
                setattr(parent, name, _TwoSided())
    return holder[0].eval()


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _TwoSided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 6 - torch.relu(6 - torch.relu(x))


def _identity_layer(x: Tensor) -> nn.Module:
    """A layer that changes nothing: a 1x1 convolution for images, else a linear layer over the last axis."""
    layer: nn.Module
    if x.ndim == 4:
        layer = nn.Conv2d(x.shape[1], x.shape[1], 1, bias=False)
        eye = torch.eye(x.shape[1]).reshape(x.shape[1], x.shape[1], 1, 1)
    elif x.ndim == 2:
        layer = nn.Linear(x.shape[1], x.shape[1], bias=False)
        eye = torch.eye(x.shape[1])
    else:
        raise ValueError(f"L2 bounds by auto-LiRPA take inputs (N, D) or (N, C, H, W), got {tuple(x.shape)}")
    layer.weight = nn.Parameter(eye, requires_grad=False)
    return layer.to(x)


class _Embed(nn.Module):
    """The path of one image: parameters (1, K) to ``clip(image + sum_k t_k direction_k)`` (1, *image)."""

    def __init__(self, image: Tensor, directions: Tensor, clip: bool) -> None:
        super().__init__()
        self.shape = image.shape
        self.linear = nn.Linear(len(directions), image.numel()).to(image)
        self.linear.weight = nn.Parameter(directions.flatten(1).T.contiguous(), requires_grad=False)
        self.linear.bias = nn.Parameter(image.flatten().clone(), requires_grad=False)
        self.flat_one: Tensor | None
        self.register_buffer("flat_one", torch.ones(1, image.numel()).to(image) if clip else None)

    def forward(self, t: Tensor) -> Tensor:
        flat = self.linear(t)
        if self.flat_one is not None:
            flat = self.flat_one - torch.relu(self.flat_one - torch.relu(flat))
        return flat.reshape(-1, *self.shape)


_ARITHMETIC: frozenset[Any] = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, "add sub mul div subtract multiply divide true_divide rsub"),
        (Tensor, "add sub mul div subtract multiply divide true_divide __add__ __radd__ __sub__ __rsub__ __mul__"),
        (Tensor, "__rmul__ __truediv__ __div__ add_ sub_ mul_ div_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__"),
    )
    for name in names.split()
    if hasattr(owner, name)
)


class _Widen(TorchFunctionMode):
    """Replaces the constant beside a (N, C, H, W) tensor in ``+ - * /`` by `constant` of it, (1, C, 1, 1)."""

    def __init__(self, constant: Callable[[Any, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.constant = constant

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ARITHMETIC and not kwargs and len(args) == 2:
            for image, other, place in ((args[0], args[1], 1), (args[1], args[0], 0)):
                if isinstance(image, Tensor) and image.ndim == 4 and image.is_floating_point():
                    wide = self.constant(other, image)
                    if wide is not None:
                        args = (image, wide) if place == 1 else (wide, image)
                        break
        return func(*args, **(kwargs or {}))


class _Widened(nn.Module):
    """`net` with its scalar and (C, 1, 1) constants replaced by buffers, found in one pass over `example`.

    A constant is a number, or a tensor that no gradient connects to the input. Each forward pass meets the same
    constants in the same order.
    """

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.net = net
        self.found: list[str | None] = []
        with torch.enable_grad(), _Widen(self._record):
            net(example.detach().requires_grad_())

    def _record(self, value: Any, image: Tensor) -> Tensor | None:
        self.found.append(None)
        channels = image.shape[1]
        if isinstance(value, Tensor):
            narrow = value.ndim < 4 and (value.numel() == 1 or value.shape[-3:] == (channels, 1, 1))
            if value.requires_grad or not narrow:
                return None
        elif isinstance(value, bool) or not isinstance(value, int | float):
            return None
        wide = torch.as_tensor(value, dtype=image.dtype, device=image.device).reshape(1, -1, 1, 1)
        name = f"constant_{len(self.found)}"
        self.register_buffer(name, wide.expand(1, channels, 1, 1).clone())
        self.found[-1] = name
        return getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        names = iter(self.found)

        def recall(value: Any, image: Tensor) -> Tensor | None:
            name = next(names)
            return None if name is None else getattr(self, name)

        with _Widen(recall):
            return self.net(x)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The library creates constants and returns optimised bounds in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress prints and the tracer's warnings about constants."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@functools.lru_cache(maxsize=1)
def _library() -> types.ModuleType:
    """The imported library, with the repairs that release 0.3 needs on a current torch and numpy."""
    with _quiet():
        if not importlib.metadata.version("auto-LiRPA").startswith("0.3"):
            return importlib.import_module("auto_LiRPA")
        _make_graph_nodes_indexable()
        with _names_that_went_away():
            library = importlib.import_module("auto_LiRPA")
    _repair(library)
    return library


@contextlib.contextmanager
def _names_that_went_away() -> Iterator[None]:
    """Modules and functions that 0.3 imports and torch or numpy no longer have; there only during the import."""
    symbolic = importlib.import_module("torch.onnx.symbolic_helper")
    state = importlib.import_module("torch.onnx._internal.torchscript_exporter._globals").GLOBALS
    sets = "numpy.lib.arraysetops"
    stub = types.ModuleType(sets)
    stub.__dict__["isin"] = None  # imported by name, never called
    add_sets, add_opset = sets not in sys.modules, not hasattr(symbolic, "_set_opset_version")
    if add_sets:
        sys.modules[sets] = stub
    if add_opset:
        symbolic.__dict__["_set_opset_version"] = lambda version: setattr(state, "export_onnx_opset_version", version)
    try:
        yield
    finally:
        if add_sets:
            del sys.modules[sets]
        if add_opset:
            del symbolic.__dict__["_set_opset_version"]


def _make_graph_nodes_indexable() -> None:
    """``node[key]``, dropped from torch after 1.12: the attribute, read by its kind."""
    node: Any = torch._C.Node
    if not hasattr(node, "__getitem__"):
        node.__getitem__ = lambda self, key: getattr(self, self.kindOf(key))(key)


def _repair(library: types.ModuleType) -> None:
    """Methods of 0.3 that a current torch calls differently, and the rule for constants in patches mode."""
    module = library.BoundedModule
    named_members = module._named_members

    def members(self: Any, get: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        return named_members(self, get, prefix, recurse)

    module._named_members = members
    module.register_parameter = nn.Module.register_parameter  # the override only adds a reference to torch._six
    multiply = importlib.import_module("auto_LiRPA.operators.bivariate").BoundMul
    patches = importlib.import_module("auto_LiRPA.patches").Patches
    by_constant = multiply._multiply_by_const

    def per_channel(A: Any, constant: Tensor) -> Any:
        # The last three axes of patches are (channels, height, width); the original wants a constant for each image.
        if isinstance(A, patches) and constant.shape == (1, A.patches.shape[-3], 1, 1):
            return A.create_similar(A.patches * constant[0])
        return by_constant(A, constant)

    multiply._multiply_by_const = staticmethod(per_channel)

    def slopes(
        lower: Tensor, upper: Tensor, for_lower: Tensor | None, for_upper: Tensor | None
    ) -> tuple[Any, Any, Any]:
        # As the original, except that slopes at exactly 0 or 1, where they start, still get a gradient: clamp passes
        # none at its ends in current torch, and the optimisation would never move.
        active, inactive = (lower >= 0).to(lower.dtype), (upper <= 0)
        unstable = (1 - active) * (1 - inactive.to(lower.dtype))
        ends = [
            None if v is None else (v + (v.clamp(0, 1) - v).detach()) * unstable + active
            for v in (for_lower, for_upper)
        ]
        return ends[0], ends[1], inactive.all()

    importlib.import_module("auto_LiRPA.operators.activation").BoundRelu._relu_mask_alpha = staticmethod(slopes)
