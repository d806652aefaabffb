from dataclasses import replace

import torch
from torch import Tensor, nn

from modules.item_table import ItemTable
from tasks.retrieval import RetrievalTask
from tests.training.tasks import liger_task, retrieval_task


class Asked(nn.Module):
    """Keeps what it was called with."""

    def forward(self, *arguments: object) -> dict[str, Tensor]:
        self.arguments = arguments
        return {"loss": torch.zeros(())}


def test_the_loss_is_the_model_s_for_the_tokens_of_the_batch() -> None:
    for task, num_arguments in ((retrieval_task(fixed_capacity=False), 1), (liger_task(fixed_capacity=False), 2)):
        model = Asked()
        assert task.loss(model, task.batch(0)) == {"loss": 0.0}
        tokens, *items = model.arguments
        assert len(model.arguments) == num_arguments
        assert len(tokens) == 32
        assert tokens.histories.targets is not None
        assert all(isinstance(table, ItemTable) and len(table) == 30 for table in items)
        torch.testing.assert_close(task.loss(task.model.eval(), task.batch(0)), task.model(*model.arguments))


def test_items_move_to_the_batches_once() -> None:
    """A recorded step reads them where they were while it was recorded."""
    task, model = liger_task(fixed_capacity=False), Asked()
    addresses = set()
    for step in range(2):
        task.loss(model, task.batch(step))
        addresses.add(model.arguments[1].features.data_ptr())
    assert len(addresses) == 1
    meta = liger_task(fixed_capacity=False)
    meta._batches.pack = lambda batch: replace(batch, item_ids=batch.item_ids).to("meta")
    examples = task._batches.pack(task.batch(0))
    meta.loss(model, examples)
    assert model.arguments[1].features.device.type == "meta"


def test_every_task_has_its_own_selection_metric() -> None:
    task = retrieval_task(fixed_capacity=False)
    assert task.selection_metric == RetrievalTask.selection_metric == "generative/valid/all/ndcg@10"
    dense = RetrievalTask(
        task.model,
        task._batches,
        tokenize=task._tokenize,
        item_keys=[],
        validate=lambda: {"dense/valid/all/ndcg@10": 0.5},
        selection_metric="dense/valid/all/ndcg@10",
    )
    assert dense.evaluate(dense.model) == {dense.selection_metric: 0.5}
    assert RetrievalTask.selection_metric == "generative/valid/all/ndcg@10"
