"""`anyexperts generate`."""

import argparse
import pathlib

from anyexperts_jax.cli import generate_text
from anyexperts_jax.cli.options import add_command, add_run, mesh_of, positive_number
from anyexperts_jax.core.errors import require


def run(options: argparse.Namespace) -> None:
    from anyexperts_jax.pretrained.load import is_checkpoint
    from anyexperts_jax.train.published import is_tuned

    if is_checkpoint(options.run) or (is_tuned(options.run) and options.prompt is not None):
        generate_text.run(options)
    else:
        require(options.prompt is None, f"{options.run} did not start from a published checkpoint: give --question")
        require(options.adapter is None, f"--adapter goes with --prompt and a published checkpoint, not {options.run}")
        _answer_with_run(options)


def _answer_with_run(options: argparse.Namespace) -> None:
    from anyexperts_jax.data.conversation import Item, question_and_answer
    from anyexperts_jax.data.mixture import open_source
    from anyexperts_jax.evaluate.ask import ask, own_example
    from anyexperts_jax.evaluate.trained import load_trained

    trained = load_trained(options.run, options.checkpoint, mesh_of(options))
    data = trained.config.data
    require(len(options.image) <= 1, f"--image: a run takes one picture, not {len(options.image)}")
    require(len(options.audio) <= 1, f"--audio: a run takes one sound, not {len(options.audio)}")
    require(not options.video, "--video goes with --prompt and a published checkpoint; a run takes --image and --audio")
    image = options.image[0] if options.image else None
    audio = options.audio[0] if options.audio else None
    if options.question is not None:
        example: Item = own_example(options.question, data.encoding, image=image, audio=audio)
    else:
        require(not (image or audio), "--image and --audio go with --question")
        require(options.index >= 0, f"--index={options.index} must be >= 0")
        source = open_source(data, options.domain or data.domains[0], options.split, options.index + 1)
        example = source[options.index]
    reply = ask(trained, example, options.budget)
    question, answer = question_and_answer(example)
    print(f"question: {question}")
    if options.question is None:
        print(f"expected: {answer}")
    print(f"answer:   {reply.answer}")
    real = ", ".join(f"{name} {mean:.2f}" for name, mean in reply.real_slots.items())
    print(f"real experts per token: {real} (window {reply.window[0]:g} to {reply.window[1]:g})")


def add(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "generate",
        "answer one question with a trained model, or continue a text with a published one",
        (
            "anyexperts generate runs/mine --domain video --index 3",
            "anyexperts generate runs/mine --question 'which digit?' --image cat.png --budget 4.8",
            "anyexperts generate models/Qwen3-30B-A3B --prompt 'Gravity is' --budget 6.4 --stream",
            "anyexperts generate models/Qwen3-30B-A3B --prompt 'Gravity is' --adapter adapters/mine",
            "anyexperts generate models/Qwen3-VL-30B-A3B --chat --prompt 'What is this?' --image cat.png",
            "anyexperts generate models/Qwen3-Omni-30B-A3B-Thinking --chat --prompt 'What is said?' --audio talk.wav",
        ),
    )
    add_run(parser)
    parser.add_argument("--domain", help="take the question from this domain (default: the run's first)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="split of the domain")
    parser.add_argument("--index", type=int, default=0, help="index of the example in the split, from 0")
    parser.add_argument("--question", help="ask this instead (default: the domain's own question)")
    for option, text in (
        ("--image", "a picture that --question or --prompt is about; repeatable with --prompt"),
        ("--audio", "a sound file that --question or --prompt is about; repeatable with --prompt"),
        ("--video", "a video file that --prompt is about; repeatable"),
    ):
        parser.add_argument(option, type=pathlib.Path, action="append", default=[], help=f"{text} (default: none)")
    parser.add_argument(
        "--budget", type=positive_number, metavar="K", help="real experts per token (default: as trained)"
    )
    generate_text.add_options(parser)
    parser.set_defaults(command=run)
