"""`preprocessor_config.json` in the format of transformers' CLIPImageProcessor: JSON -> our fields, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llamavid_jax.errors import ConfigError
from llamavid_jax.files import find, read_object

BICUBIC = int(Image.Resampling.BICUBIC)
ALWAYS_ON = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def read_settings(path: Path) -> Mapping[str, Any]:
    file = find(path)
    try:
        return read_object(file)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path} does not exist; give the folder of a converted checkpoint") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from None


def fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The file's fields of `LLaMAVIDLlavaImageProcessor`; ConfigError for settings that are not supported."""
    for name in ALWAYS_ON:
        if values.get(name, True) is not True:
            raise ConfigError(f"{name} is {values[name]!r}; this preprocessing always does it, so set it to true")
    if values.get("resample", BICUBIC) != BICUBIC:
        raise ConfigError(f"resample is {values['resample']!r}; only {BICUBIC} (bicubic) is known")
    factor = values.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"rescale_factor is {factor!r}; only 1/255 is known")
    size = _pixels("size", values.get("size", 224))
    crop_size = _pixels("crop_size", values.get("crop_size", size))
    if crop_size != size:
        raise ConfigError(f"crop_size is {crop_size} and size {size}; only one number for both is known")
    settings = {"size": size}
    for name in ("image_mean", "image_std"):
        if name in values:
            settings[name] = _three_numbers(name, values[name])
    if "image_aspect_ratio" in values:
        settings["image_aspect_ratio"] = str(values["image_aspect_ratio"])
    return settings


def _pixels(name: str, value: Any) -> int:
    """224, {"shortest_edge": 224} or {"height": 224, "width": 224} as a number."""
    keys = set(value) if isinstance(value, dict) else set()
    if keys == {"shortest_edge"}:
        value = value["shortest_edge"]
    elif keys == {"height", "width"} and value["height"] == value["width"]:
        value = value["height"]
    if type(value) is not int:
        raise ConfigError(f"{name} is {value!r}; use a number of pixels or {{'shortest_edge': 224}}")
    return value


def _three_numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ConfigError(f"{name} is {values!r}; a list of three numbers is needed, for red, green and blue")
    return tuple(float(value) for value in values)


def clip_settings(size: int, mean: Sequence[float], std: Sequence[float], aspect_ratio: str) -> dict[str, Any]:
    """The file's content for these fields."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **dict.fromkeys(ALWAYS_ON, True),
        "do_convert_rgb": True,
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "image_mean": list(mean),
        "image_std": list(std),
        "image_aspect_ratio": aspect_ratio,
    }
