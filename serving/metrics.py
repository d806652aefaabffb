"""What the server counts, in the form that Prometheus reads."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_HISTORIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server.

    Args:
        waiting: histories in the queue now.
        num_items: items that can be recommended now.
    """

    def __init__(self, waiting: Callable[[], int], num_items: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("recommender_requests", "Requests answered.", ["path", "status"], registry=registry)
        self._seconds = Histogram(
            "recommender_request_seconds", "From head to last byte.", ["path"], buckets=_SECONDS, registry=registry
        )
        self._batch = Histogram(
            "recommender_batch_histories", "Histories per batch.", buckets=_HISTORIES, registry=registry
        )
        Gauge("recommender_queue_histories", "Histories that wait.", registry=registry).set_function(waiting)
        Gauge("recommender_items", "Items that can be recommended.", registry=registry).set_function(num_items)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_batch(self, num_histories: int) -> None:
        """One batch was begun."""
        self._batch.observe(num_histories)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
