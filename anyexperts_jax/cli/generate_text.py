"""`anyexperts generate` with a published checkpoint instead of a run."""

import argparse
import math
import pathlib
import sys

from anyexperts_jax.cli.options import mesh_of, natural, number, positive, seed
from anyexperts_jax.core.errors import comma_list, require


def run(options: argparse.Namespace) -> None:
    """Answers --prompt."""
    from anyexperts_jax.models.sample import Sampling
    from anyexperts_jax.pretrained.load import open_checkpoint
    from anyexperts_jax.pretrained.media import readable_kinds
    from anyexperts_jax.pretrained.pictures import Video
    from anyexperts_jax.train.published import is_tuned, load_published

    unused = [f"--{name}" for name in ("question", "domain") if getattr(options, name) is not None]
    require(not unused, f"{' '.join(unused)}: {options.run} is a published checkpoint; give --prompt")
    require(options.prompt is not None, f"{options.run} is a published checkpoint; give --prompt")
    sampling = Sampling(
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )
    kinds: tuple[str, ...] = ()  # only text models can be fine-tuned
    if not is_tuned(options.run):  # checked before gigabytes of weights are read
        checkpoint = open_checkpoint(options.run)
        kinds = readable_kinds(checkpoint.family.config(checkpoint.hub))
    reads = comma_list(["text", *kinds])
    for kind in ("image", "video", "audio"):
        require(
            kind in kinds or not getattr(options, kind), f"--{kind}: the model in {options.run} reads {reads} alone"
        )
    model = load_published(options.run, options.checkpoint, mesh_of(options), adapter=options.adapter)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt

    def tell(_: int, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    found = model.generate_many(
        [prompt],
        max_new_tokens=options.max_new_tokens,
        budget=options.budget,
        sampling=sampling,
        seed=options.seed,
        stop=options.stop,
        images=[options.image],
        videos=[[Video(path) for path in options.video]],
        audios=[options.audio],
        on_text=tell if options.stream else None,
    )
    print("" if options.stream else found.texts[0])
    decoded = found.decoded
    print(f"{len(decoded.tokens[0])} tokens, {found.tokens_per_second:.2f} a second after the first", file=sys.stderr)
    if not math.isnan(decoded.real_experts):  # nan for a dense model
        print(f"real experts per token: {decoded.real_experts:.2f}", file=sys.stderr)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with a published checkpoint (a folder or a GGUF file) instead of a run")
    group.add_argument("--prompt", help="a text to continue (default: none; a run takes --question)")
    group.add_argument("--chat", action="store_true", help="render the prompt with the model's chat template")
    group.add_argument("--stream", action="store_true", help="print the answer as it grows")
    group.add_argument(
        "--adapter", type=pathlib.Path, metavar="FOLDER", help="a low-rank adapter added to the weights (default: none)"
    )
    group.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="largest number of tokens of the answer"
    )
    share, amount = number(0, 1), number(0)
    for name, kind, default, text in (
        ("--temperature", amount, 0.0, "temperature of sampling; 0: always the most likely token"),
        ("--top-k", natural, 0, "sample from the X most likely tokens; 0: from all"),
        ("--top-p", share, 1.0, "sample from the most likely tokens that make up this probability"),
        ("--min-p", share, 0.0, "sample from tokens at least X times as likely as the most likely one"),
        ("--repetition-penalty", amount, 1.0, "penalty of tokens that occurred before; 1: none"),
    ):
        group.add_argument(name, type=kind, default=default, metavar="X", help=text)
    group.add_argument("--seed", type=seed, default=0, help="seed of sampling")
    group.add_argument("--stop", action="append", default=[], help="a text that ends the answer; repeatable")
