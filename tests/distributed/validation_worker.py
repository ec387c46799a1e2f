"""One rank: validate an untrained model on 1, 5 and 7 images; rank 0 writes the figures."""

import json
import sys
from pathlib import Path

import torch

from kl_vae import AutoEncoderKL
from kl_vae.data import FolderSource, ImageDataset, batch_loader, validation_batches
from kl_vae.runtime.distributed import connect
from kl_vae.training.config import RunConfig
from kl_vae.training.guards import BadImages
from kl_vae.training.validate import validate

config = RunConfig.load("tiny.yaml")
params = config.model.params
with connect("cpu") as ranks:
    torch.manual_seed(0)
    model = AutoEncoderKL(params.ddconfig, params.embed_dim, params.lossconfig)
    figures = {}
    for number in (1, 5, 7):
        paths = [f"{i:03d}.png" for i in range(number)]
        dataset = ImageDataset(FolderSource(Path("images"), paths, 3), 16, 18, False, 0, False)
        batches = validation_batches(number, 2, ranks.rank, ranks.world_size)
        loader = batch_loader(dataset, batches, num_workers=0, pin_memory=False, timeout_seconds=60)
        bad_images = BadImages(None, ranks, number, max_fraction=0.0)
        figures[number] = validate(model, loader, 0, config, ranks, bad_images)
    if ranks.is_rank_zero:
        Path(sys.argv[1]).write_text(json.dumps(figures))
