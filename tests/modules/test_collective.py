"""Alone; what several processes make of it is seen in tests/training/test_processes.py."""

import torch

from modules.collective import chosen_rows, num_processes, of_first_process, own_rows, rows_of_all, sum_over_processes


def test_a_process_alone_has_all_rows():
    rows = torch.arange(6.0).view(3, 2)
    assert num_processes() == 1
    for function in (sum_over_processes, of_first_process, rows_of_all, own_rows):
        assert function(rows) is rows
    assert torch.equal(chosen_rows(rows, torch.tensor([2, 0, 2])), torch.tensor([[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]))
