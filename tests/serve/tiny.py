"""A tiny published MoE checkpoint with random weights, a tokenizer and a chat template, and helpers to serve it."""

import json
import time

from pretrained.tiny_hub import tiny_checkpoint

from anyexperts_jax.nn.config import LoraConfig
from anyexperts_jax.serve.engine import Engine, Finished, Job, Progress, Ticket
from anyexperts_jax.serve.model import load_served
from anyexperts_jax.serve.slots import row_budget
from anyexperts_jax.tokenizers.train import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SLOTS, LENGTH = 4, 96  # the same in every test, so that all share the compiled programs
PROMPTS = ((3, 1, 4, 1, 5, 9, 2, 6), (5, 3), (8,), tuple(range(40, 60)), (7, 7, 7), (9, 2, 11), (13,), (4, 44, 24, 14))
BUDGETS = (None, 1.5, 2.0, 3.0, 2.25, 1.0, 2.5, None)
LENGTHS = (9, 4, 12, 6, 1, 8, 10, 7)


def tiny_folder(path, **how):
    """Writes a checkpoint folder as on the hub: 7 experts, 3 per token, 96 positions."""
    made = tiny_checkpoint(path, "qwen3_moe", vocab_size=300, eos_token_id=299, **how)
    train_tokenizer(["Hello world", "cat on the mat; the cat", "A cat sat"], 300).save(made)
    settings = made / "tokenizer_config.json"
    held = json.loads(settings.read_text()) if settings.is_file() else {}
    settings.write_text(json.dumps({**held, "chat_template": TEMPLATE}))
    return made


def tiny_adapters(base, names):
    """Writes a random adapter of the checkpoint for each name, beside it; returns the folders by name."""
    from pretrained.lora_test import random_adapter

    from anyexperts_jax.pretrained.load import load_pretrained
    from anyexperts_jax.pretrained.lora import with_adapter

    model = load_pretrained(base)
    lora = LoraConfig(rank=2, alpha=8.0, patterns=("**/attention/*/kernel", "**/experts/**"))
    places = {name: base.parent / name for name in names}
    for seed, place in enumerate(places.values()):
        with_adapter(model, random_adapter(model, lora, seed)).export(place, form="adapter")
    return places


def tiny_engine(served, watch=lambda name, amount: None):
    return Engine(served.weights, served.tokenizer, served.stop_ids, slots=SLOTS, length=LENGTH, watch=watch)


def job(served, engine_prompt, length, budget, events, waited=0.0, **how):
    own = row_budget(served.base, served.weights.config, budget)
    return Ticket(Job(engine_prompt, length, own, events.append, **how), arrived=time.monotonic() - waited)


def tokens_of(events):
    return [event.token.id for event in events if isinstance(event, Progress)]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Progress | Finished))


def served_tiny(path, **how):
    return load_served(tiny_folder(path), **how)
