"""Image classifiers in the format of Hugging Face transformers, as modules of pixels.

What the model's image processor does (resize, crop, rescale, normalize) is part of the module, so that an attack works on
the pixels of the image and its gradient goes through all of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.errors import UsageError, first_line
from advkit.models.networks import Normalize

_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_flip_channel_order", "do_convert_rgb"}


class Pixels(nn.Module):
    """What an image processor does, as a differentiable module: (N, C, H, W) in [0, 1] to the model's input.

    Arguments:
        settings: The contents of preprocessor_config.json.

    Raises:
        UsageError: A step or a setting that is not known here.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        if not isinstance(settings, dict):
            raise UsageError(f"the image processor's settings are {settings!r:.80}; they should be an object, {{...}}")
        steps = {key for key, value in settings.items() if key.startswith("do_") and value is True}
        if steps - _KNOWN_STEPS - {"do_reduce_labels"}:
            strange = ", ".join(sorted(steps - _KNOWN_STEPS))
            raise UsageError(
                f"the image processor does {strange}, which advkit does not know; wrap the model in a file.py:function"
            )
        self.size = _sizes(settings.get("size")) if _on(settings, "do_resize", "size") else {}
        self.crop = (
            _sizes(settings.get("crop_size", settings.get("size")), shortest=False) if settings.get("do_center_crop") else {}
        )
        crop_pct = settings.get("crop_pct")
        self.crop_pct = None if crop_pct is None else _number("crop_pct", crop_pct)
        self.mode = _mode(settings.get("resample", 2)) if self.size else ""
        self.flip = bool(settings.get("do_flip_channel_order"))
        rescale = settings.get("do_rescale", True)
        # A processor starts from bytes, in [0, 255].
        self.scale = 255.0 * (_number("rescale_factor", settings.get("rescale_factor", 1 / 255)) if rescale else 1.0)
        self.offset = 1.0 if rescale and settings.get("rescale_offset") else 0.0
        on = _on(settings, "do_normalize", "image_mean")
        self.normalize = _normalize(settings["image_mean"], settings.get("image_std")) if on else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The model's input, with shape (N, C, H', W')."""
        if self.size:
            x = self._resized(x)
        if self.crop:
            x = _center(x, self.crop["height"], self.crop["width"])
        if self.flip:
            x = x.flip(1)
        return self.normalize(x * self.scale - self.offset)

    def _resized(self, x: Tensor) -> Tensor:
        short = self.size.get("shortest_edge")
        if short is not None and self.crop_pct is not None:
            return self._cropped(x, short, self.crop_pct)
        if short is not None:
            return self._interpolated(x, *_shortest(x, short))
        return self._interpolated(x, self.size["height"], self.size["width"])

    def _cropped(self, x: Tensor, short: int, crop_pct: float) -> Tensor:
        """What ConvNeXt does: small images lose their border, large ones are squeezed."""
        if short >= 384:
            return self._interpolated(x, short, short)
        return _center(self._interpolated(x, *_shortest(x, int(short / crop_pct))), short, short)

    def _interpolated(self, x: Tensor, height: int, width: int) -> Tensor:
        if x.shape[2:] == (height, width):
            return x
        if self.mode == "nearest":
            return F.interpolate(x, (height, width), mode="nearest-exact")
        # Bicubic overshoots, and images are clipped there.
        return F.interpolate(x, (height, width), mode=self.mode, align_corners=False, antialias=True).clamp(0.0, 1.0)


def _on(settings: dict[str, Any], step: str, needs: str) -> bool:
    return bool(settings.get(step, True)) and settings.get(needs) is not None


def _sizes(size: Any, shortest: bool = True) -> dict[str, int]:
    """{"height", "width"} or, where that is allowed, {"shortest_edge"}; older files have a number for a square."""
    sizes = size if isinstance(size, dict) else {"height": size, "width": size}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    is_known = {"height", "width"} <= sizes.keys() or (shortest and "shortest_edge" in sizes)
    if not is_known or not all(map(_is_pixels, sizes.values())):
        known = "height and width, or shortest_edge" if shortest else "height and width"
        raise UsageError(f"the image processor's size is {size!r}; advkit knows {known}, in whole pixels")
    return {key: int(value) for key, value in sizes.items()}


def _is_pixels(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and int(value) >= 1


def _mode(resample: Any) -> str:
    if not isinstance(resample, int) or resample not in _RESAMPLE:
        known = ", ".join(f"{key} ({name})" for key, name in _RESAMPLE.items())
        raise UsageError(f"the image processor resamples by method {resample!r}; advkit knows {known}")
    return _RESAMPLE[resample]


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"the image processor's {key} is {value!r}; it should be a number greater than 0")
    return value


