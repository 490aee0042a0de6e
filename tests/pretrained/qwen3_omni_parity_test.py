"""Qwen3-Omni against transformers, from tiny random checkpoints: logits, experts, answers, features, export."""

import numpy as np
import pytest

from anyexperts_jax import load_pretrained
from pretrained.tiny_omni import omni_checkpoint, scenes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def theirs(folder):
    """transformers' thinker, in float32."""
    cls = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def inputs(seen):
    """What transformers takes of a scene."""
    found = {"attention_mask": torch.tensor(seen.valid_BT).long()}
    for kind, suffix, own in (("image", "", seen.images), ("video", "_videos", seen.videos)):
        if own:
            found[f"pixel_values{suffix}"] = torch.tensor(np.concatenate([one.patches_NX for one in own]))
            found[f"{kind}_grid_thw"] = torch.tensor([one.grid for one in own])
    if seen.videos:
        found["video_second_per_grid"] = torch.tensor([one.pair_seconds for one in seen.videos])
    if seen.audios:
        longest = max(len(one.mel_FM) for one in seen.audios)
        padded = [np.pad(one.mel_FM, ((0, longest - len(one.mel_FM)), (0, 0))).T for one in seen.audios]
        mask = [[i < len(one.mel_FM) for i in range(longest)] for one in seen.audios]
        found["input_features"] = torch.tensor(np.stack(padded))
        found["feature_attention_mask"] = torch.tensor(mask).long()
    return found


def run(model, seen):
    """(logits, what each router chose, layer by layer)."""
    chosen = []

    def keep(module, given, outputs):
        chosen.append(outputs[2].reshape(*seen.tokens_BT.shape, -1).numpy())

    hooks = [m.register_forward_hook(keep) for m in model.modules() if type(m).__name__.endswith("TextTopKRouter")]
    with torch.no_grad():
        logits = model(torch.tensor(seen.tokens_BT), **inputs(seen)).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), chosen


def compare(model, own, seen, name):
    expected_BTY, chosen = run(own, seen)
    output = model.forward(seen.tokens_BT, seen.valid_BT, **seen.media)
    ours_BTY, valid_BT = np.asarray(output.logits_BTY), seen.valid_BT
    np.testing.assert_allclose(ours_BTY[valid_BT], expected_BTY[valid_BT], rtol=1e-4, atol=1e-4, err_msg=name)
    assert len(chosen) == model.config.stack.num_moe_layers
    for layer, their_BTK in enumerate(chosen):
        ours_BTK = np.asarray(output.trace.expert_ids_BTK)[layer]
        np.testing.assert_array_equal(np.sort(ours_BTK[valid_BT]), np.sort(their_BTK[valid_BT]), err_msg=name)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("alone", [False, True])
def test_logits_and_chosen_experts(tmp_path, alone, seed):
    folder = omni_checkpoint(tmp_path / "hub", seed=seed, alone=alone)
    model, own = load_pretrained(folder), theirs(folder)
    for scene_name, seen in scenes(10 * seed).items():
        compare(model, own, seen, scene_name)
