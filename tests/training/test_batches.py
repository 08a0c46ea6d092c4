"""What a run feeds the tower: images processed as those that the model was trained on."""

import dataclasses
import json
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paths import CONFIGS
from PIL import Image
from training_data import conversation, write_tokenizers

from llamavid_jax.checkpoints.tokenizers import load_tokenizers
from llamavid_jax.checkpoints.tower import TowerHash
from llamavid_jax.config.schema import LLaMAVIDLlavaConfig
from llamavid_jax.data.build_shards import build
from llamavid_jax.data.record import Record
from llamavid_jax.errors import InputError
from llamavid_jax.media.feature_file import Description, FeatureWriter
from llamavid_jax.media.features import processing
from llamavid_jax.media.image_processor import LLaMAVIDLlavaImageProcessor
from llamavid_jax.models.vision import VisionTower
from llamavid_jax.parallel.mesh import make_mesh
from llamavid_jax.training.batches import make_loader, open_data
from llamavid_jax.training.config import DataConfig, LoopConfig, TrainConfig
from llamavid_jax.training.start import Start

TINY = LLaMAVIDLlavaConfig.from_yaml(CONFIGS / "models" / "tiny.yaml")
OTHER = {"image_mean": (0.2, 0.5, 0.9), "image_std": (0.5, 0.25, 0.125)}
BUCKET = {"frames": 1, "pairs": 1, "questions": 1, "tokens": 128}


def seen_in_training(config: LLaMAVIDLlavaConfig, picture, folder) -> np.ndarray:
    """The features of the image in a run's batch."""
    data = DataConfig(path=str(picture), question_tokens=16, buckets=[BUCKET], threads=1)
    start = Mock(spec=Start)
    start.config, start.mesh = config, make_mesh(fsdp=1)
    start.tokenizer, start.qformer_tokenizer = load_tokenizers(folder, config)
    turns = conversation("<image>\nWhat is it?", "a park")
    records = [Record("0", turns, str(picture), "image")]
    loader = make_loader(records, folder, start, data, LoopConfig(batch_size=1, steps=1), range(1))
    (frame,) = next(iter(loader)).batch.frames[0]
    assert frame.dtype == np.uint8
    return tower(config)(jnp.asarray(frame[None]))


def tower(config: LLaMAVIDLlavaConfig) -> VisionTower:
    return VisionTower(config.vision_tower_config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_another_mean_and_deviation(tmp_path):
    """An image padded with the mean colour: training sees the same as inference, not the default pixels."""
    write_tokenizers(tmp_path)
    picture = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)).save(picture)
    other = dataclasses.replace(TINY, vision_tower_config=dataclasses.replace(TINY.vision_tower_config, **OTHER))
    seen = {}
    for name, config in (("usual", TINY), ("other", other)):
        folder = tmp_path / name
        config.save_pretrained(folder)
        LLaMAVIDLlavaImageProcessor.of(config).save_pretrained(folder)
        run = TrainConfig(model=str(CONFIGS / "models" / "tiny.yaml"), data=DataConfig(buckets=[BUCKET]))
        run = dataclasses.replace(run, start=dataclasses.replace(run.start, model=str(folder)))
        assert run.model_config() == config  # the recipe's model, with the pixels of the weights it starts from
        seen[name] = seen_in_training(run.model_config(), picture, tmp_path)
        pixels = LLaMAVIDLlavaImageProcessor.from_pretrained(folder)(images=[str(picture)])["pixel_values"][0]
        np.testing.assert_allclose(seen[name], tower(config)(jnp.asarray(pixels)), rtol=1e-5, atol=1e-5)
    assert np.abs(seen["usual"] - seen["other"]).max() > 0.1


def test_a_folder_that_lacks_one_of_the_two_files(tmp_path):
    """`config.json` alone, as a configuration's `save_pretrained` leaves it, gives a run and inference the mean."""
    other = dataclasses.replace(TINY, vision_tower_config=dataclasses.replace(TINY.vision_tower_config, **OTHER))
    other.save_pretrained(tmp_path)
    assert TINY.with_pixels_of(tmp_path) == other
    (tmp_path / "preprocessor_config.json").write_text('{"size": 56}')
    assert LLaMAVIDLlavaImageProcessor.from_pretrained(tmp_path) == LLaMAVIDLlavaImageProcessor.of(other)


def test_a_folder_of_media_beside_shards_is_said(tmp_path):
    """It has no effect with shards; if either path is a JSON it does."""
    (tmp_path / "set.json").write_text(json.dumps([{"id": "a", "conversations": conversation("Who?", "He.")}]))
    build(tmp_path / "set.json", tmp_path / "shards")
    shards, listed = str(tmp_path / "shards"), str(tmp_path / "set.json")
    for paths, count in (((shards, ""), 1), ((shards, shards), 1), ((shards, listed), 0), ((listed, ""), 0)):
        for media in (str(tmp_path), ""):
            said = []
            open_data(DataConfig(path=paths[0], evaluation_path=paths[1], media=media), said.append)
            assert said == [f"data.media={tmp_path} changes nothing: shards hold their media"] * (count if media else 0)


def test_features_of_another_tower_or_rate_are_refused(tiny_model, tmp_path):
    """Before the first step, in one sentence; files of other kinds name neither."""
    write_tokenizers(tmp_path)
    config = tiny_model.config
    start = Mock(spec=Start, config=config, mesh=make_mesh(fsdp=1), params=tiny_model.params)
    start.tokenizer, start.qformer_tokenizer = load_tokenizers(tmp_path, config)
    shape = (2, config.vision_tower_config.num_patches + 1, config.vision_tower_config.hidden_size)
    pixels = LLaMAVIDLlavaImageProcessor.of(config)
    vision = {"sha256": TowerHash(tiny_model).rounded(), "dtype": "float32"}
    usual = processing(pixels.size, pixels.image_mean, pixels.image_std)
    made = {
        "ours": (vision, usual, 1.0),
        "another": (vision | {"sha256": "ab"}, usual, 1.0),
        "paler": (vision, usual | {"mean": [0.0] * 3}, 1.0),
        "slower": (vision, usual, 0.5),
    }
    for name, (tower, prepared, fps) in made.items():
        writer = FeatureWriter(tmp_path / f"{name}.safetensors", 2, "BF16")
        for frame in np.ones(shape, np.float32):
            writer.add(frame)
        said = {"name": name}, {"fps": fps, "rule": "stride", "seconds": 2.0}
        writer.commit(Description(True, [0.0, 1.0], *said, prepared, tower))
    np.savez(tmp_path / "theirs.npz", feats=np.ones(shape, np.float16))
    talk = conversation("<image>\nWhat is it?", "a park")
    data = DataConfig(path="", question_tokens=16, buckets=[BUCKET | {"frames": 2, "pairs": 2}], threads=1)

    def loader(*names: str):
        records = [Record(name, talk, str(tmp_path / name), "features") for name in names]
        (tmp_path / "sizes.npz").unlink(missing_ok=True)
        return make_loader(records, tmp_path, start, data, LoopConfig(batch_size=1, steps=1), range(1))

    assert loader("ours.safetensors", "theirs.npz").steps == 1
    for name, message in (
        ("another", "was made by another vision tower"),
        ("paler", "that were prepared by"),
        ("slower", "holds 0.5 frames a second, not 1; set data.fps"),
    ):
        with pytest.raises(InputError, match=rf"{name}\.safetensors .*{message}"):
            loader("ours.safetensors", f"{name}.safetensors")
