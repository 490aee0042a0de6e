"""An invented source for a report: questions of every medium, a conversation and a document, with their routing."""

import dataclasses
import pathlib

import numpy as np
from evaluate.results_made_up import evaluation
from evaluate.stand_in import MODEL, config_of, write_records

from anyexperts_jax.data.config import EncodingSpec
from anyexperts_jax.data.conversation import Conversation, Document, Medium, Message, Text
from anyexperts_jax.data.example import SAMPLE_RATE, Example
from anyexperts_jax.data.turns import encode_item
from anyexperts_jax.evaluate.token_routing import TokenRouting
from anyexperts_jax.models.config import AudioConfig
from anyexperts_jax.models.presets import static_twin
from anyexperts_jax.report.followed import FollowedItem
from anyexperts_jax.report.source import ReportSource
from anyexperts_jax.tokenizers.bytes import BYTES
from anyexperts_jax.train.config import RunConfig
from anyexperts_jax.train.run_dir import RunDir, open_run_dir
from anyexperts_jax.train.run_log import read_records

LAYERS, EXPERTS, SLOTS = 3, 8, 6
SPEC = EncodingSpec(patch_size=8)


def routing(length: int, modality_T: np.ndarray, seed: int = 0) -> TokenRouting:
    """The routing of a sequence: 3 to 5 real experts and a virtual one per token; importance grows along it."""
    rng = np.random.default_rng(seed)
    real_LBT = rng.integers(3, 6, (LAYERS, 1, length))
    ids_LBTK = np.argsort(rng.random((LAYERS, 1, length, EXPERTS)), axis=-1)[..., :SLOTS]
    empty_LBTK = np.arange(SLOTS) >= real_LBT[..., None]
    weights_LBTK = np.where(empty_LBTK, 0, rng.dirichlet(np.ones(SLOTS), (LAYERS, 1, length)))
    dropped_LBTK = np.zeros(ids_LBTK.shape, bool)
    dropped_LBTK[0, 0, 2, 0] = True
    importance_LBT = np.linspace(0.3, 0.7, length) + 0.05 * rng.standard_normal((LAYERS, 1, length))
    return TokenRouting(
        expert_ids_LBTK=np.where(empty_LBTK, EXPERTS, ids_LBTK).astype(np.int32),
        weights_LBTK=weights_LBTK.astype(np.float32),
        dropped_LBTK=dropped_LBTK,
        slots_LBT=(real_LBT + 1).astype(np.int32),
        real_slots_LBT=real_LBT.astype(np.int32),
        virtual_slots_LBT=np.ones((LAYERS, 1, length), np.int32),
        virtual_weight_LBT=np.full((LAYERS, 1, length), 0.125, np.float32),
        importance_LBT=importance_LBT.astype(np.float32),
        valid_BT=np.ones((1, length), bool),
        modality_BT=modality_T[None].astype(np.int32),
        window=(3.0, 6.0),
    )


def picture(seed: int, side: int = 48) -> np.ndarray:
    """A gradient with a bright square."""
    pixels = np.broadcast_to(np.linspace(30, 180, side)[:, None, None], (side, side, 3)).astype(np.uint8).copy()
    at = 8 * (seed % 4)
    pixels[at : at + 16, at : at + 16] = (230, 90, 60)
    return pixels


def sound() -> np.ndarray:
    """A sweep of half a second."""
    t = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * (300 + 2000 * t) * t)).astype(np.float32)


def items() -> dict[str, list]:
    mask, heard = np.zeros((48, 48), bool), ((0.1, 0.3),)
    mask[:16, :16] = True
    film = np.stack([picture(i, 16) for i in range(4)])
    other = Medium("image", picture(1, 24))
    chat = Conversation(
        "chat",
        (
            Message("system", (Text("Be brief. <b>&</script>"),)),
            Message("user", (Medium("image", picture(0, 24), mask[:24, :24]), Text("Which?\n"), other)),
            Message("assistant", (Text("The first."),)),
            Message("user", (Medium("audio", sound()), Text("And this?", ((4, 8),)))),
            Message("assistant", (Text("A sweep: ünï."),)),
        ),
        "chats.jsonl 1",
    )
    return {
        "general": [
            Example("general", "colour", 1, "Which colour?", "red", "made", image=picture(0), image_evidence=mask)
        ],
        "video": [Example("video", "count", 1, "How many?", "4", "made", video=film)],
        "speech": [Example("speech", "say", 1, "What is it?", "go", "made", audio=sound(), audio_evidence=heard)],
        "chat": [chat],
        "text": [Document("text", "A document of its own, learned from its first token to its last.", "wiki.txt 1")],
    }  # fmt: skip


def followed(domain: str, item, number: int = 0) -> FollowedItem:
    sequence = encode_item(item, SPEC)
    said = None if isinstance(item, Document) else "seven"
    traced = routing(len(sequence.tokens_T), sequence.modality_T, seed=len(domain))
    return FollowedItem(domain, number, item, said, sequence, traced)


def source(root: pathlib.Path, **others) -> ReportSource:
    """All items, in a run directory with the records of a model of three layers."""
    config = config_of(dataclasses.replace(MODEL, audio=AudioConfig()))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, encoding=SPEC))
    open_run_dir(root, config)
    write_records(RunDir(root), steps=30)
    result = evaluation()
    found = {domain: [followed(domain, one) for one in of_domain] for domain, of_domain in items().items()}
    fields = {
        "root": root,
        "config": config,
        "records": read_records(RunDir(root).metrics),
        "evaluation": result,
        "step": 4,
        "no_checkpoint": "",
        "routing": result.trained,
        "separations": result.separations,
        "routing_examples": 8,
        "followed": found,
        "tokenizer": BYTES,
        "router": None,
    }
    return ReportSource(**{**fields, **others})


def static(config: RunConfig) -> RunConfig:
    """The same configuration with static top-4."""
    return dataclasses.replace(config, model=static_twin(config.model, 4))
