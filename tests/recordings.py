"""Finds recordings of the original in any folder, by their content and not by their names."""

import json
from pathlib import Path

import numpy as np
from paths import GOLDEN

OUTPUTS = ("video.", "image.", "long.", "generate.")
SETTINGS = ("config.json", "case.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json")
SETTINGS += ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json")
KINDS = ("checkpoint", "training", "preprocessing", "new_tokens", "text", "movie", "trainable", "evaluation")


def find_recordings(root: Path) -> dict[str, list[Path]]:
    """Kind → folders of checkpoints, or files of other recordings; "unread": files of no known kind."""
    found: dict[str, list[Path]] = {kind: [] for kind in (*KINDS, "outputs", "unread")}
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        if file.suffix in (".npz", ".npy", ".json", ".jsonl", ".pkl") and not is_setting(file):
            found[kind_of(file)].append(file)
    weights = {path.parent for suffix in ("*.bin", "*.safetensors") for path in root.rglob(suffix)}
    found["checkpoint"] = sorted(folder for folder in weights if (folder / "config.json").exists())
    lost = [file for file in found.pop("outputs") if file.parent not in found["checkpoint"]]
    found["unread"] += [*lost, *(file for file in found["training"] if file.parent not in found["checkpoint"])]
    return found


def is_setting(file: Path) -> bool:
    return file.name in SETTINGS or file.name.endswith(".index.json")


def kind_of(file: Path) -> str:
    if file.suffix == ".npz":
        keys = set(np.load(file).files)
        if {"hyper", "losses"} <= keys:
            return "training"
        if {"input_before", "input_after"} <= keys:
            return "new_tokens"
        if any(key.startswith(("crop.", "pad.", "pos_embed_")) for key in keys):
            return "preprocessing"
        is_expected = file.name == "expected.npz" and any(key.startswith(OUTPUTS) for key in keys)
        return "outputs" if is_expected else "unread"
    if file.suffix != ".json":
        return "unread"
    cases = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(cases, dict) and {"set", "items", "expected_prompts", "expected_scores"} <= set(cases):
        return "evaluation"
    first = set(cases[0]) if isinstance(cases, list) and cases and isinstance(cases[0], dict) else set()
    for kind, needed in (("text", "conversations"), ("movie", "frame_times"), ("trainable", "bert_type")):
        if needed in first:
            return kind
    return "unread"


def tokenizer_folder(file: Path, root: Path) -> Path:
    """The tokenizer for a text recording: beside it, else anywhere below `root`, else the repository's."""
    if (file.parent / "tokenizer.model").exists():
        return file.parent
    return next((path.parent for path in sorted(root.rglob("tokenizer.model"))), GOLDEN / "text")
