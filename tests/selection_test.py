import pytest
from selection import of_cases, of_part


class Item:
    def __init__(self, nodeid, every_case=False):
        self.nodeid, self.every_case = nodeid, every_case

    def get_closest_marker(self, name):
        return self.every_case if name == "every_case" else None


CASES = [Item(f"a_test.py::test_a[{i}]") for i in range(10)]
FILES = [Item(f"b_test.py::test_b[{i}]", every_case=True) for i in range(5)]


@pytest.mark.parametrize(("most", "numbers"), [(1, [0]), (2, [0, 9]), (3, [0, 4, 9]), (20, range(10))])
def test_cases_are_spread_evenly_and_every_case_stays(most, numbers):
    assert of_cases(CASES + FILES, most) == {CASES[i] for i in numbers} | set(FILES)


def test_parts_make_up_the_whole_and_share_no_test():
    parts = [of_part(CASES + FILES, f"{i}/4") for i in range(4)]
    assert set().union(*parts) == set(CASES + FILES)
    assert sum(map(len, parts)) == 15
    assert all(len(part) < 15 for part in parts)


def test_without_an_option_all_tests_run():
    assert of_cases(CASES, None) == of_part(CASES, None) == set(CASES)


@pytest.mark.parametrize("part", ["4/4", "1", "a/2", "1/0", "-1/4", ""])
def test_a_part_that_is_not_there_is_refused(part):
    with pytest.raises(pytest.UsageError, match=r"^--part .*: must be I/N with I from 0 to N - 1, such as 0/4$"):
        of_part(CASES, part)


def test_no_cases_is_refused():
    with pytest.raises(pytest.UsageError, match=r"^--cases 0: must be at least 1$"):
        of_cases(CASES, 0)
