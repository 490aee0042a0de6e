"""`Pretrained`, a published model in memory: logits, generation and export."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from anyexperts_jax.core.arrays import as_array, require_ids
from anyexperts_jax.core.batch import ArrayLike, make_batch
from anyexperts_jax.core.errors import require
from anyexperts_jax.models.config import ModelConfig
from anyexperts_jax.models.multimodal import ModelOutput, MultimodalModel
from anyexperts_jax.models.placed_media import PlacedMedia
from anyexperts_jax.models.sample import GREEDY, Sampling
from anyexperts_jax.pretrained.budget import BudgetInForce, mixing_logits, with_budget, with_policy
from anyexperts_jax.pretrained.decode import Decoded, Request, Weights, decode
from anyexperts_jax.pretrained.hub_config import HubConfig, eos_ids
from anyexperts_jax.pretrained.media import KINDS, Given, Shown, readable_kinds
from anyexperts_jax.pretrained.placing import place
from anyexperts_jax.pretrained.prompts import Prompt, TextStream, prompt_tokens, require_text, with_media
from anyexperts_jax.sharding.placement import Placement, placement_of
from anyexperts_jax.tokenizers.base import Tokenizer
from anyexperts_jax.tokenizers.store import open_tokenizer

OnText = Callable[[int, str], None]  # (index of the prompt, new text)


@dataclasses.dataclass(frozen=True)
class Generated:
    """The answers, one per prompt, with their tokens, experts and times."""

    texts: list[str]
    decoded: Decoded

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed over all rows, without the first token of each; nan if no other was generated."""
        tokens = sum(len(own) - 1 for own in self.decoded.tokens)
        return tokens / self.decoded.decode_seconds if self.decoded.steps else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A published model: its configuration, its parameters on their devices, and what came with the checkpoint.

    Attributes:
      config: the model's configuration, with its routing policy.
      params: the tree that `models.multimodal.MultimodalModel(config)` takes, each leaf in the type of its tensors.
      router_bias_LC: the expert biases of loss-free balancing, float32; None if the model has none.
      hub: its config.json, unchanged.
      family: the entry of FAMILIES that read it.
      path: where it was read from.
      generation: its generation_config.json; empty if there is none.
      order_LF: the index that each neuron of a split model had in the dense layer; None for other models.
    """

    config: ModelConfig
    params: Any
    router_bias_LC: Float[Array, "L *M C"] | None
    hub: HubConfig
    family: str
    path: pathlib.Path
    generation: Mapping[str, Any]
    order_LF: Int[np.ndarray, "L F"] | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
          UserError: if it has none.
        """
        return open_tokenizer(str(self.path))

    @property
    def placement(self) -> Placement:
        """The devices of the parameters."""
        return placement_of(self.params)

    @property
    def weights(self) -> Weights:
        """The configuration and the parameters, as `decode` takes them."""
        return Weights(self.config, self.placement, self.params, self.router_bias_LC)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: those of generation_config.json, config.json and the tokenizer."""
        thinker = self.hub.thinker
        parts = (self.generation, self.hub.values, thinker.values, thinker.get("text_config", {}))
        return tuple(dict.fromkeys(id for part in parts for id in eos_ids(part)))

    def show(self, images: Sequence[Any] = (), videos: Sequence[Any] = (), audios: Sequence[Any] = ()) -> Shown | None:
        """Preprocesses pictures, videos and sounds for the towers, with the checkpoint's settings; None if there are
        none.

        Args:
          images: paths, Pillow images, arrays [H, W, 3], or `pictures.Patches`.
          videos: `pictures.Video`s or `pictures.Patches`.
          audios: paths, arrays of mono samples at 16 kHz, or `sounds.Sound`s.

        Raises:
          UserError: if the model does not read this kind, or an item cannot be decoded.
        """
        return self._shown({"image": images, "video": videos, "audio": audios})

    def _shown(self, given: Given) -> Shown | None:
        return Shown.of_model(given, self.config, self.hub, self.path)

    def tokens(
        self,
        prompt: Prompt,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
    ) -> list[int]:
        """Returns the ids of a prompt, with a placeholder for every row of its pictures, videos and sounds."""
        return self._prepare([prompt], {"image": [images], "video": [videos], "audio": [audios]})[0][0]

    def logits(
        self,
        tokens_BT: Any,
        valid_BT: Bool[ArrayLike, "B T"] | None = None,
        budget: float | None = None,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
    ) -> Float[Array, "B T Y"]:
        """Returns the float32 logits of the token after each position.

        Args:
          tokens_BT: ids, as an array or as lists of equal length.
          valid_BT: False at padding, on either side; None: all tokens are valid.
          budget: real experts per token; None: the model's own window.
          images, videos, audios: those that the tokens have placeholders for, in reading order, row by row; as for
            `show`.

        Raises:
          UserError: for ids or lengths that the model does not have, a budget that it cannot reach, or media that do
            not match the placeholders.
        """
        media = {"images": images, "videos": videos, "audios": audios}
        return self.forward(tokens_BT, valid_BT, budget, **media).logits_BTY

    def forward(
        self,
        tokens_BT: Any,
        valid_BT: Bool[ArrayLike, "B T"] | None = None,
        budget: float | None = None,
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
    ) -> ModelOutput:
        """Like `logits`, and also returns the routing trace."""
        tokens_BT = as_array("tokens_BT", tokens_BT)
        shape = tokens_BT.shape
        require(len(shape) == 2 and tokens_BT.size > 0, f"tokens_BT has shape {shape}; it must be [B, T], not empty")
        require_ids("tokens_BT", tokens_BT, self.config.vocab_size, "the ids of the model's table")
        valid_BT = np.ones(tokens_BT.shape, bool) if valid_BT is None else np.asarray(valid_BT)
        require(valid_BT.shape == tokens_BT.shape, f"valid_BT has shape {valid_BT.shape}; need {tokens_BT.shape}")
        config, in_force = with_budget(self.config, budget)
        shown = self.show(images, videos, audios)
        placed = None if shown is None else place(shown, np.asarray(tokens_BT), valid_BT).media
        arrays = (jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(valid_BT, bool), placed)
        return _forward((config, self.placement), self.params, self.router_bias_LC, arrays, in_force)

    def generate(
        self, prompt: Prompt | Sequence[str], *, max_new_tokens: int = 128, budget: float | None = None, **how: Any
    ) -> Any:
        """Generates the continuation of a prompt, or for a list of texts a list of continuations.

        Args:
          prompt: a text to continue, a conversation for the chat template (a list of messages), or a list of texts.
          budget: real experts per token; None: the model's own window.
          how: as for `generate_many`; `images`, `videos` and `audios` are those of the prompt, or a list for each text.
        """
        many = not isinstance(prompt, str) and len(prompt) > 0 and all(isinstance(one, str) for one in prompt)
        prompts: Any = prompt if many else [prompt]
        if not many:
            how |= {name: [how[name]] for name in ("images", "videos", "audios") if name in how}
        texts = self.generate_many(prompts, max_new_tokens=max_new_tokens, budget=budget, **how).texts
        return texts if many else texts[0]

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        budget: float | None = None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
        images: Sequence[Sequence[Any]] = (),
        videos: Sequence[Sequence[Any]] = (),
        audios: Sequence[Sequence[Any]] = (),
    ) -> Generated:
        """Continues several prompts of any lengths in one batch; an answer does not depend on the other prompts.

        Args:
          sampling: how a token is chosen; by default the most likely one.
          seed: seed of the sampling.
          stop: texts that end an answer; they are cut off.
          on_text: called with (index of the prompt, new text) as an answer grows.
          images, videos, audios: a list for each prompt, as for `show`. They are put before a text. In a conversation
            they replace its parts of type "image", "video" and "audio", or go to the beginning of its last message. The
            parts may also hold them.

        Raises:
          UserError: if a prompt is empty, longer than the model's positions or unreadable, or the model cannot reach
            the budget.
        """
        config, in_force = with_budget(self.config, budget)
        ids, shown = self._prepare(prompts, {"image": images, "video": videos, "audio": audios})
        streams = [TextStream(self.tokenizer, stop) for _ in prompts]
        tell = on_text or (lambda row, text: None)

        def on_token(row: int, token: int) -> bool:
            new = streams[row].add(token)
            if new:
                tell(row, new)
            return not streams[row].stopped

        stops = tuple(dict.fromkeys([*self.stop_ids, *self.tokenizer.special.eos]))
        request = Request(max_new_tokens, sampling, seed, stops)
        weights = dataclasses.replace(self.weights, config=config)
        decoded = decode(weights, ids, request, in_force, on_token, shown=shown)
        for row, stream in enumerate(streams):
            rest = stream.rest()
            if rest:
                tell(row, rest)
        return Generated([stream.text for stream in streams], decoded)

    def prepared(self, prompt: Prompt) -> tuple[list[int], Shown | None]:
        """Returns the ids of a prompt, and what the towers read of the media that its parts hold.

        Raises:
          UserError: if the model cannot read the prompt.
        """
        ids, shown = self._prepare([prompt], dict.fromkeys(KINDS, ()))
        return ids[0], shown

    def with_policy(self, policy: str, dial: float) -> "Pretrained":
        """Returns the same weights with an entry of POLICIES, at its dial, deciding a token's number of experts.

        For example, "static_modality" at 8 gives 8 experts to text and 4 to the tokens of pictures and videos.

        Raises:
          UserError: if the model is dense or has variable slots, the policy is unknown, or the dial is out of range.
        """
        return dataclasses.replace(self, config=with_policy(self.config, policy, dial))

    def _prepare(self, prompts: Sequence[Prompt], given: Given) -> tuple[list[list[int]], Shown | None]:
        """Returns the ids of each prompt, and the media of all prompts together.

        Args:
          given: for each kind a list per prompt.
        """
        for kind, lists in given.items():
            message = f"{kind}s hold {len(lists)} lists for {len(prompts)} prompts; give a list a prompt"
            require(len(lists) in (0, len(prompts)), message)
        ids, every = [], list[Shown | None]()
        for number, prompt in enumerate(prompts):
            own: Given = {kind: lists[number] if len(lists) else [] for kind, lists in given.items()}
            if self.config.vision_tower is None:
                require_text(prompt)
            else:
                prompt, own = with_media(prompt, own, readable_kinds(self.config))
            shown = self._shown(own)
            ids.append(prompt_tokens(self.tokenizer, prompt, shown))
            every.append(shown)
        return ids, Shown.joined(every)

    def export(self, path: str | os.PathLike[str], form: str = "hub", **how: Any) -> None:
        """Writes the model into a new folder; see `pretrained.write.export`."""
        from anyexperts_jax.pretrained.write import export

        export(self, path, form, **how)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    static: tuple[ModelConfig, Placement],
    params: Any,
    router_bias_LC: Array | None,
    arrays: tuple[Array, Array, PlacedMedia | None],
    budget: BudgetInForce,
) -> ModelOutput:
    config, placement = static
    tokens_BT, valid_BT, placed = arrays
    positions_BT = jnp.maximum(jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1, 0)
    batch = make_batch(tokens_BT, valid_BT=valid_BT, position_BT=positions_BT)
    logits_BT = None if budget.share is None else mixing_logits(budget.share, positions_BT)
    output = MultimodalModel(config, placement).apply(
        {"params": params},
        batch,
        router_bias_LC=router_bias_LC,
        window=budget.window,
        importance_logits_BT=logits_BT,
        placed=placed,
    )
    assert isinstance(output, ModelOutput)
    return output
