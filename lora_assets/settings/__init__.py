"""The environment, typed: the only reader of it in the code location. A module is a group of docs/settings.md."""

from lora_assets.settings.environment import Settings, is_secret, load_settings, sources
from lora_assets.settings.exports import Quantization
from lora_assets.settings.recorded import RECORDED
from lora_assets.settings.values import on_kubernetes

__all__ = ["RECORDED", "Quantization", "Settings", "is_secret", "load_settings", "on_kubernetes", "sources"]
