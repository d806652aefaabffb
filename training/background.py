"""Jobs that run beside the training, one after the other, and whose failures come back."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundJobs:
    """A thread that does jobs in the order in which they are given.

    A job that fails is the last one: those behind it are dropped, since they may build on it. Its error is kept until
    somebody asks. The thread starts with the first job. A program that ends lets the running job end first.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._newest: dict[str, Future[None]] = {}
        self._failure: BaseException | None = None
        self._failure_was_raised = False

    def start(self, kind: str, job: Callable[[], None]) -> None:
        """Do a job once those before it are done."""
        self._newest[kind] = self._executor.submit(self._do, job)

    def settle(self, kind: str | None = None) -> None:
        """Wait until all jobs are done, or those of one kind, whether they succeed or fail."""
        for future in [*self._newest.values()] if kind is None else [*filter(None, [self._newest.get(kind)])]:
            future.result()

    def raise_failure(self) -> None:
        """Raise the error of the job that failed, if one did; does not wait."""
        if self._failure is not None:
            self._failure_was_raised = True
            raise self._failure

    def close(self) -> None:
        """Let the jobs end, and the thread; raises the error of a failed job unless that was done before."""
        self._executor.shutdown()
        if not self._failure_was_raised:
            self.raise_failure()

    def _do(self, job: Callable[[], None]) -> None:
        if self._failure is not None:
            return
        try:
            job()
        except BaseException as error:
            self._failure = error
