import pytest
import torch

from modules.largest import GROUP, largest


@pytest.mark.parametrize(("width", "k"), [(1, 1), (63, 63), (GROUP, 3), (8 * GROUP, 4), (40 * GROUP, 20), (4096, 32)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_values_and_their_places(width, k, ties):
    values = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    if ties:
        values = values.round()
    values[2] = -torch.inf
    values[3, 0] = torch.inf
    found, columns = largest(values, k)
    torch.testing.assert_close(found.sort(dim=1, descending=True).values, values.topk(k).values)
    torch.testing.assert_close(values.gather(1, columns), found)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_rows_without_room_for_groups_of_their_own():
    assert largest(torch.zeros(0, 10 * GROUP), 2)[0].shape == (0, 2)
