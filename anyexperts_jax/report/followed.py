"""`FollowedItem`: a test item as the model's input sequence, with the routing of its tokens in every MoE layer."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from anyexperts_jax.core.errors import UserError
from anyexperts_jax.core.modality import Modality
from anyexperts_jax.data.batches import pad_rows, stack
from anyexperts_jax.data.conversation import Document, Item
from anyexperts_jax.data.example import Example
from anyexperts_jax.data.mixture import Sources
from anyexperts_jax.data.prepare import prepare
from anyexperts_jax.data.sequence import EncodedSequence, padded
from anyexperts_jax.data.turns import chat_template, encode_item
from anyexperts_jax.evaluate.scoring import predict
from anyexperts_jax.evaluate.token_routing import TokenRouting, trace_batch
from anyexperts_jax.evaluate.trained import Trained, own_window


@dataclasses.dataclass(frozen=True, eq=False)
class FollowedItem:
    """One item, the model's answer to it, and the routing of its T tokens, including those of the correct answer.

    `routing` has one row of T positions without padding. An `Example` is the prepared one (`data.prepare`).
    """

    domain: str
    number: int  # in the test split, from 0
    item: Item
    prediction: str | None  # the model's answer; None for a document, which asks nothing
    sequence: EncodedSequence
    routing: TokenRouting

    @property
    def learned_T(self) -> Bool[ndarray, " T"]:
        """The tokens that the model learns to predict: the answers, or all of a document."""
        return np.pad(self.sequence.loss_mask_T, (1, 0))[:-1]

    @property
    def media_T(self) -> Int[ndarray, " T"]:
        """The index of the picture, video or sound that each position belongs to; -1 for text."""
        modality_T = self.sequence.modality_T
        item_T = np.full(len(modality_T), -1, np.int64)
        heard_T = modality_T == Modality.AUDIO
        item_T[heard_T] = self.sequence.frame_item_S
        item_T[(modality_T != Modality.TEXT) & ~heard_T] = self.sequence.patch_item_P
        return item_T


def follow(trained: Trained, domain: str, count: int, rows: int, max_new_tokens: int) -> list[FollowedItem]:
    """Traces and answers the first `count` test items of a domain, at the window used in training.

    A folder with fewer items gives all of them. The batch is padded to `rows` (>= `count`), or to the next size that
    the mesh divides, so that a program already compiled for that size is reused.

    Raises:
      UserError: if the domain is unknown, the model is dense, or, unless data.on_bad_row=skip, a row cannot be used.
    """
    config, tokenizer = trained.config, trained.tokenizer
    data, spec = config.data, config.data.encoding
    template, index = chat_template(data, tokenizer), data.domain_index(domain)
    sources = Sources(data)
    source = sources.open(domain, "test", sources.count(domain, "test", count))
    found: list[tuple[int, Item, EncodedSequence]] = []
    for number in range(min(count, len(source))):
        try:
            item = source[number]
            item = prepare(item, spec) if isinstance(item, Example) else item
            sequence = encode_item(item, spec, tokenizer=tokenizer, template=template, domain_index=index)
        except UserError:
            if data.on_bad_row == "skip":  # the evaluation leaves it out too
                continue
            raise
        found.append((number, item, sequence))
    if not found:
        return []
    batch = pad_rows(stack([padded(one, spec) for *_, one in found]), trained.whole_rows(rows), tokenizer)
    routing = trace_batch(trained, batch)
    said = predict(trained, config.model, batch, own_window(config.model.moe), max_new_tokens)
    return [
        FollowedItem(
            domain=domain,
            number=number,
            item=item,
            prediction=None if isinstance(item, Document) else said[row],
            sequence=sequence,
            routing=_of_row(routing, row, len(sequence.tokens_T)),
        )
        for row, (number, item, sequence) in enumerate(found)
    ]


def _of_row(routing: TokenRouting, row: int, length: int) -> TokenRouting:
    """The routing of one sequence, without its padding."""
    cut = {}
    for field in dataclasses.fields(routing):
        values = getattr(routing, field.name)
        if field.name.endswith(("_LBT", "_LBTK")):
            cut[field.name] = values[:, row : row + 1, :length]
        elif field.name.endswith("_BT"):
            cut[field.name] = values[row : row + 1, :length]
    return dataclasses.replace(routing, **cut)
