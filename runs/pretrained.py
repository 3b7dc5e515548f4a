"""Networks that start from published ImageNet weights: the setting ``pretrained=True`` of a cell's network.

The weights are the file ``weights/<network>.safetensors`` or ``.pth`` of the data directory where there is one, in the
layout of torchvision (resnet18, googlenet) or timm (the others); else those two fetch their own, once, into their
cache. What was taken is in the record, in the notes of its network: for a file with the first digits of its SHA-256.
"""

from __future__ import annotations

from pathlib import Path

from runs.cell import Network
from runs.packages import ours
from runs.store import file_sha256

SETTING = "pretrained"
FOLDER = "weights"
_SUFFIXES = (".safetensors", ".pth")
_SIDE = 64  # every network of the zoo has its published stem from here on


def wanted(network: Network) -> bool:
    """Whether a cell's network starts from published weights.

    Raises:
        ValueError: a setting that networks do not have, or a value other than True and False.
    """
    from runs.suites.plan import check

    given = dict(network.settings)
    for name in given:
        check("setting of a network", name, (SETTING,))
    value = given.get(SETTING, False)
    if not isinstance(value, bool):
        raise ValueError(f"network {network.label}: {SETTING} is True or False, got {value!r}")
    return value


def source(network: Network, root: Path | None) -> bool | Path:
    """What `models.create` is to be told: False, the path of a local file, or True for torchvision's or timm's own.

    Args:
        network: of the cell.
        root: the data directory; None for $CERTPRUNE_DATA.

    Raises:
        ValueError: see `wanted`.
    """
    if not wanted(network):
        return False
    files = [file for file in _places(network, root) if file.is_file()]
    return files[0] if files else True


def stated(network: Network, root: Path | None) -> dict[str, str]:
    """What a trained network depends on besides its data: nothing, or the SHA-256 of its weights' file.

    ``published`` stands for weights from torchvision or timm, which do not change.
    """
    found = source(network, root)
    if not found:
        return {}
    return {"weights": file_sha256(found) if isinstance(found, Path) else "published"}


def check(network: Network, root: Path | None) -> None:
    """Take the weights over into a network of this kind once, so that what cannot be had is known before any cell runs.

    Raises:
        ValueError: no weights are published for this network or this width, they could not be fetched, or the local
            file does not fit; the message says where to put a file that does.
    """
    if not wanted(network):
        return
    models = ours("models")
    try:
        models.create(network.name, 2, image_size=_SIDE, width=network.width, pretrained=source(network, root))
    except (ValueError, RuntimeError) as error:
        place = _places(network, root)[-1]
        raise ValueError(
            f"the plan starts {network.name} from published weights (network setting {SETTING}=True): {error}. Put the "
            f"file that torchvision or timm publishes at {place} (or .safetensors), or choose a preset whose networks "
            "start from random weights"
        ) from error


def _places(network: Network, root: Path | None) -> list[Path]:
    library = ours("datasets")
    folder: Path = library.data_folder(root, library.cache_folder(None)) / FOLDER
    return [folder / f"{network.name}{suffix}" for suffix in _SUFFIXES]
