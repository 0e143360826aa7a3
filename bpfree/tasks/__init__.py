"""Tasks, their splits, and how batches are made of them."""

from bpfree.tasks.task import DataSource, Split, Task, TaskSpec, split_validation

__all__ = ["DataSource", "Split", "Task", "TaskSpec", "split_validation"]