def _normalize(mean: Any, std: Any) -> Normalize:
    for key, values in (("image_mean", mean), ("image_std", std)):
        numbers = values if isinstance(values, list | tuple) else ()
        if not numbers or not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
            raise UsageError(f"the image processor's {key} is {values!r}; it should be a list of numbers, one a channel")
    if len(mean) != len(std) or min(std) <= 0:
        what = f"the image processor's image_mean is {mean} and its image_std {std}"
        raise UsageError(f"{what}; they should have one number a channel, those of image_std greater than 0")
    return Normalize(tuple(map(float, mean)), tuple(map(float, std)))


def _shortest(x: Tensor, short: int) -> tuple[int, int]:
    height, width = x.shape[2:]
    long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def _center(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of each image; a smaller one is first put in the middle of a black one."""
    more_h, more_w = max(0, height - x.shape[2]), max(0, width - x.shape[3])
    top, left = math.ceil(more_h / 2), math.ceil(more_w / 2)
    x = F.pad(x, (left, more_w - left, top, more_h - top))
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


class PixelClassifier(nn.Module):
    """A transformers classifier behind its image processor: pixels (N, C, H, W) in [0, 1] to logits (N, K)."""

    def __init__(self, pixels: Pixels | nn.Identity, classifier: nn.Module) -> None:
        super().__init__()
        self.pixels, self.classifier = pixels, classifier

    def forward(self, x: Tensor) -> Tensor:
        """The logits, with shape (N, K)."""
        return self.classifier(pixel_values=self.pixels(x)).logits


def load(name: str, local: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """The classifier of a folder, or of the hub, and what to know of it.

    Arguments:
        name: A folder with config.json and safetensors, or a name on the hub: ``org/name``.
        local: Whether it is a folder; nothing is downloaded then.

    Raises:
        UsageError: transformers is not installed, or there is no image classifier with safetensors weights and all of them.
    """
    try:
        from transformers import AutoModelForImageClassification
    except ImportError:
        raise UsageError(f'{name} needs transformers, which is not installed; run pip install "advkit[hf]"') from None
    _check_weights(name, local)
    try:
        # Code in the repository is not run, and pickled weights are not read.
        classifier, info = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, local_files_only=local, output_loading_info=True
        )
    except Exception as error:
        raise _refused(name, error) from error
    if info["missing_keys"]:
        shown = ", ".join(sorted(info["missing_keys"])[:3])
        raise UsageError(f"the weights of {name} lack {shown}; it is not a trained image classifier")
    settings = _settings(name, local)
    if settings is None:
        note = f"{name} has no preprocessor_config.json; the pixels are given to it as they are, in [0, 1]"
        return PixelClassifier(nn.Identity(), classifier.to(torch.float32)), (note,)
    return PixelClassifier(Pixels(settings), classifier.to(torch.float32)), ()


def _settings(name: str, local: bool) -> Any:
    """The image processor's settings, from the file that transformers takes them from; None where there are none."""
    from transformers.utils import cached_file

    options = {"local_files_only": local, "_raise_exceptions_for_missing_entries": False}
    for file in ("processor_config.json", "preprocessor_config.json"):
        try:
            path = cached_file(name, file, **options)
            settings = json.loads(Path(path).read_text("utf-8")) if path else {}
        except Exception as error:
            raise UsageError(f"cannot read {file} of {name}: {first_line(error)}; it should be JSON") from error
        if path and file == "preprocessor_config.json":
            return settings
        if isinstance(settings, dict) and "image_processor" in settings:
            return settings["image_processor"]
    return None


def _check_weights(name: str, local: bool) -> None:
    if not local or list(Path(name).glob("*.safetensors")):
        return
    pickled = [path.name for path in Path(name).iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        advice = "save it again with save_pretrained(..., safe_serialization=True)"
        raise UsageError(f"{name} has pickled weights only ({pickled[0]}), which are not loaded; {advice}")
    raise UsageError(f"{name} has a config.json and no weights; it should have a .safetensors file")


def _refused(name: str, error: Exception) -> UsageError:
    line = first_line(error)
    if "Unrecognized configuration class" in line:
        return UsageError(f"{name} is not an image classifier that transformers knows; advkit loads image classifiers")
    return UsageError(f"transformers cannot load {name} ({type(error).__name__}: {line})")
