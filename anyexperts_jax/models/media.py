"""The inputs of the encoders, and which row of their output each position of a sequence reads."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.batch import ArrayLike, Batch
from anyexperts_jax.core.derivatives import Differentiable
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.core.tree import register_dataclass


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MediaBatch:
    """The patches or the audio frames of a batch, R rows a sequence, and where each row is in its own item.

    The items of a sequence are its pictures, videos and sounds: an encoder reads each as if it were alone.
    """

    features_BRX: Float[Array, "B R X"]
    used_BR: Bool[Array, "B R"]  # a position of the sequence reads the row
    item_BR: Int[Array, "B R"]
    time_BR: Int[Array, "B R"]  # frame of a video, chunk of a sound, from 0 in each item
    grid_row_BR: Int[Array, "B R"]  # of a patch on its frame's grid; 0 for sound
    grid_column_BR: Int[Array, "B R"]

    def same_item(self) -> Bool[Array, "B R R"]:
        """True where the second row is used and of the first row's item."""
        return (self.item_BR[:, :, None] == self.item_BR[:, None, :]) & self.used_BR[:, None, :]

    def same_frame(self) -> Bool[Array, "B R R"]:
        """True where both rows also have the same time: patches of one picture or of one frame of a video."""
        return self.same_item() & (self.time_BR[:, :, None] == self.time_BR[:, None, :])


def visual_media(batch: Batch) -> tuple[Bool[Array, "B T"], MediaBatch]:
    """(the positions that read patches, the patches)."""
    modality_BT = jnp.asarray(batch.modality_BT)
    visual_BT = (modality_BT == Modality.IMAGE) | (modality_BT == Modality.VIDEO)
    places = (batch.patch_item_BP, batch.patch_row_BP, batch.patch_column_BP)
    return visual_BT, _media_batch(batch, visual_BT, batch.patches_BPX, places)


def audio_media(batch: Batch) -> tuple[Bool[Array, "B T"], MediaBatch]:
    """(the positions that read audio frames, the frames)."""
    audio_BT = jnp.asarray(batch.modality_BT) == Modality.AUDIO
    item_BS = jnp.asarray(batch.frame_item_BS)
    return audio_BT, _media_batch(batch, audio_BT, batch.frames_BSX, (item_BS, item_BS * 0, item_BS * 0))


def _media_batch(batch: Batch, media_BT: Array, features_BRX: ArrayLike, places: tuple[ArrayLike, ...]) -> MediaBatch:
    rows = features_BRX.shape[1]
    item_BR, grid_row_BR, grid_column_BR = (jnp.asarray(a) for a in places)
    return MediaBatch(
        features_BRX=jnp.asarray(features_BRX),
        used_BR=used_rows(media_BT, rows),
        item_BR=item_BR,
        time_BR=row_values(media_BT, jnp.asarray(batch.time_BT), rows),
        grid_row_BR=grid_row_BR,
        grid_column_BR=grid_column_BR,
    )


def media_rows(media_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The row that each media position reads: the number of media positions before it. Elsewhere any number >= 0."""
    return jnp.maximum(jnp.cumsum(media_BT, axis=1, dtype=jnp.int32) - 1, 0)


def used_rows(media_BT: Bool[Array, "B T"], num_rows: int) -> Bool[Array, "B R"]:
    """True at the rows that some position reads."""
    return jnp.arange(num_rows)[None] < media_BT.sum(axis=1)[:, None]


def row_values(media_BT: Bool[Array, "B T"], values_BT: Int[Array, "B T"], num_rows: int) -> Int[Array, "B R"]:
    """The value at the position that reads each row; 0 for rows that no position reads."""
    sequences_B1 = jnp.arange(media_BT.shape[0])[:, None]
    rows_BT = jnp.where(media_BT, media_rows(media_BT), num_rows)
    zeros_BR = jnp.zeros((media_BT.shape[0], num_rows), values_BT.dtype)
    return zeros_BR.at[sequences_B1, rows_BT].set(values_BT, mode="drop")


@Differentiable
def place_rows(
    x_BTD: Float[Array, "B T D"], media_BT: Bool[Array, "B T"], encoded_BRD: Float[Array, "B R D"]
) -> Float[Array, "B T D"]:
    """x with the encoded rows at media positions. A media position without a row reads NaN, so that it is noticed.

    A row is read by one position at most, so the gradient is a gather too, where a scatter-add would be slow.
    """
    rows_BT = jnp.where(media_BT, media_rows(media_BT), 0)
    gathered_BTD = _take_rows(encoded_BRD, rows_BT, jnp.nan)
    return jnp.where(media_BT[:, :, None], gathered_BTD, x_BTD)


def _place_forward(x_BTD: Array, media_BT: Array, encoded_BRD: Array) -> tuple[Array, tuple[Array, Array]]:
    num_rows = encoded_BRD.shape[1]
    positions_BT = jnp.broadcast_to(jnp.arange(media_BT.shape[1]), media_BT.shape)
    # Positions past the sequence mark unused rows.
    positions_BR = jnp.where(
        used_rows(media_BT, num_rows), row_values(media_BT, positions_BT, num_rows), media_BT.shape[1]
    )
    return place_rows.run(x_BTD, media_BT, encoded_BRD), (media_BT, positions_BR)


def _place_backward(residuals: tuple[Array, Array], d_BTD: Array) -> tuple[Array, None, Array]:
    media_BT, positions_BR = residuals
    d_encoded_BRD = _take_rows(d_BTD, positions_BR, 0)
    return jnp.where(media_BT[:, :, None], 0, d_BTD), None, d_encoded_BRD


def _take_rows(rows_BRD: Array, places_BT: Array, fill: float) -> Array:
    """Each sequence's own rows; sequence by sequence, so that a batch split over devices stays split."""
    return jax.vmap(lambda rows, places: rows.at[places].get(mode="fill", fill_value=fill))(rows_BRD, places_BT)


place_rows.defvjp(_place_forward, _place_backward, definition=place_rows.run)
