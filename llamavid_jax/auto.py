"""transformers' AutoConfig and AutoProcessor find this package's classes, without transformers being imported for it.

    import llamavid_jax
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained("llamavid-7b-video")  # a converted folder

The entries are added when transformers imports the two modules that hold its tables, or now if it already has.  There
is no AutoModel: the model is `LLaMAVIDLlavaForConditionalGeneration`.
"""

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

MODULES = ("transformers.models.auto.configuration_auto", "transformers.models.auto.processing_auto")


class AutoConfigEntry:
    """What AutoConfig calls; other keywords are for transformers' Hub and ignored."""

    @staticmethod
    def from_dict(values: dict[str, Any], **_: Any) -> Any:
        from llamavid_jax import LLaMAVIDLlavaConfig

        return LLaMAVIDLlavaConfig.from_dict({key: value for key, value in values.items() if not key.startswith("_")})


class AutoProcessorEntry:
    """What AutoProcessor calls."""

    @staticmethod
    def from_pretrained(directory: Any, **_: Any) -> Any:
        from llamavid_jax import LLaMAVIDLlavaProcessor

        return LLaMAVIDLlavaProcessor.from_pretrained(directory)


def register(module: ModuleType) -> None:
    """Adds the entry to the table of one of MODULES."""
    if module.__name__ == MODULES[0]:
        module.CONFIG_MAPPING.register("llamavid_jax", AutoConfigEntry, exist_ok=True)
    else:
        from llamavid_jax import LLaMAVIDLlavaConfig

        module.PROCESSOR_MAPPING.register(LLaMAVIDLlavaConfig, AutoProcessorEntry, exist_ok=True)


class Finder:
    """An entry of `sys.meta_path`: finds MODULES as usual and calls `register` after their execution."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if name not in MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    for name in MODULES:
        if name in sys.modules:
            register(sys.modules[name])
    if Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)
