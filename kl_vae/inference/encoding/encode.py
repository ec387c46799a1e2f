"""Encode a data set into a folder of latents, on any number of ranks, and take it up again."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from kl_vae.checkpoints.safetensors_file import safetensors_bytes
from kl_vae.data import ImageDataset
from kl_vae.data.latent_index import (
    INDEX,
    LatentIndex,
    LatentStatistics,
    ShardEntry,
)
from kl_vae.data.latent_shard import is_whole
from kl_vae.inference.encoding.labels import Labels, class_labels
from kl_vae.inference.encoding.latent_folder import open_folder, settings_of, shard_name
from kl_vae.inference.encoding.latent_shards import OnBatch, encode_units, write_shard
from kl_vae.inference.encoding.stored_latents import EncodeConfig, check_normalization
from kl_vae.inference.progress import Ledger, units_of
from kl_vae.inference.statistics import LatentSums
from kl_vae.model import AutoEncoderKL
from kl_vae.runtime.distributed import Ranks
from kl_vae.runtime.files import display_name, write_text_atomically
from kl_vae.runtime.schema import from_mapping

logger = logging.getLogger(__name__)


class LatentEncoding:
    """A folder of latents that is being written, or verified; all ranks do the same calls.

    What is there already is compared with its sha256 first, and done again where it differs.

    Args:
        model: in eval mode.
        dataset: the images, without anything drawn at random.
        out: the folder; it is created.
        config: how.
        ranks: which share the work.
        checkpoint: the name that the model was loaded by.
        resume: go on with what is there, or verify what is complete.

    Raises:
        ValueError: the folder holds something else, or work that `resume` would go on with; a label
            or the scale of the latents is missing; safetensors is not installed.
    """

    def __init__(
        self,
        model: AutoEncoderKL,
        dataset: ImageDataset,
        out: Path,
        config: EncodeConfig,
        ranks: Ranks,
        checkpoint: str,
        resume: bool = False,
    ) -> None:
        safetensors_bytes({}, {})  # an error now rather than after the first shard
        check_normalization(model, config)
        self._model, self._dataset, self._config = model, dataset, config
        self._out, self._ranks, self._checkpoint = out, ranks, checkpoint
        self._labels: Labels | None = ranks.on_first(
            lambda: class_labels(dataset.source) if config.labels else None
        )
        self.settings = ranks.on_first(lambda: settings_of(model, dataset, config, self._labels))
        self._units = units_of(len(dataset), config.shard_size)
        self._earlier = ranks.on_first(lambda: open_folder(out, self.settings, resume))
        identity = dataclasses.asdict(self.settings)
        self._ledger = Ledger(out, identity, resume, ranks)
        self._done = ranks.on_first(self._recorded)
        self._damaged = self._verify()
        missing = [unit for unit in range(len(self._units)) if unit not in self._done]
        todo = sorted([*missing, *self._damaged])
        self.complete = self._earlier is not None and not todo
        self._own = todo[ranks.rank :: ranks.world_size]

    @property
    def images(self) -> int:
        """How many images this rank has to encode."""
        return sum(len(self._units[unit]) for unit in self._own)

    def run(self, on_batch: OnBatch) -> None:
        """Encode this rank's share; `on_batch` is told of each batch.

        Raises:
            ValueError: an image's latents are not finite or beyond the dtype, the memory does not
                suffice, or a file cannot be written; what was done before is kept.
        """
        units = [self._units[unit] for unit in self._own]
        shards = encode_units(self._model, self._dataset, units, self._config, on_batch)
        for unit, shard in zip(self._own, shards, strict=True):
            path = self._out / self._file(unit)
            entry = write_shard(path, shard, self.settings, self._dataset, self._labels)
            self._ledger.write(unit, dataclasses.asdict(entry))

    def finish(self) -> tuple[LatentIndex, LatentSums]:
        """Wait for all ranks and write the index; return it with the sums of all images.

        Raises:
            ValueError: no image could be used, or the index cannot be written.
        """
        self._ranks.gather(None)
        return self._ranks.on_first(self._finish)

    def _recorded(self) -> dict[int, ShardEntry]:
        """What is known of the shards that are done, those of a complete folder among them."""
        entries = {}
        for unit in range(len(self._units)):
            record = self._ledger.find(unit)
            if record is None and self._earlier is not None:
                record = dataclasses.asdict(self._earlier.shards[unit])
                self._ledger.write(unit, record)
            if record is not None:
                entries[unit] = from_mapping(ShardEntry, record)
        return entries

    def _verify(self) -> list[int]:
        """The shards that are done and damaged; each rank looks at a part of them."""
        if self._done:
            logger.info("verifying the shards that are there: %d", len(self._done))
        damaged = []
        for unit in sorted(self._done)[self._ranks.rank :: self._ranks.world_size]:
            entry = self._done[unit]
            if entry.file != self._file(unit) or not is_whole(self._out / entry.file, entry):
                logger.warning("%s: damaged or missing, to be encoded again", entry.file)
                damaged.append(unit)
        return sorted(unit for of_rank in self._ranks.gather(damaged) for unit in of_rank)

    def _finish(self) -> tuple[LatentIndex, LatentSums]:
        entries = [from_mapping(ShardEntry, x) for x in self._ledger.read(len(self._units))]
        total = LatentSums.of_nothing(self.settings.channels)
        for entry in entries:
            total = total.merge(LatentSums(entry.number, entry.values, entry.mean, entry.squares))
        if not total.images:
            for entry in entries:
                (self._out / entry.file).unlink(missing_ok=True)
            self._ledger.close()
            raise ValueError(
                f"none of the {len(self._dataset)} images can be used, for the reasons above; "
                "give others to --images"
            )
        normalization = total.normalization()
        index = LatentIndex(
            checkpoint=self._checkpoint,
            settings=self.settings,
            classes=None if self._labels is None else self._labels.classes,
            number=total.images,
            statistics=LatentStatistics(
                scale_factor=normalization.scale_factor,
                shift_factor=normalization.shift_factor,
                mean=total.mean,
                std=total.std,
            ),
            shards=tuple(entries),
        )
        if self._earlier is None or self._earlier.shards != index.shards:
            try:
                write_text_atomically(self._out / INDEX, index.to_json())
            except OSError as error:
                raise ValueError(
                    f"cannot write {display_name(self._out / INDEX)} ({error.strerror}); make room "
                    "and permission for it, and go on with --resume"
                ) from error
        self._ledger.close()
        return index, total

    def _file(self, unit: int) -> str:
        return shard_name(unit, len(self._units))
