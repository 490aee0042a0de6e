import dataclasses

import pytest

from anyexperts_jax.aot.work import count_work, gathered_bytes
from anyexperts_jax.dispatch.execution import Execution
from anyexperts_jax.train.config import load_config

EXCHANGE = "model.stack.execution.dispatch=exchange"
ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1}


def config(*settings):
    base = load_config("smoke", ["train.batch_size=8", *settings])
    return base


def test_the_work_of_a_small_model_by_hand():
    """`smoke`: every factor written out from its configuration."""
    chosen = config()
    stack, moe, encoding = chosen.model.stack, chosen.model.moe, chosen.data.encoding
    work = count_work(chosen, ONE)
    tokens, layers, width = 8 * encoding.max_length, stack.num_layers - stack.num_dense_layers, stack.d_model
    rows = (1 - moe.rho_max) * (moe.k_min + moe.k_max) / 2 * tokens * layers
    assert work.rows_real == round(rows)
    assert work.real_flops["experts"] == 3 * 3 * 2 * width * stack.expert_d_ff * work.rows_real
    heads = stack.attention.num_heads * stack.attention.head_dim
    pairs = 8 * encoding.max_length * (encoding.max_length + 1) / 2  # a position and those it sees
    assert work.real_flops["attention"] == 3 * 2 * 2 * heads * pairs * stack.num_layers
    assert work.extra_flops["masked attention"] == work.real_flops["attention"]  # XLA computes what is masked too
    assert work.extra_flops["computed again"] == 0  # remat none
    head = 3 * 2 * tokens * width * chosen.model.vocab_size
    assert work.real_flops["dense"] > head


def test_latent_attention_counts_the_widths_of_keys_and_of_values():
    heads = "model.stack.attention.num_heads=2 model.stack.attention.num_kv_heads=2 model.stack.attention.head_dim=12"
    widths = {"kv_rank": 16, "plain_dim": 8, "rope_dim": 4, "value_dim": 20}
    latent = [f"model.stack.attention.latent.{name}={value}" for name, value in widths.items()]
    plain, latent = (count_work(config(*heads.split(), *own), ONE).real_flops for own in ((), latent))
    assert latent["attention"] == plain["attention"] * (12 + 20) / (12 + 12)
    stack, tokens = config().model.stack, 8 * config().data.encoding.max_length
    maps = 4 * 2 * 12 * stack.d_model  # queries, keys, values and out
    own = 2 * 12 * stack.d_model + 20 * stack.d_model + 16 * 2 * 28 + 2 * 20 * stack.d_model  # queries, down, up, out
    assert latent["dense"] - plain["dense"] == 3 * 2 * tokens * (own - maps) * stack.num_layers


def test_a_wider_dense_layer_adds_its_three_matmuls():
    narrow, wide = (count_work(config(f"model.stack.d_ff={d_ff}"), ONE).real_flops for d_ff in (64, 128))
    tokens, width = 8 * config().data.encoding.max_length, config().model.stack.d_model
    dense_layers = config().model.stack.num_dense_layers
    assert wide["dense"] - narrow["dense"] == 3 * 3 * 2 * tokens * width * 64 * dense_layers
    assert wide["experts"] == narrow["experts"]


def test_a_frozen_matmul_has_no_gradient_of_its_own():
    routers = 'train.trainable=["**/router/**", "**/importance/**"]'
    whole, frozen = (count_work(config("model.stack.remat=full", *more), ONE) for more in ((), (routers,)))
    assert frozen.real_flops["experts"] == pytest.approx(whole.real_flops["experts"] * 2 / 3)
    assert frozen.real_flops["attention"] == whole.real_flops["attention"]
    assert whole.real_flops["dense"] * 2 / 3 < frozen.real_flops["dense"] < whole.real_flops["dense"] * 0.7
    assert frozen.extra_flops["computed again"] == whole.extra_flops["computed again"]
    experts = count_work(config('train.trainable=["**/experts/w_up_*"]'), ONE)
    assert experts.real_flops["experts"] == pytest.approx(whole.real_flops["experts"] * (2 + 2 + 3) / 9)


@pytest.mark.slow
def test_expert_rows_follow_the_budget_in_work_and_in_buffers():
    mesh = ONE | {"expert": 4}
    high, low = (count_work(config(EXCHANGE, f"model.moe.k_min={k}", f"model.moe.k_max={k + 2}"), mesh) for k in (4, 2))
    assert low.rows_real < high.rows_real
    assert low.rows_buffers < high.rows_buffers
    assert low.real_flops["experts"] < high.real_flops["experts"]
    assert low.real_flops["dense"] == high.real_flops["dense"]
    assert high.rows_buffers >= high.rows_real
    assert 0 < low.rows_sent < high.rows_sent < high.rows_buffers  # a token's experts share a row on a device
    assert low.rows_sent / high.rows_sent > low.rows_buffers / high.rows_buffers  # the fewer, the less they share
    assert count_work(config(), mesh).rows_sent == 0


def test_remat_computes_the_stack_again_and_dots_no_dense_matmul():
    none, full, dots = (count_work(config(f"model.stack.remat={r}"), ONE) for r in ("none", "full", "dots"))
    assert none.real_flops == full.real_flops == dots.real_flops
    assert 0 == none.extra_flops["computed again"] < dots.extra_flops["computed again"]
    assert dots.extra_flops["computed again"] < full.extra_flops["computed again"]


def test_splash_attention_skips_what_is_masked_and_computes_scores_again():
    fits = ["data.encoding.max_length=128", "model.max_length=128", "model.stack.attention.head_dim=128"]
    work = count_work(config(*fits), ONE, "TPU v5 lite")
    assert work.extra_flops["masked attention"] == work.real_flops["attention"] / 2  # nine matmuls where six are needed


@pytest.mark.slow
def test_gathered_weights_are_split_by_expert_and_tensor_alone():
    model = dataclasses.replace(config(EXCHANGE).model, vision=None, audio=None)
    whole = gathered_bytes(model, ONE)
    assert gathered_bytes(model, ONE | {"fsdp": 8, "data": 2}) == whole
    expert = sum(3 * model.stack.d_model * model.stack.expert_d_ff for _ in range(model.moe.num_experts))
    expert *= 4 * model.stack.num_moe_layers
    assert gathered_bytes(model, ONE | {"expert": 2}) == pytest.approx(whole - expert / 2)
    all_experts = dataclasses.replace(
        model, stack=dataclasses.replace(model.stack, execution=Execution(dispatch="blocks"))
    )
    assert gathered_bytes(all_experts, ONE | {"expert": 2}) == whole


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "sequence"])
def test_blocks_compute_each_row_once_however_many_devices_share_the_tokens(axis):
    """The only extra work is the last tile of every expert, on each device."""
    one, eight = (count_work(config(), mesh) for mesh in (ONE, ONE | {axis: 8}))
    assert eight.rows_real == one.rows_real == pytest.approx(eight.rows_buffers, rel=0.05)
    assert eight.rows_computed - eight.rows_real == 8 * (one.rows_computed - one.rows_real)
