import jax.numpy as jnp
import numpy as np
import pytest

from anyexperts_jax.ops.expert_mlp.tiles import deal_tiles, list_aligned_tiles, list_tiles


def entries(tiles, stop):
    return list(zip(*(np.asarray(a)[:stop].tolist() for a in tiles[:7]), strict=True))


def test_live_tiles_come_first_then_empty_experts_then_the_rest():
    tiles = list_tiles(jnp.array([5, 0, 8, 9]), 12, 4)
    live = [(0, 1, 0, 1, 1, 1, 0), (0, 0, 0, 0, 4, 0, 1)]  # expert, block, both again as sources, rows, opens, closes
    live += [(2, 1, 2, 1, 4, 1, 0), (2, 0, 2, 0, 4, 0, 1)]
    live += [(3, 2, 3, 2, 1, 1, 0), (3, 1, 3, 1, 4, 0, 0), (3, 0, 3, 0, 4, 0, 1)]
    assert (int(tiles.num_live), int(tiles.num_touched)) == (7, 8)
    assert entries(tiles, 7) == live
    assert entries(tiles, 8)[7] == (1, 0, 3, 0, 0, 1, 1)
    assert not np.any(np.asarray(tiles.rows)[7:])


@pytest.mark.parametrize("counts", [[0, 0, 0], [7, 0, 3], [100, -4, 7], [7, 7, 7]])
def test_every_tile_is_listed_once(counts):
    tiles = list_tiles(jnp.array(counts), 7, 4)
    own = list(zip(tiles.expert.tolist(), tiles.block.tolist(), strict=True))
    assert sorted(own[:-1]) == [(e, b) for e in range(3) for b in range(2)]
    assert own[-1] == own[-2]
    assert int(tiles.rows[:-1].sum()) == sum(min(max(c, 0), 7) for c in counts)
    touched = [e for e, _ in own[: int(tiles.num_touched)]]
    assert set(touched) == {0, 1, 2}


@pytest.mark.parametrize("empty", [False, True])
def test_aligned_tiles_are_the_live_ones_and_then_the_empty_experts(empty):
    tiles = list_aligned_tiles(jnp.array([0, 8, 8, 16]), jnp.array([5, 0, 8, 1]), 8, 4, empty=empty)
    live = [(0, 1, 0, 1, 1, 1, 0), (0, 0, 0, 0, 4, 0, 1)]
    live += [(2, 3, 2, 3, 4, 1, 0), (2, 2, 2, 2, 4, 0, 1), (3, 4, 3, 4, 1, 1, 1)]
    assert (int(tiles.num_live), int(tiles.num_touched)) == (5, 6)
    assert entries(tiles, 5) == live
    if empty:
        expert, _, *rest = entries(tiles, 6)[5]
        assert (expert, rest) == (1, [3, 4, 0, 1, 1])
    else:
        assert entries(tiles, 6)[5] == live[-1]


def test_the_core_without_a_tile_keeps_off_the_others():
    for counts, rows in (([0, 3], [3, 0]), ([0, 0], [0, 0])):
        tiles = list_aligned_tiles(jnp.array([0, 0]), jnp.array(counts), 2, 4, empty=False)
        assert tiles.block[:2].tolist() == [0, 1]
        assert tiles.rows[:2].tolist() == rows


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("counts", [[0, 0, 0], [7, 0, 3], [0, 5, 0], [7, 7, 7], [4, 4, 4], [1, 1, 0]])
@pytest.mark.parametrize("capacity", [7, 4])
def test_cores_get_even_shares_of_the_live_tiles_and_no_tile_twice(cores, counts, capacity):
    tiles = list_tiles(jnp.array(counts), capacity, 4)
    total = tiles.rows.size - 1
    steps = -(-total // cores)
    dealt = entries(deal_tiles(tiles, cores), cores * steps)
    parts = [dealt[core * steps : (core + 1) * steps] for core in range(cores)]
    own = [{entry[:2] for entry in part} for part in parts]
    assert sum(map(len, own)) == total == len(set.union(*own))
    live = [sum(entry[4] > 0 for entry in set(part)) for part in parts]
    assert max(live) - min(live) <= 1
    for part, count in zip(parts, live, strict=True):
        assert all(entry[:2] == entry[2:4] and entry[4] > 0 for entry in part[:count])
        assert len({entry[2:4] for entry in part[count:]}) <= 1
