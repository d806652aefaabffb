"""What a spawned process imports anew, and so without any value that its parent's config gave."""

import gin


@gin.configurable(module="tests.training.gin_worker")
def train(*, options: object, seed: int = 0, name: str = "") -> tuple[int, str]:
    return seed, name


def arguments() -> tuple[int, str]:
    return train(options=None)
