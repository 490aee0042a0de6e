import dataclasses

import pytest
from jax.sharding import PartitionSpec

from anyexperts_jax.core.axes import LOGICAL_AXES
from anyexperts_jax.core.errors import UserError
from anyexperts_jax.sharding.rules import ShardingRules


def test_every_logical_axis_has_a_rule():
    rules = {field.name for field in dataclasses.fields(ShardingRules)}
    assert rules - {"batch", "length"} == set(LOGICAL_AXES)


def test_spec_follows_the_rules():
    assert ShardingRules().spec(("layers", "expert", "embed", "expert_mlp")) == PartitionSpec(
        None, "expert", "fsdp", "tensor"
    )
    assert ShardingRules(batch="data").spec(("batch", "length")) == PartitionSpec("data", "sequence")
    assert ShardingRules().spec(()) == PartitionSpec()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShardingRules(embed="fdsp"), "mesh axis of rule 'embed'='fdsp' is unknown; valid: data, fsdp"),
        (lambda: ShardingRules().spec(("embde",)), "logical axis='embde' is unknown; valid: batch, length, vocab"),
        (lambda: ShardingRules().spec(("heads", "mlp")), "mesh axis 'tensor' is used twice .*heads"),
    ],
)
def test_what_no_rule_covers_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
