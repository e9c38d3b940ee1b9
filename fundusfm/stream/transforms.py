"""Random changes to an image: crop and mirror on the host, colour and erasing on the device.

The host ships bytes; on the device one affine map a sample does colour jitter and normalisation at once.

Colour follows torchvision's ColorJitter: brightness x' = b x; contrast x' = c x + (1 - c) m with m the
mean grey of the image; saturation x' = s x + (1 - s) grey(x). All are affine in x, saturation leaves grey
values alone and brightness scales m with x, so the three commute: b (c S x + (1 - c) m) in any order,
which therefore is not drawn. What differs from torchvision: it cuts values to the range of an image after
each step, here once at the end.

Shapes: N images, H height, W width, C colours, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fundusfm.recipe.schema import AugmentConfig, Fit, Mirror
from fundusfm.stream.decode import Box, Bytes, decode_crop, image_size

Floats = np.ndarray[Any, np.dtype[np.float32]]

# Weights of red, green and blue in grey (ITU-R BT.601); torchvision's first is 0.2989, so that its sum is
# 0.9999.
_GREY = (0.299, 0.587, 0.114)
_TRIES = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 1 / 0.3)
_NO_ERASE = Box(0.0, 0.0, 0.0, 0.0)
# Every sample takes this many numbers, used or not, so that changing one option leaves all other draws alone:
# crop, mirror, three jitters, whether to erase, erase.
_NUM_BOX = 2 * _TRIES + 2
_NUM_DRAWS = _NUM_BOX + 1 + 3 + 1 + _NUM_BOX


@dataclass(frozen=True, eq=False)
class Augment:
    """What happens to one image.

    `box`: the crop, in pixels of the full image. `color_34`: rows give the new red, green and blue from
    the old three and, in the fourth column, the mean grey of the crop. `erase_4`: left, top, right, bottom
    in fractions of the output's sides, all 0 for none.
    """

    box: Box
    mirror: bool
    color_34: Floats
    erase_4: Floats


def sample_augment(rng: np.random.Generator, raw: bytes, config: AugmentConfig) -> Augment:
    """Draw the changes to an encoded image, of which only the header is read; ImageError if it has none."""
    width, height = image_size(raw)
    return draw_augment(rng, width, height, config)


def draw_augment(rng: np.random.Generator, width: int, height: int, config: AugmentConfig) -> Augment:
    """Draw the changes to an image of this size; takes the same number of `rng.random()` always."""
    units = rng.random(_NUM_DRAWS).tolist()
    crop, mirror = units[:_NUM_BOX], units[_NUM_BOX]
    jitter, erased = units[_NUM_BOX + 1 : _NUM_BOX + 4], units[_NUM_BOX + 4]
    half_ranges = (config.brightness, config.contrast, config.saturation)
    factors = [_uniform(u, max(0.0, 1.0 - h), 1.0 + h) for u, h in zip(jitter, half_ranges, strict=True)]
    erase = _erase_box(units[-_NUM_BOX:]) if erased < config.erase_probability else _NO_ERASE
    return Augment(
        box=_resized_crop(crop, width, height, config),
        mirror=config.mirror is Mirror.per_eye and mirror < 0.5,
        color_34=color_matrix(*factors),
        erase_4=np.array(erase, dtype=np.float32),
    )


def color_matrix(brightness: float, contrast: float, saturation: float) -> Floats:
    """Three factors (1 changes nothing) as one affine map (3, 4), the constant in units of the mean grey."""
    own, leak = brightness * contrast * saturation, brightness * contrast * (1.0 - saturation)
    red, green, blue = (leak * weight for weight in _GREY)
    mean = brightness * (1.0 - contrast)
    rows = [[own + red, green, blue, mean], [red, own + green, blue, mean], [red, green, own + blue, mean]]
    return np.array(rows, dtype=np.float32)


def augment_on_host(
    raw: bytes,
    augment: Augment | None,
    size: int,
    out_HWC: Bytes | None = None,
    *,
    fit: Fit = Fit.squeeze,
) -> Bytes:
    """Decode, crop, resize and mirror to (size, size, 3); colour and erasing are left to `DeviceTail`.

    None is the plain image of evaluation: the whole of it, brought into the square as `fit` says. ImageError
    as in `decode_crop`.
    """
    image_HWC = decode_crop(raw, None if augment is None else augment.box, size, out_HWC, fit=fit)
    if augment is not None and augment.mirror:
        # torch moves whole pixels where numpy would move single bytes, in a quarter of the time
        image_1CHW = torch.from_numpy(image_HWC)[None].permute(0, 3, 1, 2)
        image_HWC[...] = image_1CHW.flip(3)[0].permute(1, 2, 0).numpy()
    return image_HWC


def _uniform(unit: float, low: float, high: float) -> float:
    return low + (high - low) * unit


def _log_uniform(unit: float, low: float, high: float) -> float:
    return low * math.pow(high / low, unit)


def _place(unit: float, space: int) -> int:
    """A whole offset from 0 to `space`, both included."""
    return min(int(unit * (space + 1)), space)


def _resized_crop(units: Sequence[float], width: int, height: int, config: AugmentConfig) -> Box:
    """RandomResizedCrop of torchvision: ten tries for an area and a ratio that fit, else the centre."""
    for area_unit, ratio_unit in zip(units[:_TRIES], units[_TRIES : 2 * _TRIES], strict=True):
        area = width * height * _uniform(area_unit, *config.crop_scale)
        ratio = _log_uniform(ratio_unit, *config.crop_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = _place(units[-2], width - crop_width), _place(units[-1], height - crop_height)
            return Box(left, top, left + crop_width, top + crop_height)
    return _centre_crop(width, height, config.crop_ratio)


def _centre_crop(width: int, height: int, ratios: tuple[float, float]) -> Box:
    """The largest centred box whose aspect ratio is allowed."""
    crop_width = min(width, max(1, round(height * ratios[1])))
    crop_height = min(height, max(1, round(width / ratios[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return Box(left, top, left + crop_width, top + crop_height)


def _erase_box(units: Sequence[float]) -> Box:
    """RandomErasing of timm on a square of side 1: nothing if none of ten tries fits, as there."""
    for area_unit, ratio_unit in zip(units[:_TRIES], units[_TRIES : 2 * _TRIES], strict=True):
        area, ratio = _uniform(area_unit, *_ERASE_AREA), _log_uniform(ratio_unit, *_ERASE_RATIO)
        width, height = math.sqrt(area / ratio), math.sqrt(area * ratio)
        if width < 1.0 and height < 1.0:
            left, top = units[-2] * (1.0 - width), units[-1] * (1.0 - height)
            return Box(left, top, left + width, top + height)
    return _NO_ERASE


class DeviceTail:
    """What is left to do to a batch of bytes, on the device where they lie. `mean`, `std`: by colour, 0 to
    1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None]
        self._grey = torch.tensor(_GREY, dtype=torch.float32)

    def normalise(
        self,
        image_NCHW: torch.Tensor,
        color_N34: torch.Tensor | None = None,
        erase_N4: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Normalised images of `dtype` from uint8 ones of any memory layout; computed in fp32.

        `color_N34` and `erase_N4` hold `Augment.color_34` and `.erase_4` of each image; None changes no
        colour and erases nothing. Erased pixels become 0, the mean colour.
        """
        self._move_to(image_NCHW.device)
        height, width = image_NCHW.shape[2:]
        # Channels first while they are still bytes: seven times less time on a CPU than both changes at once.
        image_NCP = image_NCHW.contiguous().to(torch.float32).flatten(2)
        if color_N34 is None:
            image_NCP = image_NCP.div_(255.0).sub_(self._mean).div_(self._std)
        else:
            image_NCP = self._coloured(image_NCP, color_N34)
        normalised_NCHW = image_NCP.view(image_NCHW.shape)
        if erase_N4 is not None:
            normalised_NCHW.masked_fill_(_inside(erase_N4, height, width), 0.0)
        return normalised_NCHW.to(dtype)

    def _move_to(self, device: torch.device) -> None:
        """The constants follow the images, once: a copy a step would make the host wait for the device."""
        if self._mean.device != device:
            self._mean, self._std = self._mean.to(device), self._std.to(device)
            self._grey = self._grey.to(device)

    def _coloured(self, image_NCP: torch.Tensor, color_N34: torch.Tensor) -> torch.Tensor:
        """Colour and normalisation as one affine map, cut to the range that a normalised image can have."""
        mean_grey_N11 = (image_NCP.mean(dim=2) * self._grey).sum(dim=1)[:, None, None]
        weight_NCC = color_N34[:, :, :3] / (255.0 * self._std)
        constant_NC1 = (color_N34[:, :, 3:] * mean_grey_N11 / 255.0 - self._mean) / self._std
        # Three multiply-adds and no matrix product, which autocast would round to bf16 and a GPU to TF32.
        mapped_NCP = torch.addcmul(constant_NC1, weight_NCC[:, :, 0:1], image_NCP[:, 0:1])
        for color in (1, 2):
            old_N1P = image_NCP[:, color : color + 1]
            mapped_NCP.addcmul_(weight_NCC[:, :, color : color + 1], old_N1P)
        return mapped_NCP.clamp_(min=-self._mean / self._std, max=(1.0 - self._mean) / self._std)


def _inside(box_N4: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Which pixels (N, 1, H, W) have their centre in the box of their image."""
    x_W = (torch.arange(width, device=box_N4.device) + 0.5) / width
    y_H = (torch.arange(height, device=box_N4.device) + 0.5) / height
    left, top, right, bottom = (edge[:, None] for edge in box_N4.unbind(dim=1))
    columns_NW, rows_NH = (x_W >= left) & (x_W < right), (y_H >= top) & (y_H < bottom)
    return (rows_NH[:, :, None] & columns_NW[:, None, :])[:, None]
