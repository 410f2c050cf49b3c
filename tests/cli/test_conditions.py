"""`dit-jax train` with boxes and a map of classes at once, from an image folder's metadata."""

import json

import jax
import numpy as np
from PIL import Image

from dit_jax.cli.main import main
from dit_jax.cli.plan import abstract_batch
from dit_jax.cli.train import diffusion_task
from dit_jax.config import config_from_dict, config_to_dict
from dit_jax.evaluation.loaded import load
from dit_jax.metrics.history import read_metrics
from dit_jax.parallel.mesh import make_mesh
from tests.cli.test_main import write_config
from tests.tiny import dit_config, make_image_folder


def make_scenes(folder):
    """Returns a folder of `make_image_folder` with a layout and a map for each image."""
    make_image_folder(folder)
    (folder / ".maps").mkdir()
    rng, lines = np.random.default_rng(0), []
    for path in sorted(folder.glob("*/*.png")):
        name = f".maps/{path.parent.name}_{path.name}"
        Image.fromarray(rng.integers(0, 4, (8, 8), np.uint8)).save(folder / name)
        line = {"file_name": f"{path.parent.name}/{path.name}", "boxes": "cat 0 0 0.5 1; dog 0.5 0 1 1", "map": name}
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def test_training_reads_boxes_and_maps_and_shows_them(tmp_path):
    values = config_to_dict(dit_config(make_scenes(tmp_path / "scenes"), num_train_steps=2))
    values["data"]["map_field"] = "map"
    values["dit"]["conditioning"] = ("adaln_zero", "in_context")
    values["conditions"] = {
        "layout": {
            "classes": ("cat", "dog"),
            "layout_field": "boxes",
            "max_objects": 2,
            "transformer": {"width": 16, "depth": 1},
        },
        "spatial": {"kind": "semantic", "num_classes": 4, "dropout": 0.1},
    }
    config = config_from_dict(values)
    mesh = make_mesh(config.mesh)
    batch = next(iter(diffusion_task(config, mesh, tmp_path).train_batches(0)))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)  # noqa: E731
    assert shapes(batch) == shapes(abstract_batch(config, mesh))  # what the step is compiled for
    main(["train", f"--config={write_config(tmp_path / 'config.py', config)}", f"--workdir={tmp_path / 'run'}"])
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) >= 3 and np.isfinite(losses).all()
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    images = load(tmp_path / "run").sample(
        [0, 2], layout="dog 0 0 1 0.5", classes=np.zeros((8, 8), int), cfg_scales=(("layout", 3.0), ("spatial", 1.5))
    )
    assert images.shape == (2, 8, 8, 3)
