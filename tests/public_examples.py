"""Runs the example of every public function, as a user does: in a folder of their own, from an installed package.

python public_examples.py      prints a line of JSON: what each example got wrong, "" where nothing
"""

import doctest
import inspect
import json

SHORT = ["model.stack.num_layers=2", "train.steps=3", "train.eval_examples=2", 'data.domains=["general", "nlp"]']


def documented():
    """What must have an example, by name."""
    import anyexperts_jax as ax
    from anyexperts_jax.evaluate.run import RunData

    methods = [getattr(ax.Run, name) for name in ("evaluate", "generate", "trace")]
    methods += [getattr(RunData, name) for name in ("batch", "encode", "example")]
    functions = [getattr(ax, name) for name in ax.__all__ if inspect.isfunction(getattr(ax, name))]
    return {one.__qualname__: one for one in (ax.train_run, ax.MoE, ax.Run, *methods, *functions)}


def wrong_in(name, thing):
    """What the example of one function got wrong."""
    found = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), {}, name, None, 0)
    if not 3 <= len(found.examples) <= 8 or not found.examples[0].source.startswith("import anyexperts_jax as ax"):
        return f"{len(found.examples)} lines of example; it should be some five, from the import on"
    said = []
    doctest.DocTestRunner().run(found, out=said.append)
    return "".join(said)


if __name__ == "__main__":
    import anyexperts_jax as ax

    ax.train("smoke", "runs/smoke", overrides=SHORT)
    print(json.dumps({name: wrong_in(name, thing) for name, thing in documented().items()}))
